"""The language head: log-probabilities of given tokens, and exact logits of a few tokens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int

_PLAIN_TYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""A weight of another type needs a scale, which only its own module knows."""


class LanguageHead(Protocol):
    """What these functions need of a model; `cafe.model.vlm.CAFe` has it."""

    @property
    def lm_head(self) -> nn.Module: ...

    @property
    def logit_softcap(self) -> float | None: ...


def token_log_probs(
    model: LanguageHead,
    states: Float[Tensor, "n hidden"],
    tokens: Int[Tensor, " n"],
    chunk_tokens: int = 512,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Log-probability of each token after its state.

    Args:
        model: has the head.
        states: final hidden states; `states[i]` predicts `tokens[i]`.
        tokens: vocabulary ids.
        chunk_tokens: positions whose logits exist at one time; each is as long as the vocabulary.

    Returns:
        log_p: natural logarithms, float32.
        is_argmax: whether each token is the most probable one, as greedy decoding would choose.
    """
    tokens = tokens.to(states.device)
    log_p = torch.zeros(len(tokens), device=states.device)
    is_argmax = torch.zeros(len(tokens), dtype=torch.bool, device=states.device)
    for start in range(0, len(tokens), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = _capped(model, model.lm_head(states[part]).float())
        log_p[part] = logits.log_softmax(-1).gather(1, tokens[part, None])[:, 0]
        is_argmax[part] = logits.argmax(dim=1) == tokens[part]
    return log_p, is_argmax


def next_token_logits(
    model: LanguageHead, states: Float[Tensor, "n hidden"]
) -> Float[Tensor, "n vocabulary"]:
    """Logits of all tokens after each state, float32, as transformers' `generate` sees them."""
    return _capped(model, model.lm_head(states).float())


def token_logits(
    model: LanguageHead, states: Float[Tensor, "n hidden"], tokens: Sequence[int]
) -> Float[Tensor, "n tokens"]:
    """Logits of a few tokens after each state, in float32 (float64 of a float64 head).

    Only these tokens' rows of the head are computed, and not in bfloat16, which would round a logit
    near 10 to steps of 1/16. A quantized or sharded head computes all of its logits in its own
    precision instead.
    """
    index = torch.tensor(tokens, device=states.device)
    head = model.lm_head
    if not _has_rows(head):
        return _capped(model, head(states).float()[:, index])
    rows = _rows_of(head, index)
    with torch.autocast(states.device.type, enabled=False):
        return _capped(model, rows(states.to(next(rows.parameters()).dtype)))


def _capped(model: LanguageHead, logits: Tensor) -> Tensor:
    cap = model.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _has_rows(head: nn.Module) -> bool:
    """Whether one row of each weight is all that the head has for a token: linear, also with LoRA.

    Subclasses of these layers are excluded: they quantize, or gather a sharded weight.
    """
    layer = head
    if type(head) is not nn.Linear:
        from peft.tuners.lora import Linear as LoraLinear

        if type(head) is not LoraLinear:
            return False
        layer = head.get_base_layer()
    plain = all(
        type(p) is nn.Parameter and not p.is_meta and p.dtype in _PLAIN_TYPES
        for p in head.parameters()
    )
    return type(layer) is nn.Linear and plain and not list(head.buffers())


def _rows_of(head: Any, tokens: Tensor) -> nn.Module:
    """A copy of the head for these tokens only, in float32 (float64 of float64)."""
    vocabulary = len(head.weight)
    copies: dict[int, Any] = {}
    for weight in head.parameters():
        kept = weight.detach()
        kept = kept[tokens] if len(kept) == vocabulary else kept  # LoRA's A serves every token
        kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
        copies[id(weight)] = nn.Parameter(kept, requires_grad=False)
    return copy.deepcopy(head, copies)  # the memo makes deepcopy use these instead of the weights
