"""Evaluations while a run goes on: what they measure, and that training does not notice them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cafe
from cafe.errors import DataError, RecipeError, TrainingError
from cafe.model.vlm import CAFe
from cafe.training.evaluations import smaller_is_better
from cafe.training.log import EvaluationRecord, LogReader, StepRecord
from cafe.training.run import train
from cafe.training.saving import kept_step
from cafe.training.stopping import Interrupted
from cafe.training.validation import measure_names, pair_scores, side_names
from cafe.types import Example, Image, user
from helpers.runs import (
    Killed,
    die_after,
    equal,
    make_world,
    recipe,
    weights,
    without_times,
)

pytestmark = pytest.mark.slow  # every test trains

LENGTH = ("schedule.steps=6", "objective.learn_temperature=true", "log.progress=false")
EVALUATE = (
    "evaluate.every_steps=2",
    "evaluate.data.path={world}/scenes/captions.json",
    "evaluate.data.limit=8",
    "checkpoint.best=language_loss",
)
TASKS = ("evaluate.tasks=[scenes-retrieval]", "evaluate.tasks_limit=4")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that random numbers count."""
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.2)


def run(world: Path, out: Path, *overrides: str, **options: Any) -> Any:
    filled = [override.format(world=world) for override in (*LENGTH, *overrides)]
    return train(recipe(world, out, *filled), **options)


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    run(world, out)
    return out


@pytest.fixture(scope="module")
def evaluated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    run(world, out, *EVALUATE, *TASKS)
    return out


def evaluations(out: Path) -> list[EvaluationRecord]:
    return LogReader(out / "log.jsonl").read().evaluations


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in without_times(out) if "loss" in line]


def test_training_does_not_notice_evaluations(plain: Path, evaluated: Path) -> None:
    assert [record.step for record in evaluations(evaluated)] == [0, 2, 4, 6]
    assert steps(evaluated) == steps(plain)
    assert equal(weights(evaluated), weights(plain))


