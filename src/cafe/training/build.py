"""The parts of a run, built from its recipe: accelerator, step, optimizer, collator."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env

from cafe.errors import RecipeError
from cafe.model.rows.blocks import BLOCK_COST
from cafe.model.rows.collate import Collator
from cafe.model.vlm import CAFe
from cafe.precision import ComputePrecision, described, resolved_precision
from cafe.recipes import Recipe
from cafe.training.blocks import (
    compile_blocks,
    enable_gradient_checkpointing,
    offload_saved_tensors,
)
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.deepspeed import ZeroOptimizer, hidden_from_accelerate, zero_settings
from cafe.training.distributed import any_rank, world_size
from cafe.training.log import SampleAnswer
from cafe.training.matching import Matcher
from cafe.training.optim import build_optimizer, freeze, head_is_tied, parts_of
from cafe.training.sharding import shard
from cafe.training.state import TrainingState, fingerprint, uses_dropout
from cafe.training.step import TrainingStep
from cafe.training.tuning import cast_frozen_linears_to_bf16


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Processes, device, precision and trackers.

    Raises:
        RecipeError: A tracker is not installed, the processes were started in a way that cafe does
            not support, or the precision does not fit the attention or differs between processes.
    """
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
    zero_settings(recipe)  # raises its errors before the model is loaded
    device = training_device()
    precision = resolved_precision(recipe.precision, device)
    _check_attention(recipe, precision)
    with hidden_from_accelerate():
        accelerator = Accelerator(
            # Without this, torchrun's processes on a machine without GPUs would not be joined.
            cpu=device.type == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
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
            f"device ({accelerator.device.type}): their gradients would never be combined. Start "
            "one process, or set ACCELERATE_USE_CPU=true"
        )
    _check_same_precision(accelerator)
    if wanted:
        accelerator.init_trackers("cafe", config=_flat(recipe.model_dump(mode="json")))
    return accelerator


def training_device() -> torch.device:
    """The kind of device that `build_accelerator` trains on; its index is not known yet."""
    if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def precision_in_use(accelerator: Accelerator) -> ComputePrecision:
    """What the recipe's precision was resolved to."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def _check_attention(recipe: Recipe, precision: ComputePrecision) -> None:
    """The recipe itself is checked when it is read; what auto means depends on the machine."""
    if recipe.attention == "flash_attention_2" and precision == "fp32":
        raise RecipeError(
            "attention is flash_attention_2, which needs bf16, and precision: auto is fp32 on this "
            f"machine ({training_device().type}); set attention: sdpa"
        )


def _check_same_precision(accelerator: Accelerator) -> None:
    """Gradients of bf16 and of fp32 would be averaged without a word."""
    precision = precision_in_use(accelerator)
    both = [any_rank(precision == one, accelerator.device) for one in ("bf16", "fp32")]
    if all(both):
        raise RecipeError(
            f"precision: auto is {precision} on this machine ({described()}), and another one on "
            "the machine of another process; set precision: bf16 or fp32"
        )


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
    """Seed every global random stream; torch seeds its devices, too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_step(
    recipe: Recipe, vlm: CAFe, accelerator: Accelerator
) -> tuple[TrainingStep, TrainingState]:
    """The training step on the prepared model, and the state that it changes."""
    freeze(parts_of(vlm), recipe.optimizer.freeze)
    reads_head = recipe.objective.language_weight > 0 or recipe.objective.match_weight > 0
    if not reads_head and not head_is_tied(vlm):
        vlm.lm_head.requires_grad_(False)  # it is unused, and DDP would wait for its gradient
    sharded = is_sharded(recipe)
    bf16 = precision_in_use(accelerator) == "bf16"
    if recipe.tuning.kind == "lora" and bf16 and not sharded:
        cast_frozen_linears_to_bf16(vlm)
    vlm.train()
    matcher = Matcher.of(vlm) if recipe.objective.match_weight > 0 else None
    if recipe.gradient_checkpointing:
        enable_gradient_checkpointing(vlm)
    if recipe.compile:
        _check_compilable(recipe, vlm)
        compile_blocks(vlm)
    base = fingerprint(vlm.model)
    device = accelerator.device
    if sharded:
        shard(vlm, device)
    contrast = ContrastiveLoss(recipe.objective).to(device)
    step = TrainingStep(
        vlm,
        vlm,
        contrast,
        recipe.objective,
        backward=accelerator.backward,
        autocast=lambda: _forward_context(recipe, accelerator),
        sharded=sharded,
        matcher=matcher,
    )
    optimizer: Any = build_optimizer(parts_of(vlm), contrast, recipe.optimizer, device.type)
    if (zero := zero_settings(recipe)) is not None:
        optimizer = ZeroOptimizer(vlm, optimizer, zero, recipe.optimizer.max_grad_norm)
        step = replace(step, backward=optimizer.backward, no_sync=optimizer.no_sync, sharded=True)
    elif not sharded:
        with warnings.catch_warnings():
            # Renamed in torch 2.13; the old name exists in every supported version.
            warnings.simplefilter("ignore", FutureWarning)
            model, optimizer = accelerator.prepare(vlm, optimizer)
        step = replace(step, model=model, no_sync=lambda: accelerator.no_sync(model))
    return step, TrainingState(vlm.model, contrast, optimizer, device, base, sharded)


