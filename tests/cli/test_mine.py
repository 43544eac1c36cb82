"""`cafe mine`: from a file of captions to a file with hard negatives, on the small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cafe.cli import app
from cafe.cli.mine import _formatted
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.errors import DataError
from cafe.metrics.mining import HardNegatives
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from helpers.captioned_noise import COUNT, write_captioned_noise


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write_captioned_noise(tmp_path)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["mine", *map(str, arguments)])


def texts(record: dict[str, Any], side: str) -> list[str]:
    return [messages[0]["content"] for messages in record[f"{side}_messages"]]


def test_the_negatives_are_those_of_the_models_own_scores(
    captions: Path, small_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mined.jsonl"
    options = ["--range", "1-6", "--count", 3, "--max-share", 1, "--batch-size", 5]
    done = run(small_dir, captions, "--out", out, *options)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == COUNT + 1

    model = CAFe.from_pretrained(small_dir)
    captioned = [texts(r, "positive")[0] for r in records]
    images = model.encode([captions.parent / r["images"][0] for r in records])
    scores = images @ model.encode(captioned).T
    some = 0
    for i, record in enumerate(records):
        own = {i} | ({COUNT - 1, COUNT} if i >= COUNT - 1 else set())
        order = [j for j in np.argsort(-scores[i], kind="stable") if j not in own][1:6]
        kept = [captioned[j] for j in order if scores[i, j] <= scores[i, i]][:3]
        assert texts(record, "negative") == kept
        some += len(kept)
    back = read_examples(out).examples
    assert [len(example.negatives) for example in back] == [
        len(record["negative_messages"]) for record in records
    ]
    assert [e.target[0].text for e in back if e.target] == captioned
    # Thoughts and groups name examples by their ids, so the mined file has those of its source.
    assert [e.id for e in back] == [e.id for e in read_examples(captions).examples]
    assert back[0].id != "1", "not the numbers of the lines"
    assert some > 10, "the random model still ranks some targets below the positive"
    assert f"{COUNT + 1} queries:" in done.output


def test_a_broken_image_is_named_and_left_out(
    captions: Path, small_dir: Path, tmp_path: Path
) -> None:
    (captions.parent / "3.png").write_bytes(b"not an image")
    out = tmp_path / "mined.jsonl"
    done = run(small_dir, captions, "--out", out, "--range", "0-9", "--count", 2)
    assert done.exit_code == 0, done.output
    assert "skipped example '3'" in done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == COUNT
    assert all(record["images"] != ["3.png"] for record in records)


@pytest.mark.parametrize("window", ["50-10", "1-2", "ten", "3"])
def test_a_range_without_room_is_refused_before_the_model_loads(
    window: str, captions: Path
) -> None:
    done = run("no-such-model", captions, "--out", "x.jsonl", "--range", window)
    assert isinstance(done.exception, DataError)
    assert "with room for 7 negatives" in str(done.exception)


def test_a_missing_file_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    done = run("no-such-model", tmp_path / "none.json", "--out", tmp_path / "x.jsonl")
    assert isinstance(done.exception, DataError)
    assert "no such file" in str(done.exception)


def test_the_old_name_of_the_share_still_works(
    captions: Path, small_dir: Path, tmp_path: Path
) -> None:
    """It was named like sentence-transformers' margin, which is one minus it."""
    files = []
    for option, share in (("--max-share", 0.5), ("--relative-margin", 0.5), ("--max-share", 1)):
        files.append(tmp_path / f"{len(files)}.jsonl")
        options = ["--range", "0-9", "--count", 2, option, share]
        done = run(small_dir, captions, "--out", files[-1], *options)
        assert done.exit_code == 0, done.output
    new, old, other = (file.read_text() for file in files)
    assert new == old != other


@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_what_it_prints_is_a_recipes_data_that_reads_the_file(
    folder: str, captions: Path, small_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / folder / "mined.jsonl"
    done = run(small_dir, captions, "--out", out, "--range", "0-9", "--count", 2)
    assert done.exit_code == 0, done.output
    recipe = tmp_path / "elsewhere" / "recipe.yaml"
    rest = "model: tiny\noutput_dir: run\nbatch: {examples: 2}\nschedule: {steps: 1}\n"
    printed = done.stdout.partition("in a recipe:\n")[2]
    recipe.write_text(f"{rest}optimizer: {{learning_rate: 1e-3}}\n{printed}")
    [source] = load_recipe(recipe).data
    read = read_examples(source.path, ReadOptions(image_root=source.image_root))
    assert (len(read.examples), read.skipped) == (COUNT + 1, [])
    assert (source.image_root is None) == (folder == ".")


def test_both_mean_scores_are_of_the_queries_with_negatives() -> None:
    """The first query has none. (0.8 + 0.6) / 2 = 0.7; ((0.5 + 0.7) / 2 + 0.4) / 2 = 0.5."""
    found = HardNegatives(
        indices=np.array([[-1, -1], [1, 0], [0, -1]]),
        scores=np.array([[np.nan, np.nan], [0.7, 0.5], [0.4, np.nan]], dtype=np.float32),
        own_scores=np.array([0.1, 0.8, 0.6], dtype=np.float32),
        removed=2,
    )
    last = _formatted(found, count=2).splitlines()[-1]
    assert last.startswith("mean score of positives 0.700, of negatives 0.500 (of the 2 queries")


def test_few_negatives_are_explained() -> None:
    """A model that does not retrieve yet scores nearly everything above the positive."""
    scores = np.array([[np.nan], [np.nan], [0.2]], dtype=np.float32)
    rare = HardNegatives(np.array([[-1], [-1], [0]]), scores, np.full(3, 0.3, np.float32), 9)
    often = HardNegatives(
        np.array([[1], [-1], [0]]), np.nan_to_num(scores, nan=0.1), np.full(3, 0.3, np.float32), 9
    )
    assert "most queries have no negative: a model that ranks better" in _formatted(rare, count=1)
    assert "most queries" not in _formatted(often, count=1)


@pytest.mark.parametrize(("share", "few"), [(0.01, True), (0, False)])
def test_few_neighbours_are_explained(
    share: float, few: bool, captions: Path, small_dir: Path, tmp_path: Path
) -> None:
    options = ["--range", "0-9", "--batches", 3, "--max-share", share]
    done = run(small_dir, captions, "--out", tmp_path / "groups.jsonl", *options)
    assert done.exit_code == 0, done.output
    removed = next(line for line in done.output.splitlines() if "too near the positive" in line)
    assert removed.startswith("0 ") != few
    assert ("most groups are random: a model that ranks better" in done.output) == few
