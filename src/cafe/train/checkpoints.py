"""The state of a run on disk: written whole or not at all, and read back bit for bit.

output_dir/checkpoints/step-000123/
    weights.safetensors   the model's parameters, fp32; tied ones once
    optimizer.pt          AdamW's moments
    state.pt              what the contrast learns, and each rank's random state
    manifest.json         written last: {"step": 123, "files": {name: bytes}, "data": {...}}

A checkpoint is written to a temporary sibling, synced to disk and renamed. A run that is killed
at any moment leaves complete checkpoints, and at most one temporary that nobody reads.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from cafe.errors import CheckpointError, TrainingError
from cafe.train.contrast import Contrast
from cafe.train.distributed import any_rank, rank, world_size

WEIGHTS, OPTIMIZER, STATE, MANIFEST = (
    "weights.safetensors",
    "optimizer.pt",
    "state.pt",
    "manifest.json",
)
UNFINISHED = ".tmp-"

# What a failed write raises: Python, safetensors and torch each have their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that changes from step to step, besides the step's number."""

    model: nn.Module
    contrast: Contrast
    optimizer: Optimizer
    device: torch.device


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run.

    folder   output_dir/checkpoints
    keep     how many of the newest stay
    data     what decides which examples a step has; a resumed run must have the same
    """

    folder: Path
    keep: int
    data: dict[str, Any]

    def save(self, state: TrainingState, step: int) -> Path:
        """Write the state after `step` steps; all ranks call this together.

        Raises TrainingError on all ranks when it cannot be written; older ones are then as before.
        """
        target = self.folder / f"step-{step:06d}"
        streams = gather_object([random_state(state.device)])
        failure: Exception | None = None
        if rank() == 0:
            try:
                with whole_directory(target) as unfinished:
                    self._write(state, step, streams, unfinished)
                self._prune()
            except WRITE_ERRORS as error:
                failure = error
        if any_rank(failure is not None, state.device):
            raise TrainingError(self._complaint(target, step, failure)) from failure
        return target

    def _write(
        self, state: TrainingState, step: int, streams: list[dict[str, Any]], folder: Path
    ) -> None:
        save_file(weights_of(state.model), folder / WEIGHTS)
        with (folder / OPTIMIZER).open("wb") as file:
            torch.save(state.optimizer.state_dict(), file)
        rest = {"contrast": state.contrast.state_dict(), "random": streams}
        with (folder / STATE).open("wb") as file:
            torch.save(rest, file)
        sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS, OPTIMIZER, STATE)}
        manifest = {"step": step, "files": sizes, "data": self.data}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _prune(self) -> None:
        for _, old in complete(self.folder)[: -self.keep]:
            # Renamed first: a half-deleted directory must not look like a checkpoint.
            doomed = old.with_name(UNFINISHED + old.name)
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed)

    def _complaint(self, target: Path, step: int, failure: Exception | None) -> str:
        done = complete(self.folder)
        good = f"the last good one is {done[-1][1].name}" if done else "there is none before it"
        reason = "another rank failed" if failure is None else " ".join(str(failure).split())
        return (
            f"step {step}: the checkpoint {target} cannot be written ({reason}); {good}. "
            "Free space on that disk, then go on with --resume"
        )

    def restore(self, state: TrainingState) -> int:
        """Load the newest complete checkpoint into `state`; returns its step, 0 without one.

        Raises CheckpointError when it is of another run's model or data.
        """
        done = complete(self.folder)
        if not done:
            return 0
        step, folder = done[-1]
        self._check_data(folder)
        try:
            load_weights(state.model, load_file(folder / WEIGHTS, device=str(state.device)))
            moments = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
            rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            load_moments(state.optimizer, moments)
            state.contrast.load_state_dict(rest["contrast"])
        except (*WRITE_ERRORS, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{folder}: does not fit this recipe ({reason}); resume with the recipe that "
                "wrote it, or give this one another output_dir"
            ) from error
        if len(rest["random"]) == world_size():
            set_random_state(rest["random"][rank()], state.device)
        return step

    def _check_data(self, folder: Path) -> None:
        """The same examples in the same order, or the resumed run would repeat and skip some."""
        then = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["data"]
        changed = [key for key in self.data if then.get(key) != self.data[key]]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{folder}: {key} was {then.get(key)} and is now {self.data[key]}, so the order of "
                "the examples is another; restore the recipe and the data, or start anew in "
                "another output_dir"
            )


# ---------------------------------------------------------------------- directories


def complete(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints below `folder`, oldest first, with their steps."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and _is_complete(path):
            found.append((int(match[1]), path))
    return sorted(found)


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    done = complete(output_dir / "checkpoints")
    return done[-1][1] if done else None


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it becomes `target` when the block ends well, else it goes.

    A directory that is already at `target` is replaced.
    """
    unfinished = target.with_name(UNFINISHED + target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        replaced = target.with_name(f"{UNFINISHED}{target.name}-replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the kernel put a file, or a directory's entries, on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- contents


def _aliases(model: nn.Module) -> set[str]:
    """Further names of tied parameters."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; a tied parameter has its first name only."""
    aliases = _aliases(model)
    return {k: v.contiguous() for k, v in model.state_dict().items() if k not in aliases}


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what `weights_of` took. Raises RuntimeError when they are another model's."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [*unexpected, *(set(missing) - _aliases(model))]
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights do not match, the first is {wrong[0]!r}")


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put back what AdamW remembers; its rates and decay stay those of the recipe at hand.

    Raises ValueError when the groups are others, as they are when other parts are frozen.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    then, now = (
        [group["name"] for group in groups] for groups in (state["param_groups"], settings)
    )
    if then != now:
        raise ValueError(f"it trained {', '.join(then)}; the recipe trains {', '.join(now)}")
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def random_state(device: torch.device) -> dict[str, Any]:
    """Every stream of random numbers that a step might draw from, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "accelerator": accelerator,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from a state that `random_state` took."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["accelerator"] is not None:
        torch.cuda.set_rng_state(state["accelerator"], device)
