"""What a recipe holds in memory all the time, counted from its model's configuration alone.

The model is built on the meta device, tuned and frozen as a run does it, so the counts are exact;
no weight is read or downloaded. This is the memory between two steps. A step needs more on top:
activations, logits, copies of weights in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from cafe.errors import RecipeError
from cafe.model.checkpoint.directory import read_config
from cafe.model.checkpoint.locate import HUB_CONFIGURATION, locate
from cafe.model.families import family_of
from cafe.recipes import Recipe
from cafe.training.optim import freeze, head_is_tied, parts_of
from cafe.training.tuning import adapt, cast_frozen_linears_to_bf16


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """Parameters, and the bytes that each process holds between two steps.

    parameters  part of the model -> (number of trained parameters, number of all)
    weights     bytes
    gradients   bytes, from the first backward to the update
    moments     bytes of AdamW's two moments
    processes   that share the run
    sharded     whether they share these bytes, too
    """

    parameters: dict[str, tuple[int, int]]
    weights: int
    gradients: int
    moments: int
    processes: int
    sharded: bool

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(trained for trained, _ in self.parameters.values())

    @property
    def total(self) -> int:
        """Bytes of each process."""
        return self.weights + self.gradients + self.moments


def held_memory(recipe: Recipe, *, processes: int = 1, bf16: bool = True) -> HeldMemory:
    """Count what a run of the recipe holds. Latent tokens and token projections are left out.

    Args:
        recipe: Its `model` is a directory with a config.json, or a hub id, of which no weights
            are downloaded.
        processes: Number of GPUs, each with a process.
        bf16: What `precision: auto` is there.

    Raises:
        CheckpointError: The model's configuration is neither here nor on the hub.
        RecipeError: `tuning` does not fit the model, or has 4-bit weights.
    """
    if recipe.tuning.kind == "qlora":
        raise RecipeError("tuning.kind: qlora: its 4-bit weights cannot be counted; plan for lora")
    sharded = recipe.sharding == "fsdp" and processes > 1
    bf16 = bf16 if recipe.precision == "auto" else recipe.precision == "bf16"
    core = on_meta(recipe)
    if recipe.tuning.kind == "lora" and bf16 and not sharded:
        cast_frozen_linears_to_bf16(core)
    parameters = list(core.model.parameters())
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    share = processes if sharded else 1
    return HeldMemory(
        parameters={
            part: (
                sum(p.numel() for p in named.values() if p.requires_grad),
                sum(p.numel() for p in named.values()),
            )
            for part, named in parts_of(core).items()
        },
        weights=-(-weights // share),
        gradients=-(-gradients // share),
        moments=-(-2 * gradients // share),
        processes=processes,
        sharded=sharded,
    )


def on_meta(recipe: Recipe) -> Any:
    """The recipe's model without weights, tuned and frozen as in a run: a `CAFe` as far as needed.

    It has no processor, so it counts and computes nothing of data.
    """
    from transformers import AutoModelForImageTextToText

    path = locate(recipe.model, files=HUB_CONFIGURATION)
    config = read_config(path, f"model {recipe.model!r}")
    family = family_of(config)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    core: Any = SimpleNamespace(model=model, family=family, lm_head=model.lm_head)
    unused = family.unused(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
    adapt(core, recipe.tuning, recipe.model)
    freeze(parts_of(core), recipe.optimizer.freeze)
    reads_head = recipe.objective.language_weight > 0 or recipe.objective.match_weight > 0
    if not reads_head and not head_is_tied(core):
        core.lm_head.requires_grad_(False)
    return core
