"""A contrastive loss from which nothing is learned is said, and only then."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.data.quarantine import Quarantine
from cafe.model.rows.rows import Rows
from cafe.training.contrastive import STALL_STEPS, StallDetector, no_negatives_warning
from cafe.training.data import load_data
from cafe.training.multi_vector import ReadEmbeddings
from cafe.training.run import train
from cafe.training.step import TrainingStep
from helpers.runs import make_world, recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def said(losses: list[float], pairs: int = 8) -> list[int]:
    """After which steps something is said."""
    stall = StallDetector(enabled=True)
    return [i for i, loss in enumerate(losses, 1) if stall.check(loss, pairs) is not None]


def test_a_loss_that_stays_at_chance_is_said_once() -> None:
    chance = math.log(8)
    assert said([chance] * 3 * STALL_STEPS) == [STALL_STEPS]
    assert said([chance * 1.01] * STALL_STEPS) == [STALL_STEPS]
    assert said([chance] * (STALL_STEPS - 1)) == []
    assert said([chance] * (STALL_STEPS - 1) + [2.0] + [chance] * (STALL_STEPS - 1)) == []
    assert said([chance + 0.1] * 3 * STALL_STEPS) == []
    assert said([1.5] * 3 * STALL_STEPS) == []
    assert said([0.0] * 3 * STALL_STEPS, pairs=1) == []


def test_what_is_not_watched_is_never_said() -> None:
    stall = StallDetector(enabled=False)
    assert all(stall.check(math.log(8), 8) is None for _ in range(2 * STALL_STEPS))


def test_a_run_whose_embeddings_are_all_alike_says_so(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cafe.training.contrastive.STALL_STEPS", 3)
    original = TrainingStep._embedded

    def alike(step: TrainingStep, hidden: torch.Tensor, rows: Rows) -> ReadEmbeddings:
        return ReadEmbeddings(original(step, hidden, rows).pooled * 0 + torch.ones(()))

    monkeypatch.setattr(TrainingStep, "_embedded", alike)
    train(recipe(world, tmp_path / "out"))
    assert caplog.text.count("the contrastive loss has stayed at ln(4) = 1.39") == 1
    assert "optimizer.learning_rate" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["batch.examples=1"], True),
        (["batch.examples=2"], False),
        (["batch.examples=1", "objective.contrastive_weight=0"], False),
        (["batch.examples=1", "objective.contrastive=sigmoid"], False),
    ],
)
def test_a_batch_without_a_negative_is_said_before_it_begins(
    world: Path, tmp_path: Path, overrides: list[str], expected: bool
) -> None:
    wanted = recipe(world, tmp_path / "out", *overrides)
    warning = no_negatives_warning(wanted, load_data(wanted, Quarantine()))
    assert (warning is not None) == expected


def test_hard_negatives_are_enough_to_contrast_with(world: Path, tmp_path: Path) -> None:
    wanted = recipe(world, tmp_path / "out", "batch.examples=1")
    data = load_data(wanted, Quarantine())
    first = data.examples[0]
    assert first.target is not None
    negative = dataclasses.replace(first, negatives=(first.target,))
    examples = ExampleSet.build([ExampleSource("one", [negative])])
    assert no_negatives_warning(wanted, dataclasses.replace(data, examples=examples)) is None


def test_the_run_says_it_and_its_contrastive_loss_is_0(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("batch.examples=1", "schedule.steps=2")
    records = train(recipe(world, tmp_path / "out", *settings)).records
    assert [record.contrastive for record in records] == [0.0, 0.0]
    assert caplog.text.count("batch.examples is 1, so no pair has another one") == 1
