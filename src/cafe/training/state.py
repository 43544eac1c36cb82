"""What a run changes from step to step, as tensors that can be saved and restored.

Weights are identified by name, moments by their parameter's number; both may be full or sharded.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from cafe.model.checkpoint.adapter import adapter_of
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.deepspeed import ZeroOptimizer
from cafe.training.sharding import load_sharded, shard_like

SAMPLES = 64  # number of values of a weight in its fingerprint

_FUNCTIONAL_RATES = ("attention_dropout", "dropout", "hidden_dropout", "drop_path_rate")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that changes from step to step, except for the number of the step.

    base      fingerprint of the weights that the run started from
    sharded   the tensors are sharded over the ranks
    """

    model: nn.Module
    contrast: ContrastiveLoss
    optimizer: Optimizer | ZeroOptimizer
    device: torch.device
    base: str | None = None
    sharded: bool = False


def _aliases(model: nn.Module) -> set[str]:
    """The additional names of tied parameters."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a step may change, by name: parameters and saved buffers, tied ones once.

    With an adapter the base never changes, so it is omitted (`fingerprint` identifies it).
    """
    left_out = _aliases(model)
    if adapter_of(model) is not None:
        left_out |= {name for name, p in model.named_parameters() if not p.requires_grad}
    return {k: v.contiguous() for k, v in model.state_dict().items() if k not in left_out}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Restore the result of `weights_of`. Raises RuntimeError for the weights of another model."""
    wrong = sorted(weights.keys() ^ weights_of(model).keys())
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights do not match, the first is {wrong[0]!r}")
    own = model.state_dict()
    model.load_state_dict({k: shard_like(v, own[k]) for k, v in weights.items()}, strict=False)


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of the base's weights: names, shapes and some values of each.

    With an adapter, of the weights that its checkpoints omit.
    """
    digest, adapted = hashlib.sha256(), adapter_of(model) is not None
    for name, parameter in model.named_parameters():
        if not (adapted and parameter.requires_grad):
            flat = parameter.detach().flatten()
            # Rounded, as a run in bf16 may hold them (`cast_frozen_linears_to_bf16`).
            some = flat[:: max(1, len(flat) // SAMPLES)].to("cpu", torch.bfloat16).float()
            digest.update(f"{name} {list(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(directory: Path) -> str:
    """The fingerprint of a model's config.json, without the keys that depend on who saved it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in {"_name_or_path", "transformers_version"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_moments(optimizer: Optimizer | ZeroOptimizer, state: dict[str, Any]) -> None:
    """Restore AdamW's moments; learning rates and decay stay those of the current recipe.

    Raises:
        ValueError: The groups differ, as they do when other parts are frozen.
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
            index: {key: shard_like(value, parameters[index]) for key, value in moments.items()}
            for index, moments in state["state"].items()
        },
    }
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _learned(optimizer: Optimizer | ZeroOptimizer) -> list[nn.Parameter]:
    """The parameters in the order in which AdamW numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def sharded_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Weights by name and moments by their parameter's number, as this rank holds them."""
    moments = state.optimizer.state_dict()["state"]
    return {f"weights.{name}": tensor for name, tensor in weights_of(state.model).items()} | {
        f"moments.{index}.{key}": value
        for index, values in moments.items()
        for key, value in values.items()
    }


def restore_sharded(state: TrainingState, folder: Path, groups: list[dict[str, Any]]) -> None:
    """Restore the result of `sharded_tensors`, however this run is sharded."""
    weights = weights_of(state.model)
    moments = {
        f"moments.{index}.{key}": torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        for index, parameter in enumerate(_learned(state.optimizer))
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    named = {f"weights.{name}": tensor for name, tensor in weights.items()}
    others = load_sharded({**named, **moments}, folder)
    # A parameter that had no gradient yet has no moments.
    if wrong := sorted(name for name in others if name not in moments):
        raise ValueError(f"{len(wrong)} tensors do not match, the first is {wrong[0]!r}")
    state.model.load_state_dict(weights, strict=False)
    restored: dict[int, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        if name not in others:
            _, index, key = name.split(".")
            restored.setdefault(int(index), {})[key] = tensor
    load_moments(state.optimizer, {"state": restored, "param_groups": groups})


# ---------------------------------------------------------------------- random numbers


def random_state(device: torch.device) -> dict[str, Any]:
    """Every random stream that a step might draw from, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        **torch_random_state(device),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue from a state that `random_state` took."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    _set_torch_random_state(state, device)


def torch_random_state(device: torch.device) -> dict[str, Tensor | None]:
    """The streams that dropout draws from: the CPU's and, on a GPU, the device's."""
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "accelerator": accelerator}


def _set_torch_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["accelerator"] is not None:
        torch.cuda.set_rng_state(state["accelerator"], device)


@contextmanager
def replay(
    state: dict[str, Tensor | None], device: torch.device, *, active: bool = True
) -> Iterator[None]:
    """Run a block from `state`; afterwards the random streams continue from where they were.

    Dropout must mask the same units in both passes of a cached step.
    """
    if not active:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _set_torch_random_state(state, device)
        yield


def uses_dropout(model: nn.Module) -> bool:
    """Whether a forward in this mode draws random numbers (LoRA's and attention's included)."""
    return any(_dropout_rate(module) > 0 for module in model.modules() if module.training)


def _dropout_rate(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    rates = (getattr(module, name, 0.0) for name in _FUNCTIONAL_RATES)
    return max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)
