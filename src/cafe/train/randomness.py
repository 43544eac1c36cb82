"""Dropout must fall alike in both passes of a cached step: take its random state, put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_FUNCTIONAL_RATES = ("attention_dropout", "dropout", "hidden_dropout", "drop_path_rate")

State = tuple[Tensor, Tensor | None]


def snapshot(device: torch.device) -> State:
    """The random state of the CPU and, if that is one, of the accelerator."""
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), accelerator


@contextmanager
def replay(state: State, *, active: bool = True) -> Iterator[None]:
    """Run a block from `state`; afterwards the random stream goes on from where it was before."""
    if not active:
        yield
        return
    devices = [torch.cuda.current_device()] if state[1] is not None else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])
        yield


def uses_dropout(model: nn.Module) -> bool:
    """Whether a forward in this mode draws random numbers (LoRA's and attention's included)."""
    return any(_rate(module) > 0 for module in model.modules() if module.training)


def _rate(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    rates = (getattr(module, name, 0.0) for name in _FUNCTIONAL_RATES)
    return max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)
