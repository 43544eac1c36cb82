"""The state of a run on disk: written whole or not at all, and read back bit for bit.

output_dir/checkpoints/step-000123/
    weights.safetensors   the model's parameters, fp32, tied ones once; with an adapter only what
                          learns
    optimizer.pt          AdamW's moments
    pieces/               instead of these two, of a sharded run: each rank's own part of them
    state.pt              what the contrast learns, each rank's random state, with an adapter the
                          base's fingerprint
    manifest.json         written last: {"step": 123, "files": {name: bytes}, "data": {...}}

Pieces and whole files are read by runs on any number of processes, sharded or not.

A checkpoint is written to a temporary sibling, synced to disk and renamed. A run that is killed
at any moment leaves complete checkpoints, and at most one temporary that nobody reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cafe.errors import CheckpointError, TrainingError
from cafe.train.distributed import any_rank, rank, world_size
from cafe.train.sharding import save_pieces
from cafe.train.state import (
    TrainingState,
    load_moments,
    load_weights,
    pieces_of,
    random_state,
    restore_pieces,
    set_random_state,
    weights_of,
)

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"
PIECES, STATE, MANIFEST = "pieces", "state.pt", "manifest.json"
UNFINISHED = ".tmp-"

# What a failed write raises: Python, safetensors and torch each have their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


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
        moments = state.optimizer.state_dict()  # on all ranks: they may have to be gathered
        failure: Exception | None = None
        try:
            with self._unfinished(target, state) as unfinished:
                if state.sharded:
                    save_pieces(pieces_of(state), unfinished / PIECES)
                if rank() == 0:
                    self._write(state, moments, step, streams, unfinished)
            if rank() == 0:
                self._prune()
        except WRITE_ERRORS as error:
            failure = error
        if any_rank(failure is not None, state.device):
            raise TrainingError(self._complaint(target, step, failure)) from failure
        return target

    @contextmanager
    def _unfinished(self, target: Path, state: TrainingState) -> Iterator[Path]:
        """The directory that is to become `target`: rank 0's to make and to complete.

        Where all ranks write, they enter together, once it is there, or all raise OSError.
        """
        failure: OSError | None = None
        with ExitStack() as stack:
            if rank() == 0:
                try:
                    stack.enter_context(whole_directory(target))
                except OSError as error:
                    failure = error
            if state.sharded and any_rank(failure is not None, state.device):
                raise failure or OSError("rank 0 cannot make the directory")
            if failure is not None:
                raise failure
            yield _unfinished_name(target)

    def _write(
        self,
        state: TrainingState,
        moments: dict[str, Any],
        step: int,
        streams: list[dict[str, Any]],
        folder: Path,
    ) -> None:
        """What rank 0 writes; the manifest is last."""
        rest = {"contrast": state.contrast.state_dict(), "random": streams, "base": state.base}
        if state.sharded:
            rest["groups"] = moments["param_groups"]
        else:
            save_file(weights_of(state.model), folder / WEIGHTS)
            with (folder / OPTIMIZER).open("wb") as file:
                torch.save(moments, file)
        with (folder / STATE).open("wb") as file:
            torch.save(rest, file)
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
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
            rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if rest.get("base") != state.base:
                raise ValueError("the model beneath the adapter is another")
            if (folder / PIECES).is_dir():
                restore_pieces(state, folder / PIECES, rest["groups"])
            else:
                load_weights(state.model, load_file(folder / WEIGHTS))
                moments = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
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


def _unfinished_name(target: Path) -> Path:
    return target.with_name(UNFINISHED + target.name)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it becomes `target` when the block ends well, else it goes.

    A directory that is already at `target` is replaced.
    """
    unfinished = _unfinished_name(target)
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
