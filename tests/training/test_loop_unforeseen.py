"""An error that nobody foresaw ends the run at once: the state saved, and how to go on said."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.errors import TrainingError
from cafe.model.rows.collate import Collator
from cafe.training.checkpoints import complete
from cafe.training.run import train
from cafe.training.step import TrainingStep
from cafe.training.stopping import likely_cause
from cafe.training.workers import while_alive
from helpers.runs import equal, make_world, recipe, recipe_file, weights, without_times

CAFE = str(Path(sys.executable).with_name("cafe"))
END_SECONDS = 60
START_SECONDS = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.2)


def steps_saved(out: Path) -> list[int]:
    return [step for step, _ in complete(out / "checkpoints")]


def break_step(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """The step fails after it has drawn random numbers and made gradients."""
    original, calls = TrainingStep.__call__, []

    def failing(self: TrainingStep, chunks: Any) -> Any:
        numbers = original(self, chunks)
        calls.append(number)
        if len(calls) == number:
            raise error
        return numbers

    monkeypatch.setattr(TrainingStep, "__call__", failing)


@pytest.mark.slow
def test_the_state_before_the_step_is_saved_and_the_run_goes_on_as_if_never_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(recipe(world, tmp_path / "never"))
    with monkeypatch.context() as patched:
        break_step(patched, 6, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2"))
        with pytest.raises(TrainingError) as stopped:
            train(recipe(world, out))
    text = str(stopped.value)
    assert text.startswith("stopped in step 6 of 8 by OutOfMemoryError: CUDA out of memory. Tried")
    assert "Likely cause: the batch does not fit in the device's memory; lower batch.chunk" in text
    assert f"The state after step 5 is saved in {out}/checkpoints. Resume with: " in text
    assert text.endswith(f"Resume with: cafe train {out}/recipe.yaml --resume")
    assert steps_saved(out) == [4, 5]
    train(recipe(world, out), resume=True)
    assert without_times(out) == without_times(tmp_path / "never")
    assert equal(weights(out), weights(tmp_path / "never"))


def test_a_state_on_its_way_to_the_next_is_not_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original, calls = torch.optim.AdamW.step, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(original(self, *args, **kwargs))
        if len(calls) == 4:
            raise ValueError("half way")

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(TrainingError, match=r"step 4 of 8 by ValueError: half way\. .*step 2 is"):
        train(recipe(world, out))
    assert steps_saved(out) == [2]


def test_before_the_first_step_there_is_nothing_to_save(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, 1, ValueError("at once"))
    with pytest.raises(
        TrainingError, match=r"no checkpoint yet, so this starts from the beginning\."
    ):
        train(recipe(world, tmp_path / "out"))
    assert steps_saved(tmp_path / "out") == []


def test_what_a_worker_cannot_do_is_told_in_one_line_and_no_worker_is_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a chat template that refuses a record."""

    def refusing(self: Collator, examples: Any) -> Any:
        raise LookupError("Conversation roles must alternate")

    monkeypatch.setattr(Collator, "__call__", refusing)
    with pytest.raises(TrainingError) as stopped:
        train(recipe(world, tmp_path / "out", "batch.workers=1"))
    assert "step 1 of 8 by LookupError: Conversation roles must alternate. " in str(stopped.value)
    assert "Traceback" not in str(stopped.value)
    assert multiprocessing.active_children() == []


def test_what_on_step_raises_comes_as_it_is(world: Path, tmp_path: Path) -> None:
    def on_step(_: object) -> None:
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="the caller's own"):
        train(recipe(world, tmp_path / "out", "batch.workers=1"), on_step=on_step)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (RuntimeError("a data worker ended (exit code -9)"), "lower batch.workers"),
        (RuntimeError("unable to write to shared memory"), "set batch.workers: 0"),
        (MemoryError(), "lower batch.workers or batch.chunk"),
        (RuntimeError("CUDA out of memory"), "gradient_checkpointing: true"),
        (KeyError("x"), "CAFE_DEBUG=1 shows the traceback"),
    ],
)
def test_the_likely_cause_says_what_helps(error: Exception, helps: str) -> None:
    assert helps in likely_cause(error)


# ---------------------------------------------------------------------- a real process


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_within_a_minute_saved(tmp_path: Path) -> None:
    world, out = make_world(tmp_path), tmp_path / "out"
    settings = ("batch.workers=2", "schedule.steps=4000", "checkpoint.every_steps=3000")
    process = subprocess.Popen(
        [CAFE, "train", str(recipe_file(world, out)), *settings],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log, deadline = out / "log.jsonl", time.monotonic() + START_SECONDS
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(child) for task in tasks for child in task.read_text().split()]
    assert len(workers) >= 2
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 2
    assert "Traceback" not in errors
    told = errors.strip().splitlines()[-1]
    assert told.startswith("error: stopped in step ")
    assert "the system killed a data worker because memory (or /dev/shm) was full" in told
    assert told.endswith(f"Resume with: cafe train {out}/recipe.yaml --resume")
    assert steps_saved(out) == [len(log.read_text().splitlines())]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def _die_later() -> None:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


class _LosesItsConnection:
    """What torch's loader does when a worker dies while it sends: the socket closes first."""

    def __init__(self) -> None:
        self._workers = [multiprocessing.get_context("fork").Process(target=_die_later)]
        self._workers[0].start()

    def __iter__(self) -> Iterator[None]:
        yield None
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_connection_that_is_lost_before_its_worker_is_seen_dead_names_the_worker() -> None:
    items = while_alive(_LosesItsConnection())
    next(items)
    with pytest.raises(RuntimeError, match=r"a data worker ended \(exit code -9\)"):
        next(items)
