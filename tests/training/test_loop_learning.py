"""Whole runs learn, at the rates that the recipe gives each part, and leave what they promise."""

from __future__ import annotations

import doctest
import json
import logging
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from cafe.errors import RecipeError, TrainingError
from cafe.files import UNFINISHED
from cafe.model.rerank import trained_temperature
from cafe.model.tiny import ONE_IMAGE_KEY
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.training import run
from cafe.training.run import train
from helpers.runs import STEPS, make_world, moved, recipe, recipe_file, weights

pytestmark = pytest.mark.slow  # every test trains

PARTS = {
    "vision": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language": "language_model.",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_losses_of_four_images_go_down(world: Path, tmp_path: Path) -> None:
    """Chance is ln 4 = 1.386 for the contrastive loss of a batch of four."""
    overrides = ("data.0.limit=4", "schedule.steps=40", "schedule.kind=constant")
    rate = "optimizer.learning_rate=1e-3"
    records = train(recipe(world, tmp_path / "out", *overrides, rate)).records
    first, last = records[0], records[-1]
    assert (first.contrastive, first.language) > (1.3, 5.0)
    assert last.contrastive < 1.0
    assert last.language < 4.0
    assert all(r.loss == pytest.approx(r.contrastive + r.language, rel=1e-6) for r in records)


def test_a_run_leaves_a_model_a_log_and_a_recipe_that_runs_again(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = recipe(world, out, "objective.learn_temperature=true", "log.every_steps=3")
    result = train(wanted)
    assert (result.model_dir, result.log_path) == (out / "model", out / "log.jsonl")
    lines = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, STEPS] == [r.step for r in result.records]
    assert set(lines[0]) == {
        *("step", "loss", "contrastive", "language", "temperature", "gradient_norm"),
        *("learning_rate", "examples_per_second", "tokens_per_second"),
        *("data_wait_share", "seconds", "padding", "total"),
        *("modality_gap", "uniformity", "effective_rank", "host_bytes"),
    }
    assert 0 < lines[0]["data_wait_share"] < 1
    assert lines[-1]["temperature"] != pytest.approx(0.05, rel=1e-5)
    assert load_recipe(out / "recipe.yaml") == wanted
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
    ]
    model = CAFe.from_pretrained(out / "model")
    assert model.encode("a red cat").shape == (64,)
    assert getattr(model.model.config, ONE_IMAGE_KEY) is True, "as its base"
    kept = trained_temperature(model.model.config)
    assert kept == pytest.approx(lines[-1]["temperature"], rel=1e-2), "reranking weighs by it"
    assert kept != pytest.approx(0.05, rel=1e-5)


def test_the_example_of_train_prints_what_it_shows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file(world, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(train, "train", module=run)
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example).failed == 0


