"""Evaluations while a run goes on: what they measure, and that training does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cafe
from cafe.errors import DataError, RecipeError, TrainingError
from cafe.model.vlm import CAFe
from cafe.training.log import EvaluationRecord, read_whole_log
from cafe.training.run import train
from cafe.training.saving import kept_step
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
    run(world, out, *EVALUATE, "evaluate.tasks=[scenes-retrieval]", "evaluate.tasks_limit=4")
    return out


def evaluations(out: Path) -> list[EvaluationRecord]:
    return read_whole_log(out / "log.jsonl").evaluations


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in without_times(out) if "loss" in line]


def test_training_does_not_notice_evaluations(plain: Path, evaluated: Path) -> None:
    assert [record.step for record in evaluations(evaluated)] == [0, 2, 4, 6]
    assert steps(evaluated) == steps(plain)
    assert equal(weights(evaluated), weights(plain))
