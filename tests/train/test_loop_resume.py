"""A run that stopped anywhere and went on ends bit for bit as one that never stopped.

The model has dropout, so the random state counts; batches come from two passes over the data.
Runs end here by an exception in their own process; `test_loop_kill.py` kills real ones.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import Killed, die_after, equal, make_world, recipe, weights, without_times

from cafe.errors import CheckpointError, TrainingError
from cafe.recipes import Recipe, load_recipe
from cafe.train.checkpoints import complete, latest
from cafe.train.interrupt import Interrupted
from cafe.train.run import train

LENGTH = ("schedule.steps=10", "objective.learn_temperature=true")
WEIGHTS_LIMIT = 200_000  # bytes: below what the weights of the model take (0.9 MB)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.2)


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    train(long_recipe(world, out))
    return out


def long_recipe(world: Path, out: Path, *overrides: str) -> Recipe:
    return recipe(world, out, *LENGTH, *overrides)


def steps_saved(out: Path) -> list[int]:
    return [step for step, _ in complete(out / "checkpoints")]


def unfinished(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".tmp-*")]


def assert_same_end(out: Path, reference: Path) -> None:
    assert without_times(out) == without_times(reference)
    assert equal(weights(out), weights(reference))


def test_the_comparison_can_fail(world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Another seed draws another dropout and another order."""
    out = tmp_path / "out"
    train(long_recipe(world, out, "seed=1"))
    assert not equal(weights(out), weights(uninterrupted))


@pytest.mark.parametrize("died", [5, 9])
def test_resumed_is_as_never_stopped(
    world: Path, uninterrupted: Path, tmp_path: Path, died: int
) -> None:
    """The steps after the last checkpoint are done again; step 9 is in the second epoch."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(long_recipe(world, out), on_step=die_after(died))
    assert steps_saved(out) == [died - 3, died - 1]
    assert len(without_times(out)) == died
    again: list[int] = []
    train(long_recipe(world, out), resume=True, on_step=lambda record: again.append(record.step))
    assert again == list(range(died, 11))
    assert_same_end(out, uninterrupted)


def test_without_the_random_state_the_end_is_another(
    world: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(long_recipe(world, out), on_step=die_after(5))
    monkeypatch.setattr("cafe.train.checkpoints.set_random_state", lambda *_: None)
    train(long_recipe(world, out), resume=True)
    assert not equal(weights(out), weights(uninterrupted))


def test_workers_change_nothing(world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(long_recipe(world, out, "batch.workers=1"), on_step=die_after(5))
    train(long_recipe(world, out), resume=True)
    assert_same_end(out, uninterrupted)


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    world: Path, uninterrupted: Path, tmp_path: Path, number: int, name: str, code: int
) -> None:
    out = tmp_path / "out"
    before = signal.getsignal(number)

    def send(record: object) -> None:
        if getattr(record, "step", 0) == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        train(long_recipe(world, out), on_step=send)
    assert stopped.value.exit_code == code
    text = str(stopped.value)
    assert f"stopped by {name} after step 3 of 10" in text
    assert text.endswith(f"cafe train {out}/recipe.yaml --resume")
    assert steps_saved(out) == [2, 3]
    assert signal.getsignal(number) == before
    train(long_recipe(world, out), resume=True)
    assert_same_end(out, uninterrupted)


def test_resume_without_a_checkpoint_begins(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(long_recipe(world, out), on_step=die_after(1))
    assert steps_saved(out) == []
    train(long_recipe(world, out), resume=True)
    assert_same_end(out, uninterrupted)


def test_resume_after_the_end_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    again: list[int] = []
    finished = load_recipe(out / "recipe.yaml", [f"output_dir={out}"])
    result = train(finished, resume=True, on_step=lambda record: again.append(record.step))
    assert again == []
    assert len(result.records) == 10
    assert_same_end(out, uninterrupted)


# ---------------------------------------------------------------------- a full disk


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond the limit; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WEIGHTS_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(long_recipe(world, out), on_step=die_after(3))
    with full_disk(), pytest.raises(TrainingError) as stopped:
        train(long_recipe(world, out), resume=True)
    text = str(stopped.value)
    assert text.startswith(
        f"step 4: the checkpoint {out}/checkpoints/step-000004 cannot be written"
    )
    assert "File too large" in text
    assert "the last good one is step-000002. Free space on that disk" in text
    assert steps_saved(out) == [2]
    assert unfinished(out) == []
    train(long_recipe(world, out), resume=True)
    assert_same_end(out, uninterrupted)


# ---------------------------------------------------------------------- which checkpoint


def copied(uninterrupted: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    assert steps_saved(out) == [8, 10]
    return out


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "optimizer.pt"])
def test_an_incomplete_checkpoint_is_no_checkpoint(
    uninterrupted: Path, tmp_path: Path, name: str
) -> None:
    out = copied(uninterrupted, tmp_path)
    newest = latest(out)
    assert newest is not None
    assert newest.name == "step-000010"
    file = newest / name
    file.write_bytes(file.read_bytes()[:-10])
    assert latest(out) == out / "checkpoints" / "step-000008"
    file.unlink()
    assert latest(out) == out / "checkpoints" / "step-000008"


def test_no_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed was 0 and is now 3, so the order of the examples is another"),
        ("batch.examples=8", "batch.examples was 4 and is now 8"),
        ("data.0.limit=16", r"the number of examples was \[32\] and is now \[16\]"),
        ("optimizer.freeze=[vision]", "it trained vision, .*; the recipe trains projector, "),
        ("model={other}", "does not fit this recipe"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    world: Path, uninterrupted: Path, tmp_path: Path, override: str, message: str
) -> None:
    out = copied(uninterrupted, tmp_path)
    if "{other}" in override:
        make_world(tmp_path / "wide", language_width=128)
        override = override.format(other=tmp_path / "wide" / "model")
    with pytest.raises(CheckpointError, match=message):
        train(long_recipe(world, out, override), resume=True)


def test_a_longer_schedule_and_another_rate_are_followed(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = copied(uninterrupted, tmp_path)
    changed = ("schedule.steps=12", "schedule.kind=constant", "optimizer.learning_rate=2e-4")
    records = train(long_recipe(world, out, *changed), resume=True).records
    assert [record.step for record in records] == list(range(1, 13))
    assert [record.learning_rate for record in records[-2:]] == [2e-4, 2e-4]
