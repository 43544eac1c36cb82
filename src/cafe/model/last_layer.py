"""The last layer, computed only where its result is read.

An embedding is read at one token of its sequence. Of the other tokens the last layer needs keys and
values; their queries, their attention's output and their MLP are what nobody reads. In a small
model of four layers that is a fifth of the language model's work, in one of 24 a thirtieth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_TOKENWISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer that compute each token by itself, and whose result other tokens never need."""

# A context variable: what one thread reads must not touch what another generates.
_READ: ContextVar[tuple[Tensor, torch.Size] | None] = ContextVar("read", default=None)


def prepare(decoder: Any) -> None:
    """Let `read_only_at` work on a language model; a layer without the parts above stays whole.

    To be called again when something was put around those parts (an adapter).
    """
    release(decoder)
    for name, module in decoder.layers[-1].named_modules():
        if name in _TOKENWISE:
            module.register_forward_pre_hook(_few)
            module.register_forward_hook(_spread)


def release(decoder: Any) -> None:
    """Take that away: within `read_only_at` the last layer then gives all states."""
    for module in decoder.layers[-1].modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_few, _spread)]:
                del hooks[key]


@contextmanager
def read_only_at(places: Tensor, shape: torch.Size) -> Iterator[None]:
    """Within it, the last layer gives states at `places` and nonsense elsewhere.

    places   int64 [n], flat indices row * t + token
    shape    (rows, t)
    """
    token = _READ.set((places, shape))
    try:
        yield
    finally:
        _READ.reset(token)


def _few(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if (read := _READ.get()) is None:
        return None
    return (given[0].flatten(0, 1)[None, read[0]], *given[1:])


def _spread(_: Any, __: Any, computed: Tensor) -> Tensor | None:
    if (read := _READ.get()) is None:
        return None
    places, shape = read
    whole = computed.new_zeros(shape.numel(), computed.shape[-1])
    whole[places] = computed[0]
    return whole.unflatten(0, shape)
