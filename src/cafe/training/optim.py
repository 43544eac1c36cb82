"""Learning rates: the parts of a model, AdamW's parameter groups, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from cafe.errors import FamilyError, RecipeError
from cafe.model.multi_vector import TOKEN_PROJECTION, token_projection_of
from cafe.model.vlm import CAFe
from cafe.recipes import Optimizer as OptimizerSettings
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.deepspeed import ZeroOptimizer

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}

Parts = dict[str, dict[str, nn.Parameter]]


def parts_of(vlm: CAFe) -> Parts:
    """The parameters of each part ("vision", "projector", "language") by name.

    A tied parameter is listed once. "multi_vector" is one more part, of models that have it.

    Raises:
        FamilyError: A parameter belongs to no part, or to two.
    """
    parts: Parts = {part: {} for part in vlm.family.parts}
    if (projection := token_projection_of(vlm.model)) is not None:
        parts["multi_vector"] = dict(projection.named_parameters(TOKEN_PROJECTION))
    for name, parameter in vlm.model.named_parameters():
        if name in parts.get("multi_vector", ()):
            continue
        owners = [part for part, prefixes in vlm.family.parts.items() if name.startswith(prefixes)]
        if len(owners) != 1:
            problem = f"belongs to {' and '.join(owners)}" if owners else "belongs to no part"
            raise FamilyError(
                f"model type {vlm.family.model_type!r}: parameter {name!r} {problem}; every "
                "parameter needs exactly one. Fix `parts` in the family's file"
            )
        parts[owners[0]][name] = parameter
    return parts


def freeze(parts: Parts, frozen: Sequence[str]) -> None:
    """Freeze the parts in `frozen`.

    Raises:
        RecipeError: No trainable parameter is left.
    """
    for part in frozen:
        for parameter in parts[part].values():
            parameter.requires_grad_(False)
    if not any(p.requires_grad for parameters in parts.values() for p in parameters.values()):
        raise RecipeError(f"optimizer.freeze is {list(frozen)}: nothing is left to learn")


def head_is_tied(vlm: CAFe) -> bool:
    """Whether the language head shares its matrix with the token embedding."""
    return vlm.lm_head.weight is vlm.model.get_input_embeddings().weight


def build_optimizer(
    parts: Parts, contrast: ContrastiveLoss, settings: OptimizerSettings, device: str
) -> AdamW:
    """AdamW with a group per part and kind of parameter; frozen parameters are in none.

    Matrices have weight decay; vectors (biases, norms) and the parameters of the contrastive loss
    have none. Each group has a `name`, such as "vision" or "vision, no decay".

    Args:
        parts: The model's parameters, from `parts_of`.
        contrast: Its temperature and bias are trained where they require gradients.
        settings: The recipe's `optimizer`.
        device: The device's type, such as "cuda".
    """
    rates = {
        "vision": settings.vision_learning_rate,
        "projector": settings.projector_learning_rate,
        "language": None,
        "multi_vector": settings.multi_vector_learning_rate,
    }
    groups = []
    for part, parameters in parts.items():
        rate = rates[part] or settings.learning_rate
        learned = [p for p in parameters.values() if p.requires_grad]
        matrices = [p for p in learned if p.ndim >= 2]
        vectors = [p for p in learned if p.ndim < 2]
        groups += [
            _group(part, matrices, rate, settings.weight_decay),
            _group(f"{part}, no decay", vectors, rate, 0.0),
        ]
    numbers = [p for p in contrast.parameters() if p.requires_grad]
    groups.append(_group("contrast", numbers, settings.learning_rate, 0.0))
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=device in FUSED_DEVICES,
    )


def _group(name: str, params: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {"name": name, "params": params, "lr": rate, "peak": rate, "weight_decay": decay}


def set_learning_rates(optimizer: Optimizer | ZeroOptimizer, share: float) -> None:
    """Set every group's learning rate to a share of its peak.

    The share is a function of the step and the recipe, so a resumed run has no schedule to restore
    and follows a recipe that was changed in between.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def warmup_steps(warmup: float | int, steps: int) -> int:
    """Number of warm-up steps: a float is a share of all steps, an int a number of them."""
    return min(steps, round(warmup * steps) if isinstance(warmup, float) else warmup)


def rate_share(done: int, *, steps: int, warmup: int, kind: str) -> float:
    """The share of the peak learning rate that the step after `done` finished steps uses.

    The last warm-up step is at the peak, and the first one already has 1 / warmup of it. After
    that the share falls to zero, which the step after the last one would have.
    """
    if done < warmup:
        return (done + 1) / warmup
    over = min(1.0, (done - warmup) / max(1, steps - warmup))
    match kind:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * over))
        case "linear":
            return 1 - over
        case _:
            return 1.0
