"""What a run is made of, built from its recipe: accelerator, model, step, optimizer, collator."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from cafe.errors import RecipeError
from cafe.model.collate import Collator
from cafe.model.vlm import CAFe
from cafe.recipes import Recipe
from cafe.train.adapt import halve_frozen_layers
from cafe.train.blocks import compile_blocks, inputs_on_host, recompute_blocks
from cafe.train.contrast import Contrast
from cafe.train.distributed import world_size
from cafe.train.optim import build_optimizer, freeze, head_is_tied, parts_of
from cafe.train.randomness import uses_dropout
from cafe.train.sharding import shard
from cafe.train.state import TrainingState, fingerprint
from cafe.train.step import TrainingStep
from cafe.train.zero import ZeroOptimizer, unknown_to_accelerate, zero_settings


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Processes, device, precision and trackers. Raises RecipeError for a tracker not installed."""
    wanted = recipe.log.trackers
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in wanted:
        if name not in available:
            raise RecipeError(
                f"log.trackers: {name!r} is not installed, or accelerate does not know it; here "
                f"are {', '.join(available) or 'none'}. Install it (pip install {name})"
            )
    # Two runs in one process may differ in precision; accelerate's state is one per process.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    zero_settings(recipe)  # its errors come before the model is loaded
    with unknown_to_accelerate():
        accelerator = Accelerator(
            # Or torchrun's processes on a machine without GPUs would each believe to be alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if recipe.precision == "bf16" else "no",
            log_with=[*wanted] or None,
            project_dir=recipe.output_dir,
            # Ranks may have different numbers of chunks, and broadcasts happen per forward.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RecipeError(
            "accelerate's own FSDP is switched on; leave it off (no --use_fsdp) and set "
            "sharding=fsdp in the recipe"
        )
    if accelerator.num_processes != world_size():
        raise RecipeError(
            f"{world_size()} processes were started, but accelerate cannot join them on this "
            f"device ({accelerator.device.type}): their gradients would never meet. Start one "
            "process, or set ACCELERATE_USE_CPU=true"
        )
    if wanted:
        accelerator.init_trackers("cafe", config=_flat(recipe.model_dump(mode="json")))
    if recipe.batch.examples < accelerator.num_processes:
        raise RecipeError(
            f"batch.examples is {recipe.batch.examples}, but there are {accelerator.num_processes} "
            "processes; each needs an example"
        )
    return accelerator


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Dotted key -> plain value, as trackers take them."""
    if not isinstance(tree, dict | list):
        return {name: tree if isinstance(tree, int | float | str | bool) else str(tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat


def seed_everything(seed: int) -> None:
    """Every global stream; torch seeds its devices along."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_step(
    recipe: Recipe, core: CAFe, accelerator: Accelerator
) -> tuple[TrainingStep, TrainingState]:
    """The step on the prepared model, and the state that it changes."""
    freeze(parts_of(core), recipe.optimizer.freeze)
    if recipe.objective.language_weight == 0 and not head_is_tied(core):
        core.lm_head.requires_grad_(False)  # nothing reads it, and DDP would wait for its gradient
    sharded = is_sharded(recipe)
    if recipe.tuning.kind == "lora" and recipe.precision == "bf16" and not sharded:
        halve_frozen_layers(core)
    core.train()
    if recipe.gradient_checkpointing:
        recompute_blocks(core)
    if recipe.compile:
        _check_compilable(recipe, core)
        compile_blocks(core)
    base = fingerprint(core.model)
    device = accelerator.device
    if sharded:
        shard(core, device)
    contrast = Contrast(recipe.objective).to(device)
    step = TrainingStep(
        core,
        core,
        contrast,
        recipe.objective,
        backward=accelerator.backward,
        autocast=lambda: _forward_context(recipe, accelerator),
        sharded=sharded,
    )
    optimizer: Any = build_optimizer(parts_of(core), contrast, recipe.optimizer, device.type)
    if (zero := zero_settings(recipe)) is not None:
        optimizer = ZeroOptimizer(core, optimizer, zero, recipe.optimizer.max_grad_norm)
        step = replace(
            step, backward=optimizer.backward, no_sync=optimizer.more_to_come, sharded=True
        )
    elif not sharded:
        with warnings.catch_warnings():
            # Renamed in torch 2.13; the old name is in every version that we take.
            warnings.simplefilter("ignore", FutureWarning)
            model, optimizer = accelerator.prepare(core, optimizer)
        step = replace(step, model=model, no_sync=lambda: accelerator.no_sync(model))
    return step, TrainingState(core.model, contrast, optimizer, device, base, sharded)


def _check_compilable(recipe: Recipe, core: CAFe) -> None:
    """Compiled dropout draws other numbers in a pass with gradient than in one without."""
    if uses_dropout(core):
        raise RecipeError(
            f"compile: {recipe.model} has dropout, which must fall alike in both passes of a "
            "chunked step, and compiled it does not; set compile: false, or tuning.dropout: 0"
        )


@contextmanager
def _forward_context(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Precision, and where what a forward keeps for the backward pass waits."""
    away = inputs_on_host() if recipe.offload_activations else nullcontext()
    with accelerator.autocast(), away:
        yield


def is_sharded(recipe: Recipe) -> bool:
    """One process has nothing to share."""
    return recipe.sharding == "fsdp" and world_size() > 1


def build_collator(recipe: Recipe, core: CAFe) -> Collator:
    """How examples become chunks. Raises RecipeError for a length beyond the context."""
    batch = recipe.batch
    context = core.collator.max_tokens
    if batch.max_tokens is not None and batch.max_tokens > context:
        raise RecipeError(
            f"batch.max_tokens is {batch.max_tokens}, but the context of {recipe.model} is "
            f"{context} tokens"
        )
    return replace(
        core.collator,
        max_tokens=batch.max_tokens or context,
        max_frames=batch.max_frames,
        sharing=batch.sharing,
        row_tokens=batch.row_tokens,
        dummy_image=world_size() > 1,
        official=recipe.objective.compat == "official",
    )
