"""Next-token loss without all logits in memory: they are computed for one chunk at a time.

The logits of all labelled positions are the largest tensor of a training step (5,000 positions and
152,000 words in float32: 2.8 GiB, and as much again for their gradient). They are never needed
together, because each position's loss and gradient depend on its own row only.

The gradient is computed in the forward pass, chunk by chunk, while the chunk's probabilities are in
memory. That costs the same three matrix products as the plain loss. Recomputing logits in backward
would cost a fourth (a third more time) and save only the two results kept here until backward, of
the sizes of `hidden` and of `lm_head_weight`, which backward must produce in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float, Int

__all__ = ["IGNORE_LABEL", "next_token_nll"]

IGNORE_LABEL = -100
"""The label of an ignored position, as in transformers and in `cross_entropy`."""


def next_token_nll(
    hidden: Float[Tensor, "p d"],
    labels: Int[Tensor, " p"],
    lm_head_weight: Float[Tensor, "v d"],
    *,
    bias: Float[Tensor, " v"] | None = None,
    softcap: float | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Float[Tensor, ""], int]:
    """Summed negative log-likelihood of the labels, and the number of labels counted.

    logits = hidden @ lm_head_weight.T + bias, with `softcap` c (Gemma) then c * tanh(logits / c).

    The caller selects and shifts positions: `hidden[i]` is the state that predicts the token
    `labels[i]`. Divide once, by the count over all chunks and ranks (`joint_loss`).

    Under autocast the matrix products run in its dtype, as a linear layer would; otherwise in the
    wider of the two dtypes. Log-softmax, its gradient, and all sums over chunks are float32
    (float64 for float64 inputs), and so is the result. No gradient is computed for tensors that do
    not require one, and none at all under `no_grad`. Differentiable once. Without any label the sum
    is 0, still part of the graph, and the gradients are zeros. Prefer bfloat16 to float16: a
    loss scale is applied after the gradient is formed here, too late for values that float16 rounds
    to zero.

    Args:
        hidden: last hidden states, after the final norm, at labelled positions.
        labels: token ids in [0, v), or `IGNORE_LABEL` (-100), which is not counted.
        lm_head_weight: the output matrix, tied to the input embedding or not, frozen or not.
        bias: added to the logits.
        softcap: bound of the logits' absolute value; None: unbounded.
        chunk_tokens: positions whose logits exist at one time; about 2 * chunk_tokens * v floats.

    Returns:
        sum: in nats.
        count: tokens.

    Raises:
        ValueError: a chunk or soft cap that is not positive, or shapes that do not match.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; use 1 or more")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; use a positive number, or None for no cap")
    if labels.shape != hidden.shape[:1] or hidden.shape[1:] != lm_head_weight.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)} and lm_head_weight "
            f"{tuple(lm_head_weight.shape)} must be (p, d), (p,) and (v, d)"
        )

    counted = labels != IGNORE_LABEL
    count = int(counted.sum())
    if count < len(labels):
        hidden, labels = hidden[counted], labels[counted]
    needs_gradient = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, lm_head_weight, bias)
    ]
    total = _ChunkedNll.apply(
        hidden, lm_head_weight, bias, labels.long(), softcap, chunk_tokens, needs_gradient
    )
    return total, count


class _ChunkedNll(torch.autograd.Function):
    """Forward computes the sum and the gradients for a unit upstream gradient; backward scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        chunk_tokens: int,
        needs_gradient: list[bool],
    ) -> Tensor:
        device = hidden.device.type
        product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(device) and product_dtype != torch.float64:
            product_dtype = torch.get_autocast_dtype(device)
        sum_dtype = torch.promote_types(product_dtype, torch.float32)
        for_hidden, for_weight, for_bias = needs_gradient
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if for_weight else None
        grad_bias = (
            None if bias is None or not for_bias else torch.zeros_like(bias, dtype=sum_dtype)
        )
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)

        matrix = weight.to(product_dtype)
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].to(product_dtype)
            logits = (states @ matrix.T).to(sum_dtype)
            if bias is not None:
                logits += bias
            nll, slope = _nll_and_slope(logits, labels[rows], softcap, any(needs_gradient))
            total += nll
            if slope is None:
                continue
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(product_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, slope.T, states)

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # its stub hides the name of `ctx` from pyright:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Not in place: the sum may be used twice, or the graph kept for a second backward.
        scaled = (
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _nll_and_slope(
    logits: Float[Tensor, "c v"], labels: Int[Tensor, " c"], softcap: float | None, with_slope: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "c v"] | None]:
    """The summed loss of one chunk and its derivative by the logits, softmax - one-hot."""
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits = softcap * tanh
    log_probabilities = torch.log_softmax(logits, dim=1)
    nll = functional.nll_loss(log_probabilities, labels, reduction="sum")
    if not with_slope:
        return nll, None
    slope = log_probabilities.exp_()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    if tanh is not None:
        slope *= 1.0 - tanh.square()
    return nll, slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, without a temporary where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
