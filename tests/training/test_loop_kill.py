"""Real `cafe train` processes, killed by the system, and the command that resumes them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafe.training.checkpoints import complete
from cafe.training.run import train
from helpers.processes import PATIENCE_SECONDS, wait_while_running
from helpers.runs import equal, make_world, one_thread, recipe, recipe_file, weights, without_times

CAFE = str(Path(sys.executable).with_name("cafe"))
OVERRIDES = (
    "schedule.steps=24",
    "checkpoint.every_steps=3",
    "batch.workers=1",
    "optimizer.weight_decay=0.1",
)


def start(*arguments: str) -> subprocess.Popen[str]:
    """`cafe train …` in a process of its own, on one thread."""
    return subprocess.Popen(
        [CAFE, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def steps_logged(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def last_saved(out: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return max((step for step, _ in complete(out / "checkpoints")), default=0)


def kill_during_a_save(process: subprocess.Popen[str], checkpoints: Path) -> list[str]:
    """Stop the process when a half-written checkpoint is seen; kill it if it still is half."""

    def half() -> list[Path]:
        return [path for path in checkpoints.glob(".tmp-step-*") if path.exists()]

    while True:
        wait_while_running(process, lambda: bool(half()))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)  # until the signal has reached every thread
        left = half()
        if left:
            kill(process)
            return [path.name for path in left]
        process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_run_killed_between_and_during_saves_and_terminated_ends_as_one_never_killed(
    tmp_path: Path,
) -> None:
    world = make_world(tmp_path, dropout=0.2)
    with one_thread():
        train(recipe(world, tmp_path / "never", *OVERRIDES))
    out = tmp_path / "killed"
    arguments = (str(recipe_file(world, out)), *OVERRIDES)

    process = start(*arguments)
    wait_while_running(process, lambda: steps_logged(out) >= 4)
    kill(process)  # between two checkpoints: the steps after the last are lost
    assert last_saved(out) < 24

    process = start(*arguments, "--resume")
    wait_while_running(process, lambda: last_saved(out) > 0)
    half = kill_during_a_save(process, out / "checkpoints")
    saved = [step for step, _ in complete(out / "checkpoints")]
    assert half, "there was no save to interrupt"
    assert saved
    assert f".tmp-step-{saved[-1]:06d}" not in half  # what is complete is not what was half

    process = start(*arguments, "--resume")
    wait_while_running(process, lambda: last_saved(out) > saved[-1])
    assert last_saved(out) < 24
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143, errors
    told = errors.strip().splitlines()[-1]
    assert "stopped by SIGTERM after step" in told
    command = shlex.split(told.partition("Resume with: ")[2])
    assert command[0:2] == ["cafe", "train"]
    assert command[-1] == "--resume"

    process = start(*command[2:])
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert without_times(out) == without_times(tmp_path / "never")
    assert equal(weights(out), weights(tmp_path / "never"))
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_workers_too_and_still_saves(tmp_path: Path) -> None:
    """A terminal sends the signal to the whole process group."""
    world, out = make_world(tmp_path), tmp_path / "out"
    process = subprocess.Popen(
        [CAFE, "train", str(recipe_file(world, out)), "batch.workers=1", "schedule.steps=400"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_while_running(process, lambda: steps_logged(out) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped by Ctrl-C after step" in errors
    assert steps_logged(out) == last_saved(out) < 400
