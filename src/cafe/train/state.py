"""What a run changes from step to step, as tensors that can be put away and put back.

Weights go by name, moments by their parameter's number; whole, or in the pieces of a sharded run.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from cafe.model.adapter import adapter_of
from cafe.train.contrast import Contrast
from cafe.train.sharding import cut_like, load_pieces
from cafe.train.zero import ZeroOptimizer

SAMPLES = 64  # values of a weight that its fingerprint takes


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that changes from step to step, besides the step's number.

    base      the fingerprint of the weights beneath an adapter, which never change
    sharded   the tensors are in pieces, one per rank
    """

    model: nn.Module
    contrast: Contrast
    optimizer: Optimizer | ZeroOptimizer
    device: torch.device
    base: str | None = None
    sharded: bool = False


def _aliases(model: nn.Module) -> set[str]:
    """Further names of tied parameters."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a step may change, by name: parameters and saved buffers, a tied one once.

    Beside an adapter the base never changes, so it is left out (`fingerprint` knows it again).
    """
    left_out = _aliases(model)
    if adapter_of(model) is not None:
        left_out |= {name for name, p in model.named_parameters() if not p.requires_grad}
    return {k: v.contiguous() for k, v in model.state_dict().items() if k not in left_out}


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what `weights_of` took. Raises RuntimeError when they are another model's."""
    wrong = sorted(weights.keys() ^ weights_of(model).keys())
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights do not match, the first is {wrong[0]!r}")
    own = model.state_dict()
    model.load_state_dict({k: cut_like(v, own[k]) for k, v in weights.items()}, strict=False)


def fingerprint(model: nn.Module) -> str | None:
    """Of what an adapter's checkpoint leaves out: names, shapes and some values of each weight."""
    if adapter_of(model) is None:
        return None
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            # Rounded, as a run in bf16 may hold them (`halve_frozen_layers`).
            some = flat[:: max(1, len(flat) // SAMPLES)].to("cpu", torch.bfloat16).float()
            found.update(f"{name} {list(parameter.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def load_moments(optimizer: Optimizer | ZeroOptimizer, state: dict[str, Any]) -> None:
    """Put back what AdamW remembers; its rates and decay stay those of the recipe at hand.

    Raises ValueError when the groups are others, as they are when other parts are frozen.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    then, now = (
        [group["name"] for group in groups] for groups in (state["param_groups"], settings)
    )
    if then != now:
        raise ValueError(f"it trained {', '.join(then)}; the recipe trains {', '.join(now)}")
    parameters = dict(enumerate(_learned(optimizer)))
    state = {
        **state,
        "state": {
            index: {key: cut_like(value, parameters[index]) for key, value in moments.items()}
            for index, moments in state["state"].items()
        },
    }
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _learned(optimizer: Optimizer | ZeroOptimizer) -> list[nn.Parameter]:
    """In the order in which AdamW counts them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def pieces_of(state: TrainingState) -> dict[str, torch.Tensor]:
    """Weights by name and moments by their parameter's number, as this rank holds them."""
    moments = state.optimizer.state_dict()["state"]
    return {f"weights.{name}": tensor for name, tensor in weights_of(state.model).items()} | {
        f"moments.{index}.{key}": value
        for index, values in moments.items()
        for key, value in values.items()
    }


def restore_pieces(state: TrainingState, folder: Path, groups: list[dict[str, Any]]) -> None:
    """Put back what `pieces_of` took, into whatever pieces this run is in."""
    weights = weights_of(state.model)
    moments = {
        f"moments.{index}.{key}": torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        for index, parameter in enumerate(_learned(state.optimizer))
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    named = {f"weights.{name}": tensor for name, tensor in weights.items()}
    others = load_pieces({**named, **moments}, folder)
    # A parameter that had no gradient yet has no moments.
    if wrong := sorted(name for name in others if name not in moments):
        raise ValueError(f"{len(wrong)} tensors do not match, the first is {wrong[0]!r}")
    state.model.load_state_dict(weights, strict=False)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in moments.items():
        if name not in others:
            _, index, key = name.split(".")
            found.setdefault(int(index), {})[key] = tensor
    load_moments(state.optimizer, {"state": found, "param_groups": groups})


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
