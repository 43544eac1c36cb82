"""`cafe plan`: what a run holds on each GPU, whether that can fit, and what other settings hold.

Everything here is counted, nothing is estimated: weights, gradients and AdamW's moments, which a
run holds from its first step to its last. A step needs more on top (activations, logits, copies of
weights in bf16); `cafe train --dry-run` measures that on the machine at hand. So a run that cannot
fit by this count never fits, and one that can may still need smaller chunks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cafe.errors import RecipeError
from cafe.planning.counts import HeldMemory, held_memory
from cafe.planning.gpus import GPU, find_gpu
from cafe.recipes import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """Another setting of the recipe, as an override, and what each process then holds."""

    change: str
    held: HeldMemory


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run holds.

    held     by each process
    gpu      of each process; None: not named
    changes  settings that the recipe does not have yet, and what they hold
    """

    held: HeldMemory
    gpu: GPU | None
    changes: tuple[PlannedChange, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the GPU has more memory than is held all the time; None: no GPU was named."""
        return None if self.gpu is None else self.held.total < self.gpu.memory_bytes

    def json(self) -> str:
        """As JSON; sizes are in bytes, of one process."""
        changes = [{"change": x.change, "held": _fields(x.held)} for x in self.changes]
        gpu = None if self.gpu is None else asdict(self.gpu)
        fields = {"held": _fields(self.held), "gpu": gpu, "fits": self.fits, "changes": changes}
        return json.dumps(fields, indent=2)

    def __str__(self) -> str:
        """The tables that `cafe plan` prints."""
        width = max(len(part) for part in self.held.parameters)
        lines = [f"{'part':<{width}}  {'parameters':>14}  {'trained':>14}"]
        lines += [
            f"{part:<{width}}  {all_:>14,}  {trained:>14,}"
            for part, (trained, all_) in self.held.parameters.items()
        ]
        held = self.held
        each = "each process holds" if held.processes > 1 else "the process holds"
        lines += [
            "",
            f"{each}  {_gb(held.total)} GB from the first step to the last:",
            f"  weights {_gb(held.weights)}, gradients {_gb(held.gradients)}, AdamW's moments "
            f"{_gb(held.moments)}",
        ]
        if self.gpu is not None:
            lines.append(f"  {self._verdict(held)}")
        if self.changes:
            lines += ["", "with other settings:"]
            wide = max(len(x.change) for x in self.changes)
            lines += [
                f"  {x.change:<{wide}}  {_gb(x.held.total)} GB"
                + (f": {self._verdict(x.held)}" if self.gpu is not None else "")
                for x in self.changes
            ]
        lines += ["", "a step needs more (activations, logits): see `cafe train --dry-run`"]
        return "\n".join(lines)

    def _verdict(self, held: HeldMemory) -> str:
        assert self.gpu is not None
        of = f"{self.gpu.name} with {self.gpu.memory_gb:g} GB"
        if held.total < self.gpu.memory_bytes:
            left = (self.gpu.memory_bytes - held.total) / 1e9
            return f"can fit on {of}, {left:.1f} GB are left for the step"
        return f"cannot fit on {of}, whatever the batch"


def plan(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = None,
    count: int = 1,
) -> Plan:
    """Count what a run holds, without weights and without a GPU.

    Args:
        recipe: A recipe, or its file. Its model is a directory with a config.json, or a hub id, of
            which only the configuration is downloaded.
        overrides: Of keys of a file, as on the command line.
        gpu: Name in the table of GPUs; None: no verdict.
        count: Number of GPUs, each with a process.

    Raises:
        RecipeError: the recipe is not valid, its tuning does not fit the model or has 4-bit
            weights, there is no such GPU in the table, or `count` is below 1.
        CheckpointError: the model's configuration is neither here nor on the hub.
    """
    if count < 1:
        raise RecipeError(f"count: {count}: a run has at least one GPU")
    found = None if gpu is None else find_gpu(gpu)
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(os.fspath(recipe), overrides)
    changes = [
        PlannedChange(change, held_memory(changed, processes=count))
        for change, changed in _other_settings(checked, count)
    ]
    return Plan(held_memory(checked, processes=count), found, tuple(changes))


def _other_settings(recipe: Recipe, count: int) -> list[tuple[str, Recipe]]:
    """Settings that hold less than the recipe's own, each as an override and as a recipe."""
    others: list[tuple[str, dict[str, Any]]] = []
    if count > 1 and recipe.sharding == "none" and recipe.tuning.kind != "qlora":
        others.append(("sharding=fsdp", {"sharding": "fsdp"}))
    if recipe.tuning.kind == "full":
        tuning = recipe.tuning.model_copy(update={"kind": "lora"})
        others.append(("tuning.kind=lora", {"tuning": tuning}))
        if not recipe.optimizer.freeze:
            optimizer = recipe.optimizer.model_copy(update={"freeze": ["vision"]})
            others.append(("optimizer.freeze=[vision]", {"optimizer": optimizer}))
    return [(change, recipe.model_copy(update=update)) for change, update in others]


def _fields(held: HeldMemory) -> dict[str, Any]:
    return {
        "parameters": {part: all_ for part, (_, all_) in held.parameters.items()},
        "trained": {part: trained for part, (trained, _) in held.parameters.items()},
        "weights_bytes": held.weights,
        "gradients_bytes": held.gradients,
        "moments_bytes": held.moments,
        "total_bytes": held.total,
        "processes": held.processes,
        "sharded": held.sharded,
    }


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"
