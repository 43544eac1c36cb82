"""Compute the last layer only at the tokens whose states are needed.

An embedding is the state at one token of its sequence. Of the other tokens the last layer needs
keys and values; their queries, their attention output and their MLP are unused. In a small model of
four layers that is a fifth of the language model's work, in one of 24 layers a thirtieth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int

_TOKENWISE = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.out_proj", "mlp", "feed_forward")
"""Parts of a layer that act on each token separately and whose output no other token needs."""

# A context variable: one thread's choice must not reach what another thread generates.
_TOKENS_TO_COMPUTE: ContextVar[tuple[Tensor, torch.Size] | None] = ContextVar(
    "tokens_to_compute", default=None
)


def prepare(decoder: Any) -> None:
    """Hang the hooks on a language model's last layer that `compute_last_layer_at` needs.

    A layer without the parts named above is always computed in full. Call this again after
    wrapping those parts (with an adapter, say).
    """
    release(decoder)
    for name, module in decoder.layers[-1].named_modules():
        if name in _TOKENWISE:
            module.register_forward_pre_hook(_gather)
            module.register_forward_hook(_scatter)


def release(decoder: Any) -> None:
    """Remove the hooks: the last layer then gives all states, also in `compute_last_layer_at`."""
    for module in decoder.layers[-1].modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_gather, _scatter)]:
                del hooks[key]


def recomputes_last_layer(decoder: Any) -> bool:
    """Whether the backward pass computes the layer again, when nobody knows what was read."""
    layer = decoder.layers[-1]
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


@contextmanager
def compute_last_layer_at(token_indices: Int[Tensor, " n"], shape: torch.Size) -> Iterator[None]:
    """Within this context, the last layer's states are valid at `token_indices` only.

    Args:
        token_indices: flat indices, row * t + token.
        shape: (rows, t).
    """
    token = _TOKENS_TO_COMPUTE.set((token_indices, shape))
    try:
        yield
    finally:
        _TOKENS_TO_COMPUTE.reset(token)


def _gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if (tokens := _TOKENS_TO_COMPUTE.get()) is None:
        return None
    return (args[0].flatten(0, 1)[None, tokens[0]], *args[1:])


def _scatter(_: Any, __: Any, computed: Tensor) -> Tensor | None:
    if (tokens := _TOKENS_TO_COMPUTE.get()) is None:
        return None
    token_indices, shape = tokens
    full = computed.new_zeros(shape.numel(), computed.shape[-1])
    full[token_indices] = computed[0]
    return full.unflatten(0, shape)
