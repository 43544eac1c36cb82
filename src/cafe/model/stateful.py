"""Layers that carry a state (GatedDeltaNet: Qwen3.5, Qwen3-Next; short convolutions: LFM2, LFM3) on
rows that branch.

A gated delta-rule layer mixes tokens in two places, a causal convolution and the gated delta rule
(Yang et al., arXiv 2412.06464); a short-convolution layer only in a causal convolution; the rest of
both acts on each token alone. transformers calls functions of the layer's module for them and
passes on every keyword that the model is called with. `allow_branches` wraps these functions once:
called with `segments` (`cafe.model.rows.segments`) they follow the branches, and without it they
are transformers' own, fused kernels included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cafe.errors import FamilyError
from cafe.model.rows.segments import SegmentBatch, Segments

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 64
"""Tokens of a sequence that are computed together."""

LINEAR, SHORT_CONVOLUTION = "linear_attention", "conv"
STATEFUL = {LINEAR: "the gated delta rule", SHORT_CONVOLUTION: "a causal convolution"}
"""Kinds of layers in `config.layer_types` that carry a state, and what it is a state of."""


def allow_branches(decoder: Any) -> None:
    """Let the layers of a language model that carry a state follow branches.

    Raises:
        FamilyError: a layer's state is of another recurrence.
    """
    convolution = ("causal_conv1d_fn", _branching_convolution)
    rule = ("torch_chunk_gated_delta_rule", _branching_rule)
    wrappers = {LINEAR: (convolution, rule), SHORT_CONVOLUTION: (convolution,)}
    kinds = getattr(decoder.config, "layer_types", None) or [""] * len(decoder.layers)
    for layer, kind in zip(decoder.layers, kinds, strict=True):
        module = sys.modules[type(layer).__module__]
        for name, wrapper in wrappers.get(kind, ()):
            function = getattr(module, name, None)
            if function is None:
                raise FamilyError(
                    f"{type(layer).__name__}: its {kind!r} is not {STATEFUL[kind]} "
                    f"(its module has no {name}), so rows cannot branch there; cafe supports "
                    "Qwen3.5's, Qwen3-Next's, LFM2's and LFM3's"
                )
            if not hasattr(function, "_cafe_branches"):
                setattr(module, name, wrapper(function))


def _branching_convolution(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if segments is None:
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        return branching_convolution(hidden_states, weight, bias, activation, segments)

    convolution._cafe_branches = True  # type: ignore[attr-defined]
    return convolution


def _branching_rule(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def rule(*args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if segments is None:
            return original(*args, **kwargs)
        fused = original if _is_fused(args[0]) else None
        return branching_rule(*args, segments=segments, fused=fused, **kwargs), None

    rule._cafe_branches = True  # type: ignore[attr-defined]
    return rule


def _is_fused(query: Tensor) -> bool:
    """Whether transformers calls flash-linear-attention's kernel, which takes packed sequences."""
    return query.is_cuda and "fla" in sys.modules


