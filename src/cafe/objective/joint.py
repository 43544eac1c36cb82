"""The joint objective: one weighted sum, divided once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float

__all__ = ["joint_loss"]


def joint_loss(
    contrastive: Float[Tensor, ""] | None,
    nll_sum: Float[Tensor, ""] | None,
    token_count: int,
    *,
    contrastive_weight: float,
    language_weight: float,
    match: Float[Tensor, ""] | None = None,
    match_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """contrastive_weight * contrastive + language_weight * nll_sum / token_count + the match term.

    The language term is a mean over tokens, not over examples, chunks or ranks: `token_count`
    counts the labels of the whole batch over all ranks, while `nll_sum` may be the sum of one
    chunk. The terms of all chunks then add up to the term of the batch. The official CAFe code is
    (1, 1) on one GPU; its contrastive gradient on W GPUs is that of contrastive_weight = 1/W.

    Args:
        contrastive: the contrastive loss, or its surrogate for one chunk (<embedding, cached
            gradient>, as in GradCache). None omits the term.
        nll_sum: summed negative log-likelihood in nats (`next_token_nll`). None omits it.
        token_count: number of labels to divide the sum by. 0 makes the language term 0, with
            zero gradients where there is a graph, so that no rank waits for another.
        contrastive_weight: alpha_con of the paper's formula.
        language_weight: alpha_lm of the paper's formula.
        match: the loss of the match questions (`match_loss`), or the part of one chunk. None omits
            it; the paper has none.
        match_weight: of `match`.

    Raises:
        ValueError: both terms None, or a negative count.
    """
    if token_count < 0:
        raise ValueError(f"token_count is {token_count}; use the number of labels, 0 or more")
    terms = []
    if contrastive is not None:
        terms.append(contrastive_weight * contrastive)
    if nll_sum is not None:
        terms.append(language_weight * (nll_sum / token_count if token_count else 0.0 * nll_sum))
    if not terms:
        raise ValueError("contrastive and nll_sum are both None; give at least one term")
    if match is not None:
        terms.append(match_weight * match)
    return sum(terms[1:], terms[0])
