"""Which parameter learns how fast: parts of the model, AdamW's groups, the rate's course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from cafe.errors import FamilyError, RecipeError
from cafe.model.vlm import CAFe
from cafe.recipes import Optimizer as OptimizerSettings
from cafe.train.contrast import Contrast
from cafe.train.zero import ZeroOptimizer

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}

Parts = dict[str, dict[str, nn.Parameter]]


def parts_of(core: CAFe) -> Parts:
    """Part ("vision", "projector", "language") -> its parameters by name; a tied one comes once.

    Raises FamilyError for a parameter that belongs to no part, or to two.
    """
    parts: Parts = {part: {} for part in core.family.parts}
    for name, parameter in core.model.named_parameters():
        homes = [part for part, prefixes in core.family.parts.items() if name.startswith(prefixes)]
        if len(homes) != 1:
            found = f"belongs to {' and '.join(homes)}" if homes else "belongs to no part"
            raise FamilyError(
                f"model type {core.family.model_type!r}: parameter {name!r} {found}; every "
                "parameter needs exactly one. Mend `parts` of the family's file"
            )
        parts[homes[0]][name] = parameter
    return parts


def freeze(parts: Parts, frozen: Sequence[str]) -> None:
    """The parts in `frozen` get no gradient. Raises RecipeError if nothing is left to learn."""
    for part in frozen:
        for parameter in parts[part].values():
            parameter.requires_grad_(False)
    if not any(p.requires_grad for parameters in parts.values() for p in parameters.values()):
        raise RecipeError(f"optimizer.freeze is {list(frozen)}: nothing is left to learn")


def head_is_tied(core: CAFe) -> bool:
    """Whether the head's matrix is also the token embedding's."""
    return core.lm_head.weight is core.model.get_input_embeddings().weight


def build_optimizer(
    parts: Parts, contrast: Contrast, settings: OptimizerSettings, device: str
) -> AdamW:
    """AdamW with a group per part and kind of parameter; frozen parameters are in none.

    Matrices decay; vectors (biases, norms) and what the contrast learns do not. Each group has
    its `name`, such as "vision" or "vision, no decay". `device` is the device's type.
    """
    rates = {
        "vision": settings.vision_learning_rate,
        "projector": settings.projector_learning_rate,
        "language": None,
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
    """Every group's rate becomes that share of its peak.

    A function of the step and the recipe, so a resumed run has no schedule to restore, and a
    recipe that was changed in between is followed.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def warmup_steps(warmup: float | int, steps: int) -> int:
    """A float is a share of all steps, an int is steps; never more than there are."""
    return min(steps, round(warmup * steps) if isinstance(warmup, float) else warmup)


def rate_share(done: int, *, steps: int, warmup: int, kind: str) -> float:
    """The share of the peak rate that the step after `done` finished ones takes.

    The warm-up ends at the peak with its last step, and its first step already moves (1 / warmup).
    From there to zero, which the step after the last would have.
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
