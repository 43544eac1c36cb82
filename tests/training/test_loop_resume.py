"""A run that stopped anywhere and went on ends bit for bit as one that never stopped.

The model has dropout, so the random state counts; batches come from two passes over the data.
Runs end here by an exception in their own process; `test_loop_kill.py` kills real ones.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cafe.errors import CheckpointError, TrainingError
from cafe.recipes import Recipe, load_recipe
from cafe.training.checkpoints import complete
from cafe.training.run import train
from cafe.training.stopping import Interrupted
from helpers.runs import Killed, die_after, equal, make_world, recipe, weights, without_times

pytestmark = pytest.mark.slow  # every test trains

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
    monkeypatch.setattr("cafe.training.checkpoints.set_random_state", lambda *_: None)
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


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    done = complete(output_dir / "checkpoints")
    return done[-1][1] if done else None


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
        ("seed=3", "seed was 0 and is now 3, which changes the order of the examples"),
        ("batch.examples=8", "batch.examples was 4 and is now 8"),
        ("data.0.limit=16", r"the number of examples was \[32\] and is now \[16\]"),
        ("optimizer.freeze=[vision]", r"optimizer\.freeze was \[\] and is now \[vision\], which"),
        ("tuning.kind=lora", r"tuning\.kind was full and is now lora, which changes what is"),
        (
            "objective.contrastive=sigmoid",
            r"objective\.contrastive was info_nce and is now sigmoid",
        ),
        ("objective.learn_temperature=false", "learn_temperature was true and is now false"),
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


# ---------------------------------------------------------------------- other data, another base


def rewrite(world: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    file = world / "scenes" / "captions.json"
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))


def another_caption(records: list[dict[str, Any]]) -> None:
    records[20]["conversations"][1]["value"] = "something else"


def another_order(records: list[dict[str, Any]]) -> None:
    records[3], records[4] = records[4], records[3]


@pytest.mark.parametrize("change", [another_caption, another_order])
def test_other_data_of_the_same_size_is_refused(
    world: Path, uninterrupted: Path, tmp_path: Path, change: Any
) -> None:
    out = copied(uninterrupted, tmp_path)
    other = shutil.copytree(world, tmp_path / "other")
    rewrite(other, change)
    data = f"data.0.path={other}/scenes/captions.json"
    with pytest.raises(CheckpointError, match=r"the data of data\.0 is not what this run started"):
        train(long_recipe(world, out, data), resume=True)


def test_data_and_base_that_moved_are_the_same(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = copied(uninterrupted, tmp_path)
    other = shutil.copytree(world, tmp_path / "other")
    moved = (f"data.0.path={other}/scenes/captions.json", f"model={other}/model")
    train(long_recipe(world, out, *moved), resume=True)
    assert_same_end(out, uninterrupted)


def test_another_base_of_the_same_shapes_is_refused(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = copied(uninterrupted, tmp_path)
    base = shutil.copytree(world / "model", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the model that it started from is a different one"):
        train(long_recipe(world, out, f"model={base}"), resume=True)


def test_another_configuration_of_the_base_is_refused(
    world: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = copied(uninterrupted, tmp_path)
    base = shutil.copytree(world / "model", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the configuration of model is not what this run"):
        train(long_recipe(world, out, f"model={base}"), resume=True)


def test_a_run_without_fingerprints_goes_on_with_one_warning(
    world: Path, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As earlier versions wrote it."""
    out = copied(uninterrupted, tmp_path)
    shutil.rmtree(out / "checkpoints" / "step-000010")
    newest = latest(out)
    assert newest is not None
    state = torch.load(newest / "state.pt", weights_only=True)
    torch.save({**state, "base": None}, newest / "state.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["origin"], manifest["trained"]
    manifest["files"]["state.pt"] = (newest / "state.pt").stat().st_size
    (newest / "manifest.json").write_text(json.dumps(manifest))
    train(long_recipe(world, out), resume=True)
    assert caplog.text.count("that they are still the same is not checked") == 1
    assert_same_end(out, uninterrupted)
    caplog.clear()
    train(long_recipe(world, out), resume=True)
    assert "is not checked" not in caplog.text