def branching_convolution(
    inputs: Float[Tensor, "rows channels t"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None,
    activation: str | None,
    segments: Segments,
) -> Float[Tensor, "rows channels t"]:
    """A causal convolution of each channel along the branches, then the activation.

    The inputs of the tokens before a segment are those at the end of its parent, and of the
    parent's parent where that is shorter than the kernel.
    """
    rows, channels, length = inputs.shape
    precise = torch.promote_types(inputs.dtype, torch.float32)
    nothing = inputs.new_zeros(1, channels)
    tokens = torch.cat([inputs.transpose(1, 2).reshape(-1, channels), nothing]).to(precise)
    taken = torch.arange(rows * length, device=inputs.device)
    result = torch.zeros(rows * length, channels, dtype=precise, device=inputs.device)
    for weights in weight.to(precise).flip(1).unbind(1):  # the last one is the token's own
        result = result + tokens[taken] * weights
        taken = segments.before[taken]
    if bias is not None:
        result = result + bias.to(precise)
    if activation is not None:
        from transformers.activations import ACT2FN

        result = ACT2FN[activation](result)
    return result.to(inputs.dtype).view(rows, length, channels).transpose(1, 2)


def branching_rule(
    query: Float[Tensor, "rows t key_heads key_dim"],
    key: Float[Tensor, "rows t key_heads key_dim"],
    value: Float[Tensor, "rows t heads value_dim"],
    g: Float[Tensor, "rows t heads"],
    beta: Float[Tensor, "rows t heads"],
    *,
    segments: Segments,
    use_qk_l2norm_in_kernel: bool = False,
    fused: Callable[..., Any] | None = None,
    **_: Any,
) -> Float[Tensor, "rows t heads value_dim"]:
    """The gated delta rule along the branches of rows.

    Args:
        query: as transformers' `torch_chunk_gated_delta_rule` takes it, and so are the next four.
        key: see above.
        value: see above.
        g: log of each token's decay of the state, at most 0.
        beta: how much of the state each token overwrites.
        segments: of the rows.
        use_qk_l2norm_in_kernel: normalise queries and keys.
        fused: flash-linear-attention's `chunk_gated_delta_rule`; None: `gated_delta_rule`.
    """
    shape = value.shape
    tokenwise = [x.flatten(0, 1) for x in (query, key, value, g, beta)]
    results, states = [], []
    for batch in segments.batches:
        start = None if batch.parents is None else torch.cat(states)[batch.parents]
        run = _padded if fused is None else _packed
        outputs, final = run(tokenwise, batch, start, use_qk_l2norm_in_kernel, fused)
        results.append(outputs.to(value))
        states += [final] if batch.keeps else []
    tokens = value.new_zeros(shape).flatten(0, 1)  # every token is in one segment
    return tokens.index_put((segments.taken,), torch.cat(results)).view(shape)


def _padded(
    tokenwise: list[Tensor], batch: SegmentBatch, start: Tensor | None, normalise: bool, _: Any
) -> tuple[Tensor, Tensor]:
    """The outputs at the real tokens, and the final states. Padding decays and writes nothing."""
    query, key, value, g, beta = (x[batch.tokens] for x in tokenwise)
    real = batch.real[:, :, None]
    outputs, final = gated_delta_rule(
        query, key, value, g * real, beta * real, start, normalise=normalise
    )
    return outputs.flatten(0, 1)[batch.unpadded], final


def _packed(
    tokenwise: list[Tensor], batch: SegmentBatch, start: Tensor | None, normalise: bool, fused: Any
) -> tuple[Tensor, Tensor]:
    """The same by one call of flash-linear-attention's kernel for sequences of any length."""
    query, key, value, g, beta = (x[batch.taken][None] for x in tokenwise)
    outputs, final = fused(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=start,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
        cu_seqlens=batch.begins,
    )
    return outputs[0], final


def gated_delta_rule(
    query: Float[Tensor, "n t key_heads key_dim"],
    key: Float[Tensor, "n t key_heads key_dim"],
    value: Float[Tensor, "n t heads value_dim"],
    log_decay: Float[Tensor, "n t heads"],
    beta: Float[Tensor, "n t heads"],
    state: Float[Tensor, "n heads key_dim value_dim"] | None = None,
    *,
    normalise: bool = False,
) -> tuple[Float[Tensor, "n t heads value_dim"], Float[Tensor, "n heads key_dim value_dim"]]:
    """Outputs and final states of

        S_t = a_t S_(t-1) + beta_t k_t (v_t - a_t S_(t-1)^T k_t)^T,    a_t = exp(log_decay_t)
        o_t = S_t^T q_t / sqrt(key_dim)

    `CHUNK` tokens at a time (arXiv 2412.06464, §3.3): within a chunk, what each token writes
    depends on what those before it wrote, a triangular system; the state passes between chunks.

    Computed in float32, or in float64 where the inputs are, also under autocast. A query or key
    head serves heads / key_heads value heads, one after the other.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    groups = value.shape[2] // key.shape[2]
    with torch.autocast(value.device.type, enabled=False):
        query, key = (x.to(dtype).repeat_interleave(groups, dim=2) for x in (query, key))
        if normalise:
            query, key = (_normalised(x) for x in (query, key))
        query = query * query.shape[-1] ** -0.5
        # [n, heads, t, ...]
        query, key, values = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        log_decay, beta = (x.to(dtype).transpose(1, 2) for x in (log_decay, beta))
        shape = (*key.shape[:2], key.shape[-1], value.shape[-1])
        carried = value.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)
        outputs = []
        for begin in range(0, query.shape[2], CHUNK):
            at = slice(begin, begin + CHUNK)
            output, carried = _chunk(
                query[:, :, at],
                key[:, :, at],
                values[:, :, at],
                log_decay[:, :, at],
                beta[:, :, at],
                carried,
            )
            outputs.append(output)
        return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), carried


def _normalised(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [n, heads, c, value_dim] of one chunk, and the state after it."""
    total = log_decay.cumsum(-1)
    since = total[..., :, None] - total[..., None, :]  # decay from token j to token i, in logs
    later = torch.ones_like(since[0, 0], dtype=torch.bool).triu(1)
    decay = since.masked_fill(later, -torch.inf).exp()
    overlap = (beta[..., None] * key) @ key.transpose(-1, -2) * decay  # its diagonal is not read
    read = (total.exp() * beta)[..., None] * (key @ state)
    written = torch.linalg.solve_triangular(
        overlap, beta[..., None] * value - read, upper=False, unitriangular=True
    )
    outputs = total.exp()[..., None] * (query @ state)
    outputs = outputs + (query @ key.transpose(-1, -2) * decay) @ written
    end = total[..., -1:]
    kept = (end - total).exp()[..., None] * key
    return outputs, end.exp()[..., None] * state + kept.transpose(-1, -2) @ written
