"""DeepSpeed's ZeRO on two CPU processes trains, saves and resumes what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cafe.errors import RecipeError
from cafe.training import deepspeed as zero
from cafe.training.run import train
from helpers.runs import make_world, moved, one_thread, recipe, recipe_file, weights, without_times

STEADY = (
    "batch.examples=5",
    "batch.chunk=1",  # 2 and 3 chunks on two processes
    "schedule.kind=constant",
    "schedule.warmup=0",
    "checkpoint.every_steps=2",
)
TIMEOUT_SECONDS = 250


def zero_run(stage: int, *arguments: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "cafe", "train", *arguments]
    told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    environment = {**os.environ, **told, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_zero_trains_and_resumes_what_one_process_trains(
    tmp_path: Path, first: int, then: int
) -> None:
    world = make_world(tmp_path)
    with one_thread():
        train(recipe(world, tmp_path / "one", *STEADY, "schedule.steps=4"))
    run = (str(recipe_file(world, tmp_path / "zero")), *STEADY)
    zero_run(first, *run, "schedule.steps=2")
    zero_run(then, *run, "schedule.steps=4", "--resume")
    for one, two in zip(
        without_times(tmp_path / "one"), without_times(tmp_path / "zero"), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-3)
    base, one, two = (weights(folder) for folder in (world, tmp_path / "one", tmp_path / "zero"))
    assert moved(base, one, "") > 1e-3
    assert moved(one, two, "") < 2e-4  # sums in another order, through a few steps of Adam


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("3", [], "cafe does not support ZeRO stage 3; choose stage 1 or 2, or sharding=fsdp"),
        ("2", ["sharding=fsdp"], "cafe does not support sharding=fsdp beside it"),
        ("2", ["objective.learn_temperature=true"], "loss that learns numbers of its own"),
        (None, [], "which is not installed; pip install deepspeed"),
    ],
)
def test_what_is_not_done_with_deepspeed_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str | None,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if stage is not None:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.setattr(zero, "find_spec", lambda _: stage)
    wanted = recipe(tmp_path, tmp_path / "out", *overrides)
    with pytest.raises(RecipeError, match=message):
        zero.zero_settings(wanted)
