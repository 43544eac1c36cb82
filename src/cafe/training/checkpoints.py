"""The state of a run on disk: written completely or not at all, and restored bit for bit.

output_dir/checkpoints/step-000123/
    weights.safetensors   the model's parameters, fp32, tied ones once; with an adapter only what
                          is trained
    optimizer.pt          AdamW's moments
    pieces/               in place of these two, in a sharded run: each rank's shards of them
    state.pt              parameters of the contrastive loss, each rank's random state, the
                          fingerprint of the base's weights
    manifest.json         written last: {"step": 123, "files": {name: bytes}, "data": {...},
                          "origin": {...}, "precision": "bf16", "trained": {...}}

Runs on any number of processes, sharded or not, read both kinds.

A checkpoint is written to a temporary sibling, synced to disk and renamed. A run that is killed
at any moment leaves complete checkpoints, and at most one temporary directory, which is ignored.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cafe.errors import CheckpointError, TrainingError
from cafe.files import UNFINISHED, unfinished_name, whole_directory
from cafe.model.checkpoint.adapter import adapter_of
from cafe.precision import ComputePrecision
from cafe.training.distributed import any_rank, rank, world_size
from cafe.training.sharding import save_sharded
from cafe.training.state import (
    TrainingState,
    load_moments,
    load_weights,
    random_state,
    restore_sharded,
    set_random_state,
    sharded_tensors,
    weights_of,
)

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"
SHARDS, STATE, MANIFEST = "pieces", "state.pt", "manifest.json"

# What a failed write raises: Python, safetensors and torch each have their own errors.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run.

    folder   output_dir/checkpoints
    keep     number of newest checkpoints that are kept
    data     settings that decide which examples a step has; a resumed run must have the same
    origin   fingerprints of what the run started from, by name; a resumed run must have the same
    precision   of the forward passes; a resumed run may have another one, with a warning
    trained  settings that decide which weights are trained; a resumed run must have the same
    """

    folder: Path
    keep: int
    data: dict[str, Any]
    origin: dict[str, str] = field(default_factory=dict)
    precision: ComputePrecision = "fp32"
    trained: dict[str, Any] = field(default_factory=dict)

    def save(self, state: TrainingState, step: int) -> Path:
        """Write the state after `step` steps. A collective of all ranks.

        Returns:
            The new checkpoint's directory.

        Raises:
            TrainingError: On all ranks, when it cannot be written; older ones are unchanged.
        """
        target = self.folder / f"step-{step:06d}"
        streams = gather_object([random_state(state.device)])
        moments = state.optimizer.state_dict()  # on all ranks, as they may be gathered
        failure: Exception | None = None
        try:
            with self._unfinished(target, state) as unfinished:
                if state.sharded:
                    save_sharded(sharded_tensors(state), unfinished / SHARDS)
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
        """The directory that will become `target`; rank 0 creates and completes it.

        Where all ranks write, they enter together once it exists, or all raise OSError.
        """
        failure: OSError | None = None
        with ExitStack() as stack:
            if rank() == 0:
                try:
                    stack.enter_context(whole_directory(target))
                except OSError as error:
                    failure = error
            if state.sharded and any_rank(failure is not None, state.device):
                raise failure or OSError("rank 0 cannot create the directory")
            if failure is not None:
                raise failure
            yield unfinished_name(target)

    def _write(
        self,
        state: TrainingState,
        moments: dict[str, Any],
        step: int,
        streams: list[dict[str, Any]],
        folder: Path,
    ) -> None:
        """Write rank 0's files, the manifest last."""
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
        manifest = {
            "step": step,
            "files": sizes,
            "data": self.data,
            "origin": self.origin,
            "precision": self.precision,
            "trained": self.trained,
        }
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
        good = f"the last good one is {done[-1][1].name}" if done else "there is no earlier one"
        reason = "another rank failed" if failure is None else " ".join(str(failure).split())
        return (
            f"step {step}: the checkpoint {target} cannot be written ({reason}); {good}. "
            "Free space on that disk, then resume with --resume"
        )

    def restore(self, state: TrainingState) -> int:
        """Load the newest complete checkpoint into `state`.

        Returns:
            Its step; 0 if there is no checkpoint.

        Raises:
            CheckpointError: It belongs to a run with another model or other data.
        """
        done = complete(self.folder)
        if not done:
            return 0
        step, folder = done[-1]
        self._check_settings(folder)
        try:
            rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            # None: written by an earlier version, in a run without an adapter.
            if rest.get("base") not in (None, state.base):
                which = "under the adapter" if adapter_of(state.model) else "that it started from"
                raise ValueError(f"the model {which} is a different one")
            if (folder / SHARDS).is_dir():
                restore_sharded(state, folder / SHARDS, rest["groups"])
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

    def _check_settings(self, folder: Path) -> None:
        """Check that the run continues with the same examples, in the same order, and weights."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        origin = manifest.get("origin", self.origin)
        trained = manifest.get("trained", self.trained)  # earlier versions did not keep it
        order = "changes the order of the examples; restore the recipe and the data"
        for before, now, effect in (
            (trained, self.trained, "changes what is trained; set it back"),
            (manifest["data"], self.data, order),
        ):
            # A setting that is off is not there: removed ones count, too.
            changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
            if changed:
                key = changed[0]
                raise CheckpointError(
                    f"{folder}: {key} was {_as_yaml(before.get(key))} and is now "
                    f"{_as_yaml(now.get(key))}, which {effect}, or start a new run in another "
                    "output_dir"
                )
        different = [name for name, value in self.origin.items() if origin.get(name) != value]
        if different:
            raise CheckpointError(
                f"{folder}: does not fit this recipe ({different[0]} is not what this run started "
                "with); restore it, or give this one another output_dir"
            )

    def doubts(self) -> list[str]:
        """Warnings about resuming from the newest checkpoint; none without one."""
        checkpoints = complete(self.folder)
        if not checkpoints:
            return []
        newest = checkpoints[-1][1]
        manifest = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))
        found = []
        if "origin" not in manifest:
            found.append(
                f"warning: {newest} was written before fingerprints of data and base model were "
                "kept; that they are still the same is not checked"
            )
        before = manifest.get("precision", self.precision)  # earlier versions did not keep it
        if before != self.precision:
            found.append(
                f"warning: {newest} was trained in {before}, and this run continues in "
                f"{self.precision}, so its numbers differ slightly from those of an uninterrupted "
                f"run; set precision={before} for the same"
            )
        return found


def _as_yaml(value: Any) -> str:
    """A setting as a recipe writes it: null, true, [q_proj, v_proj]."""
    return json.dumps(value).replace('"', "")


# ---------------------------------------------------------------------- directories


def complete(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints below `folder`, oldest first, with their steps."""
    checkpoints = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and _is_complete(path):
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def clean(folder: Path) -> None:
    """Remove the half-written directories of a killed run."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