def trained_settings(recipe: Recipe, vlm: CAFe) -> dict[str, Any]:
    """The keys of a recipe that decide what is trained, with values that compare by meaning."""
    tuning, objective = recipe.tuning, recipe.objective
    settings = {
        "tuning.kind": tuning.kind,
        "objective.contrastive": objective.contrastive,
        "objective.learn_temperature": objective.learn_temperature,
    }
    if objective.multi_vector_weight:
        settings["objective.multi_vector_dim"] = objective.multi_vector_dim
    if objective.latent_tokens:
        settings["objective.latent_tokens"] = objective.latent_tokens
        pooling = objective.latent_pooling
        # Runs of earlier versions have no such setting, and read the last token.
        settings["objective.latent_pooling"] = None if pooling == "last" else pooling
    if tuning.kind != "full":
        return settings | {
            "tuning.rank": tuning.rank,
            "tuning.alpha": tuning.alpha,
            "tuning.parts": sorted(tuning.parts),
            "tuning.targets": tuning.targets and sorted(tuning.targets),
            "tuning.full_parts": sorted(tuning.full_parts),
        }
    settings["optimizer.freeze"] = sorted(recipe.optimizer.freeze)
    if not head_is_tied(vlm):  # `build_step` freezes it
        weight = "above 0" if objective.language_weight > 0 else "0"
        settings["objective.language_weight"] = weight
    return settings


def _check_compilable(recipe: Recipe, vlm: CAFe) -> None:
    """Compiled dropout draws different numbers in passes with and without gradient."""
    if uses_dropout(vlm):
        raise RecipeError(
            f"compile: {recipe.model} has dropout, which must be the same in both passes of a "
            "chunked step, and is not when compiled; set compile: false, or tuning.dropout: 0"
        )


@contextmanager
def _forward_context(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """The precision of a forward, and where its saved tensors are kept until the backward."""
    offload = offload_saved_tensors() if recipe.offload_activations else nullcontext()
    with accelerator.autocast(), offload:
        yield


def is_sharded(recipe: Recipe) -> bool:
    """Whether the run is sharded; a single process never is."""
    return recipe.sharding == "fsdp" and world_size() > 1


def build_collator(recipe: Recipe, vlm: CAFe) -> Collator:
    """How examples become chunks. Raises RecipeError for a length beyond the model's context."""
    batch = recipe.batch
    context = vlm.collator.max_tokens
    if batch.max_tokens is not None and batch.max_tokens > context:
        raise RecipeError(
            f"batch.max_tokens is {batch.max_tokens}, but the context of {recipe.model} is "
            f"{context} tokens"
        )
    return replace(
        vlm.collator,
        max_tokens=batch.max_tokens or context,
        max_frames=batch.max_frames,
        sharing=batch.sharing,
        row_tokens=batch.row_tokens,
        dummy_image=world_size() > 1,
        official=recipe.objective.compat == "official",
        matching=recipe.objective.match_weight > 0,
        every_token=recipe.objective.multi_vector_weight > 0,
        # Every forward of a sharded layer is collective, and ranks may have unequal blocks.
        block_cost=None if is_sharded(recipe) else BLOCK_COST,
    )


# ---------------------------------------------------------------------- trackers

_NOT_OF_MLFLOW = re.compile(r"[^/\w.\- :]")
_TAKE_TEXTS = frozenset({"tensorboard", "comet_ml", "wandb", "trackio"})
"""Trackers whose `log` of accelerate takes strings. mlflow gets an artifact for each step; those
that know numbers only (aim, clearml, dvclive, swanlab) get no samples."""


def track_numbers(trackers: Iterable[Any], values: Mapping[str, float], step: int) -> None:
    """Give numbers to the trackers of accelerate; mlflow takes some characters only in names."""
    for tracker in trackers:
        if tracker.name == "mlflow":
            named = {_NOT_OF_MLFLOW.sub("_", k.replace("@", "_at_")): x for k, x in values.items()}
            tracker.log(named, step=step)
        else:
            tracker.log(dict(values), step=step)


def track_samples(trackers: Iterable[Any], samples: Sequence[SampleAnswer], step: int) -> None:
    """Give the answers of an evaluation to the trackers of accelerate that take texts."""
    texts = {
        f"samples/{number}": f"**{sample.id}** {sample.prompt}\n\nmodel: {sample.answer}\n\n"
        f"reference: {sample.reference}"
        for number, sample in enumerate(samples)
    }
    for tracker in trackers:
        if tracker.name in _TAKE_TEXTS:
            tracker.log(texts, step=step)
        elif tracker.name == "mlflow":
            mlflow = import_module("mlflow")
            mlflow.log_text("\n\n".join(texts.values()), f"samples/step-{step:06d}.md")
