"""A whole run on two processes (gloo, CPU) is the run on one, its log included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cafe.training.run import train
from cafe.training.saving import kept_step
from helpers.processes import free_port
from helpers.runs import make_world, moved, one_thread, recipe, recipe_file, weights, without_times

CAFE = str(Path(sys.executable).with_name("cafe"))
OVERRIDES = (
    *("batch.examples=5", "batch.chunk=1", "schedule.steps=3"),  # 2 and 3 chunks
    *("evaluate.every_steps=2", "evaluate.held_out=9", "checkpoint.best=language_loss"),
    *("evaluate.tasks=[scenes-retrieval]", "evaluate.tasks_limit=5", "evaluate.samples=1"),
)
TIMEOUT_SECONDS = 200


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with one_thread():
        train(recipe(world, tmp_path / "one", *OVERRIDES))
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    command = [CAFE, "train", str(recipe_file(world, tmp_path / "two")), *OVERRIDES]
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, errors
    for one, two in zip(
        without_times(tmp_path / "one"), without_times(tmp_path / "two"), strict=True
    ):
        assert two.pop("samples", None) == one.pop("samples", None)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert kept_step(tmp_path / "one" / "best") == kept_step(tmp_path / "two" / "best") == 3
    base, one, two = (weights(folder) for folder in (world, tmp_path / "one", tmp_path / "two"))
    assert moved(base, one, "") > 1e-3
    assert moved(one, two, "") < 1e-4  # sums in another order, through three steps of Adam