def test_the_comparison_can_fail(
    plain: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that draws random numbers and leaves them drawn changes the dropout."""
    drawn = 0

    def draw(state: Any, device: Any) -> None:
        nonlocal drawn
        drawn += 1
        torch.rand(1)

    monkeypatch.setattr("cafe.training.validation.set_random_state", draw)
    run(world, tmp_path / "out", *EVALUATE)
    assert drawn == 4
    assert not equal(weights(tmp_path / "out"), weights(plain))


def test_scores_are_those_of_evaluate_on_the_same_data(world: Path, evaluated: Path) -> None:
    """In two directions and by both tasks; batches of other sizes round otherwise."""
    last = evaluations(evaluated)[-1].scores
    data = {"path": f"{world}/scenes/captions.json", "limit": 8}
    records = cafe.evaluate(str(evaluated / "model"), ["retrieval", "caption", "gap"], data=data)
    expected = {**records["retrieval"]["scores"], **records["gap"]["scores"]}
    del expected["modality_probe_accuracy"]
    expected["language_loss"] = records["caption"]["scores"]["caption_loss"]
    held_out = {name: value for name, value in last.items() if "scenes" not in name}
    assert held_out == pytest.approx(expected, abs=1e-4)
    (task,) = cafe.evaluate(str(evaluated / "model"), "scenes-retrieval", limit=4).values()
    assert {f"scenes-retrieval/{k}": v for k, v in task["scores"].items()} == {
        name: value for name, value in last.items() if "scenes" in name
    }


def test_samples_are_what_the_model_answers(world: Path, evaluated: Path) -> None:
    records = json.loads((world / "scenes" / "captions.json").read_text())
    first, last = (records[0], records[7])
    for record in evaluations(evaluated):
        assert [s.reference for s in record.samples] == [
            shown["conversations"][1]["value"] for shown in (first, last)
        ]
    model = CAFe.from_pretrained(evaluated / "model")
    asked = [
        {"image": world / "scenes" / shown["image"], "text": "Describe this image."}
        for shown in (first, last)
    ]
    answers = model.generate(asked, max_new_tokens=64)
    assert [sample.answer for sample in evaluations(evaluated)[-1].samples] == answers


# ---------------------------------------------------------------------- best, resume, patience


def test_the_best_model_is_kept_and_is_that_of_its_step(evaluated: Path) -> None:
    """The loss falls to the end here, so both directories are the same."""
    losses = [record.scores["language_loss"] for record in evaluations(evaluated)]
    assert losses == sorted(losses, reverse=True)
    assert kept_step(evaluated / "best") == 6
    model, best = files_of(evaluated / "model"), files_of(evaluated / "best")
    kept = json.loads(best.pop("evaluation.json"))
    assert kept["scores"]["language_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert best.keys() == model.keys()
    assert best == model


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_stopped_run_makes_its_evaluation_when_it_resumes(
    world: Path, evaluated: Path, tmp_path: Path
) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(world, out, *EVALUATE, *TASKS, on_step=stop)
    assert [record.step for record in evaluations(out)] == [0, 2]
    run(world, out, *EVALUATE, *TASKS, resume=True)
    assert without_times(out) == without_times(evaluated)
    assert equal(weights(out), weights(evaluated))


@pytest.mark.parametrize("died", [4, 5])
def test_a_resumed_run_evaluates_as_one_that_never_stopped(
    world: Path, evaluated: Path, tmp_path: Path, died: int
) -> None:
    """Step 4 dies before its evaluation."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(world, out, *EVALUATE, *TASKS, on_step=die_after(died))
    result = run(world, out, *EVALUATE, *TASKS, resume=True)
    assert without_times(out) == without_times(evaluated)
    assert equal(weights(out), weights(evaluated))
    assert result.best_dir == out / "best"
    for name in ("model.safetensors", "config.json", "evaluation.json"):
        assert (out / "best" / name).read_bytes() == (evaluated / "best" / name).read_bytes()


GROWING = "evaluate.every_steps=1", "evaluate.patience=2", "optimizer.learning_rate=1e-9"
"""The base is not left, so that the first of equals stays the best."""


def test_patience_ends_the_run_also_after_a_resume(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Recall does not move: the evaluation after step 1 is the best, and two follow."""
    out = tmp_path / "out"
    overrides = (*EVALUATE, *GROWING, "checkpoint.best=image_to_text_recall@10")
    caplog.set_level("INFO", "cafe.training")
    with pytest.raises(Killed):
        run(world, out, *overrides, on_step=die_after(3))
    result = run(world, out, *overrides, resume=True)
    assert [record.step for record in result.records] == [1, 2, 3]
    assert (
        "stopped after step 3 of 6: the last 2 evaluations have no better image_to" in caplog.text
    )
    assert kept_step(out / "best") == 1
    assert (out / "model").is_dir()
    again = run(world, out, *overrides, resume=True)
    assert [record.step for record in again.records] == [1, 2, 3]
    more = run(world, out, *overrides, "evaluate.patience=9", resume=True)
    assert [record.step for record in more.records] == [1, 2, 3, 4, 5, 6]
    assert kept_step(out / "best") == 1


def test_a_best_model_that_was_not_written_before_the_end_is_written_on_resume(
    world: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("cafe.training.saving.ModelSaver.save_best", die)
        with pytest.raises(Killed):
            run(world, out, *EVALUATE)
    assert not (out / "best").exists()
    run(world, out, *EVALUATE, "schedule.steps=2", resume=True)
    assert kept_step(out / "best") == 2


# ---------------------------------------------------------------------- what is held out


def test_held_out_examples_are_not_trained_on(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("evaluate.every_steps=6", "evaluate.held_out=0.25", "log.every_steps=6")
    run(world, out, *settings)
    manifest = json.loads((out / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert manifest["data"]["the number of examples"] == [24]
    assert evaluations(out)[-1].scores["image_to_text_recall@10"] >= 1 / 8
    with pytest.raises(
        cafe.CafeError, match=r"the number of examples was \[24\] and is now \[16\]"
    ):
        run(world, out, *settings, "evaluate.held_out=0.5", resume=True)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["evaluate.held_out=1"], DataError, "held_out: 1: 1 examples, and at least two are"),
        (["evaluate.held_out=0.01"], DataError, r"held_out: 0\.01: 0 examples"),
        (["evaluate.held_out=32"], DataError, "takes every example of .*captions.json"),
        (
            ["evaluate.held_out=8", "checkpoint.best=image_to_text_recal@1"],
            RecipeError,
            "nothing measures 'image_to_text_recal@1'; did you mean image_to_text_recall@1",
        ),
        (
            ["evaluate.held_out=8", "checkpoint.best=effective_rank/image"],
            RecipeError,
            "effective_rank/image has no better and worse",
        ),
        (["evaluate.tasks=[retrievel]"], DataError, "retrievel: no such task; there are"),
        (["evaluate.tasks=[chair]"], DataError, "chair: it needs a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_before_anything_is_loaded(
    world: Path, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(world, tmp_path / "out", "evaluate.every_steps=2", "model=not/there", *overrides)


def test_an_unknown_score_of_a_task_is_an_error_before_the_first_step(
    world: Path, tmp_path: Path
) -> None:
    overrides = (
        "evaluate.every_steps=2",
        "evaluate.tasks=[scenes-retrieval]",
        "evaluate.tasks_limit=4",
        "checkpoint.best=scenes-retrieval/image_to_text_recall@2",
    )
    with pytest.raises(RecipeError, match=r"did you mean scenes-retrieval/image_to_text_recall@"):
        run(world, tmp_path / "out", *overrides)
    assert (tmp_path / "out" / "log.jsonl").read_text() == ""


def test_an_overlap_with_the_training_data_is_said_with_its_count(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the file, and by name and text where the files were copied."""
    records = json.loads((world / "scenes" / "captions.json").read_text())
    run(world, tmp_path / "same", *EVALUATE, "schedule.steps=1")
    assert "captions.json: 8 of 8 examples show what the training data show" in caplog.text
    caplog.clear()
    copy = tmp_path / "copy"
    (copy / "images").mkdir(parents=True)
    for record in records[:6]:
        target = copy / record["image"]
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes((world / "scenes" / record["image"]).read_bytes())
    for record in records[:2]:
        record["conversations"][1]["value"] += " Indeed."
    (copy / "captions.json").write_text(json.dumps(records[:6]))
    data = f"evaluate.data.path={copy}/captions.json"
    run(world, tmp_path / "copied", *EVALUATE, data, "schedule.steps=1")
    assert "captions.json: 4 of 6 examples show what the training data show" in caplog.text


def test_a_broken_held_out_image_is_left_out_and_said_once(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = json.loads((world / "scenes" / "captions.json").read_text())[:5]
    for record in records:
        record["image"] = str(world / "scenes" / record["image"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    records[2]["image"] = str(broken)
    (tmp_path / "held.json").write_text(json.dumps(records))
    data = (f"evaluate.data.path={tmp_path}/held.json", "evaluate.data.image_root=/")
    run(world, tmp_path / "out", *EVALUATE, *data, "evaluate.samples=0", "schedule.steps=2")
    assert caplog.text.count("1 held-out examples cannot be used") == 1
    recalls = [r.scores["image_to_text_recall@1"] for r in evaluations(tmp_path / "out")]
    assert all(np.isclose(4 * recall, round(4 * recall)) for recall in recalls)


def test_an_evaluation_that_fails_later_leaves_the_state(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CAFe.generate
    calls = 0

    def fails_later(self: CAFe, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("no memory is left")
        return original(self, *args, **options)

    monkeypatch.setattr(CAFe, "generate", fails_later)
    with pytest.raises(TrainingError, match="stopped in the evaluation after step 2 by Runtime"):
        run(world, tmp_path / "out", *EVALUATE, "checkpoint.every_steps=null")
    assert (tmp_path / "out" / "checkpoints" / "step-000002" / "manifest.json").is_file()


# ---------------------------------------------------------------------- other kinds of runs


def test_an_adapter_with_workers_does_not_notice_evaluations_by_the_clock(
    world: Path, tmp_path: Path
) -> None:
    """Dropout on the adapter's input, recomputed activations, and an evaluation at every step."""
    kind = ("tuning.kind=lora", "tuning.dropout=0.3", "gradient_checkpointing=true")
    kind += ("batch.workers=1", "schedule.steps=3")
    run(world, tmp_path / "plain", *kind)
    clock = ("evaluate.every_steps=null", "evaluate.every_minutes=1e-9")
    result = run(world, tmp_path / "evaluated", *EVALUATE, *clock, *kind)
    assert [record.step for record in evaluations(tmp_path / "evaluated")] == [0, 1, 2, 3]
    assert steps(tmp_path / "evaluated") == steps(tmp_path / "plain")
    name = "adapter_model.safetensors"
    ends = [load_file(tmp_path / out / "model" / name) for out in ("plain", "evaluated")]
    assert equal(*ends)
    assert (result.best_dir / name).is_file()


@pytest.mark.parametrize(
    ("measure", "smaller"),
    [
        ("language_loss", True),
        ("caption/caption_loss", True),
        ("uniformity/image", True),
        ("gap/modality_gap", True),
        ("scenes-chair/chair_i", True),
        ("scenes-match/match_ece", True),
        ("image_to_text_recall@1", False),
        ("scenes-pope/random/accuracy", False),
        ("captioning/cider_d", False),
    ],
)
def test_it_is_known_whether_a_smaller_value_is_better(measure: str, smaller: bool) -> None:
    assert smaller_is_better(measure) == smaller


def test_sides_that_are_not_an_image_and_a_text_are_called_query_and_target() -> None:
    """Two queries share a target, and one is there twice."""
    asked = [("a", "x"), ("b", "x"), ("c", "y"), ("c", "y")]
    examples = [Example(id=str(i), query=user(q), target=user(t)) for i, (q, t) in enumerate(asked)]
    query = np.array([[1, 0], [0.9, 0.1], [1, 0.1], [1, 0.1]])  # c is nearer to x
    target = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    scores = pair_scores(examples, query, target)
    assert list(scores) == measure_names(examples)
    assert scores["query_to_target_recall@1"] == pytest.approx(2 / 3)
    assert scores["target_to_query_recall@1"] == pytest.approx(1 / 2)  # b is nearest to y
    assert scores["target_to_query_recall@5"] == 1.0
    turned = [Example(id="0", query=user("a"), target=user(Image("0.png")))]
    assert side_names(turned) == ("text", "image")
    assert measure_names(turned)[0] == "image_to_text_recall@1"
