"""A dry run says what the run would be, takes its first step, and leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cafe
from cafe.data.quarantine import Quarantine
from cafe.errors import RecipeError, TrainingError
from cafe.model.rows.inspect import row_tokens, sequence_views
from cafe.model.vlm import CAFe
from cafe.recipes import Recipe, load_recipe
from cafe.training.build import build_collator
from cafe.training.data import load_data
from cafe.training.dry_run import DryRun
from cafe.training.step import TrainingStep
from helpers import layouts

RECIPE = """\
model: {model}
output_dir: {folder}/out
data: [{{path: "{folder}/data/data.json"}}]
batch: {{examples: 3, chunk: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3, freeze: [vision]}}
schedule: {{steps: 6}}
precision: fp32
log: {{progress: false, trackers: []}}
"""


@pytest.fixture
def recipe(tmp_path: Path, small_dir: Path) -> Path:
    """Of four records one is broken."""
    path = layouts.llava(tmp_path / "data")
    records = json.loads(path.read_text())
    records[2]["image"] = "gone.png"
    path.write_text(json.dumps(records))
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=small_dir, folder=tmp_path))
    return tmp_path / "r.yaml"


def tokens_of_each(recipe: Recipe) -> tuple[list[int], list[int]]:
    """Tokens of each example's row, and tokens of each sequence, one example at a time."""
    vlm = CAFe.from_pretrained(recipe.model)
    collator = build_collator(recipe, vlm)
    examples = list(load_data(recipe, Quarantine()).examples)  # type: ignore[call-overload]
    views = [view for example in examples for view in sequence_views(collator, example)]
    return [row_tokens(collator, e) for e in examples], [
        view.image_tokens + view.text_tokens for view in views
    ]


@pytest.mark.slow
def test_what_it_says_is_what_the_run_does(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = cafe.dry_run(recipe)
    assert sorted(tmp_path.rglob("*")) == before

    data = str(tmp_path / "data" / "data.json")
    assert report.examples == {data: 3}
    (skipped,) = report.skipped
    assert "gone.png" in skipped.reason
    assert (report.steps, report.batch.examples, report.batch.chunks) == (6, 3, 2)
    assert report.parameters["vision"][0] == 0 < report.parameters["language"][0]
    rows, sequences = tokens_of_each(report.recipe)
    assert report.batch.rows == 3
    assert report.batch.tokens == sum(rows)
    assert report.batch.longest == max(sequences)
    assert [view.name for view in report.prompts] == ["query", "target", "answer"]
    assert "Compress this image in one word:" in report.prompts[0].runs[-1].text
    assert report.measured.host_bytes is None or report.measured.host_bytes > 2**20

    first = cafe.train(recipe).records[0]
    assert report.measured.contrastive == pytest.approx(first.contrastive, rel=1e-5)
    assert report.measured.language == pytest.approx(first.language, rel=1e-5)


def test_numbers_of_the_batch_by_hand(recipe: Path) -> None:
    """One chunk: its rows are padded to the longest; learned and image tokens are those seen."""
    report = cafe.dry_run(recipe, overrides=["batch.chunk=3", "optimizer.freeze=[]"])
    rows, _ = tokens_of_each(report.recipe)
    assert report.batch.padding_share == pytest.approx(1 - sum(rows) / (3 * max(rows)))
    answer = report.prompts[2]
    assert report.batch.labelled >= 3 <= answer.labelled_tokens
    assert report.batch.vision_tokens == 3 * report.prompts[0].image_tokens
    assert report.parameters["vision"][0] > 0


def test_how_long_a_run_is_expected_to_take(recipe: Path) -> None:
    report = cafe.dry_run(recipe)
    step = replace(report.measured, seconds=2.0, data_seconds=6.0)

    def expected(workers: int) -> float:
        batch = report.recipe.batch.model_copy(update={"workers": workers})
        wanted = report.recipe.model_copy(update={"batch": batch})
        return replace(report, recipe=wanted, measured=step).expected_seconds

    assert [expected(workers) for workers in (0, 2, 4)] == [6 * 8.0, 6 * 3.0, 6 * 2.0]


def test_a_batch_that_does_not_fit_names_the_remedy(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TrainingStep, chunks: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(TrainingStep, "__call__", full)
    with pytest.raises(TrainingError, match=r"does not fit in memory.*lower batch\.chunk"):
        cafe.dry_run(recipe)


def test_an_earlier_run_and_several_processes_are_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (warning,) = cafe.dry_run(load_recipe(recipe)).warnings
    assert "contains a run already" in warning
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        cafe.dry_run(recipe)


def test_the_command_prints_it_for_people_and_programs(recipe: Path, command_line: Any) -> None:
    code, out, err = command_line("train", recipe, "--dry-run")
    assert code == 0, err
    assert "data.json: 3 examples" in out
    assert "1 records skipped" in out
    assert "for 6 steps (one measured step: " in out
    code, out, err = command_line("train", recipe, "--dry-run", "--json", "schedule.steps=2")
    assert code == 0, err
    content = json.loads(out)
    assert content["steps"] == content["recipe"]["schedule"]["steps"] == 2
    assert {"expected_seconds", *DryRun.__dataclass_fields__} == set(content)
    for words, message in ((["--json"], "add --dry-run"), (["--dry-run", "--resume"], "leave out")):
        code, _, err = command_line("train", recipe, *words)
        assert (code, message in err) == (2, True)