def test_train_prints_the_progress_bar_only_and_logs_its_messages(
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cafe.training")
    short = recipe(world, tmp_path / "out", "schedule.steps=1", "batch.examples=99")
    train(short)
    train(short, resume=True)
    assert capfd.readouterr() == ("", "")  # no bar either: this is no terminal
    messages = [r.getMessage() for r in caplog.records if r.name == "cafe.training"]
    captions = f"{world}/scenes/captions.json"
    reduced = f"{captions}: batch size reduced to 32, as the source has only 32 examples"
    assert messages == [reduced, reduced, "all 1 steps are done"]


def test_overrides_of_a_recipe_object_are_an_error(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"overrides seed=1: .* use load_recipe"):
        train(recipe(world, tmp_path / "out"), overrides=["seed=1"])


def test_a_frozen_part_stays_bit_for_bit_and_the_others_move(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(world, out, "optimizer.freeze=[vision, projector]", "schedule.steps=2"))
    base, tuned = weights(world), weights(out)
    assert moved(base, tuned, PARTS["vision"]) == 0
    assert moved(base, tuned, PARTS["projector"]) == 0
    assert moved(base, tuned, PARTS["language"]) > 1e-4


def test_each_part_moves_at_its_own_rate(world: Path, tmp_path: Path) -> None:
    """AdamW's first step moves a weight by its learning rate, times g / (|g| + epsilon)."""
    out = tmp_path / "out"
    rates = {"vision": 1e-5, "projector": 1e-4, "language": 1e-3}
    train(
        recipe(
            world,
            out,
            *("optimizer.vision_learning_rate=1e-5", "optimizer.projector_learning_rate=1e-4"),
            *("schedule.steps=1", "schedule.warmup=0", "optimizer.epsilon=1e-12"),
        )
    )
    base, tuned = weights(world), weights(out)
    for part, prefix in PARTS.items():
        assert moved(base, tuned, prefix) == pytest.approx(rates[part], rel=0.02), part


@pytest.mark.parametrize(
    ("weight", "idle", "learned"),
    [
        ("contrastive_weight", "contrastive", "language"),
        ("language_weight", "language", "contrastive"),
    ],
)
def test_a_weight_of_zero_leaves_that_loss_out(
    world: Path, tmp_path: Path, weight: str, idle: str, learned: str
) -> None:
    result = train(recipe(world, tmp_path / "out", f"objective.{weight}=0.0", "schedule.steps=2"))
    config = json.loads((result.model_dir / "config.json").read_text())
    assert ("contrastive_temperature" in config) == (idle == "language")
    for record in result.records:
        assert getattr(record, idle) == 0
        assert record.loss == pytest.approx(getattr(record, learned))
        assert record.loss > 0.1


def test_bf16_and_gradient_checkpointing_train_what_fp32_trains(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = weights(world)
    steps = ("schedule.steps=2", "objective.temperature=1.0")
    train(recipe(world, tmp_path / "half", *steps, "precision=bf16"))
    train(recipe(world, tmp_path / "again", *steps, "gradient_checkpointing=true"))
    # Gradient checkpointing computes the last layer as a whole: sums of other lengths, which round
    # otherwise, and Adam makes a step of any difference.
    monkeypatch.setattr("cafe.model.hidden.recomputes_last_layer", lambda _: True)
    train(recipe(world, tmp_path / "exact", *steps))
    exact, again, half = (weights(tmp_path / name) for name in ("exact", "again", "half"))
    assert moved(exact, base, "") > 1e-4
    assert moved(exact, again, "") < 1e-6
    differs = moved(exact, half, "")
    assert 0 < differs < 4e-3  # two steps of about 1e-3, which may go opposite ways
    agreement = torch.cosine_similarity(_change(base, exact), _change(base, half), dim=0)
    assert agreement > 0.9


def _change(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(tuned[name] - base[name]).flatten() for name in sorted(base)])


def test_the_model_leaves_in_the_type_that_its_base_came_in(world: Path, tmp_path: Path) -> None:
    """And training keeps float32: a step of 1e-5 would be lost in bf16."""
    half = CAFe.from_pretrained(world / "model", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = f"model={tmp_path / 'half'}"
    small = ("optimizer.learning_rate=1e-5", "schedule.steps=2")
    train(recipe(world, tmp_path / "out", model, *small))
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert {w.dtype for w in weights(world).values()} == {torch.float32}
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "out" / "checkpoints" / "step-000002" / "weights.safetensors")
    assert {w.dtype for w in kept.values()} == {torch.float32}


def test_several_sources_take_turns_and_one_image_is_one_row(world: Path, tmp_path: Path) -> None:
    questions = f"data=[{{path: {world}/scenes/captions.json}}, "
    questions += f"{{path: {world}/scenes/questions.json, mode: chat, turns: branches}}]"
    apart = train(recipe(world, tmp_path / "apart", questions, "schedule.steps=2")).records
    merged = train(
        recipe(world, tmp_path / "merged", questions, "merge_by_image=true", "schedule.steps=2")
    ).records
    assert [record.contrastive > 0 for record in apart] == [True, False]
    assert [record.contrastive > 0 for record in merged] == [True, True]


def test_a_second_run_does_not_write_over_the_first(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(world, out, "schedule.steps=1"))
    before = weights(out)
    with pytest.raises(TrainingError, match="contains a run already; continue it with --resume"):
        train(recipe(world, out, "schedule.steps=1", "seed=1"))
    assert moved(before, weights(out), "") == 0


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_at_a_time_do_not_share_a_folder(world: Path, tmp_path: Path, resume: bool):
    out = tmp_path / "out"
    unfinished = out / "checkpoints" / f"{UNFINISHED}step-000001"
    unfinished.mkdir(parents=True)
    with (
        FileLock(out / ".run"),  # as the other run holds it
        pytest.raises(TrainingError, match=f"output_dir {out}: another process trains into it"),
    ):
        train(recipe(world, out, "schedule.steps=1"), resume=resume)
    assert unfinished.is_dir(), "the other run is writing it"
    train(recipe(world, out, "schedule.steps=1"), resume=resume)
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.freeze=[vision, projector, language]"], "nothing is left to learn"),
        (["batch.max_tokens=4096"], "batch.max_tokens is 4096, but the context of"),
        (["log.trackers=[wishful]"], "log.trackers: 'wishful' is not installed"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_error(
    world: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe(world, tmp_path / "out", *overrides))
