"""Which candidates are negatives of a pair, and which only seem to be.

The terms and shapes are those of `cafe.objective.contrastive`, which explains the rules.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int


def duplicates(
    n: int,
    k: int,
    target_ids: Int[Tensor, " n"] | None,
    negative_ids: Int[Tensor, " m"] | None,
    query_ids: Int[Tensor, " n"] | None = None,
    content_ids: Int[Tensor, " n"] | None = None,
) -> Bool[Tensor, "n k"] | None:
    """True where a candidate is right for a query under another index, so not a negative."""
    if target_ids is None:
        return None
    same = torch.zeros(n, k, dtype=torch.bool, device=target_ids.device)
    for ids in (target_ids, content_ids):
        if ids is None:
            continue
        candidates = ids if negative_ids is None else torch.cat([ids, negative_ids])
        known = same[:, : len(candidates)]
        if query_ids is None:
            known |= ids[:, None] == candidates[None, :]
            continue
        _, query = query_ids.unique(return_inverse=True)
        distinct, candidate = candidates.unique(return_inverse=True)
        pairs = same.new_zeros(n, len(distinct))  # a row per distinct query
        pairs[query, candidate[:n]] = True
        known |= pairs[query][:, candidate]
        if ids is content_ids:
            known |= query_ids[:, None] == candidates[None, :]
    return same.fill_diagonal_(False)


def without_false(
    logits: Float[Tensor, "n k"],
    cosines: Float[Tensor, "n k"],
    threshold: Float[Tensor, " n"] | None,
) -> Float[Tensor, "n k"]:
    """The logits without candidates whose cosine is above the threshold of their row."""
    if threshold is None:
        return logits
    return logits.masked_fill(cosines.detach() > threshold[:, None], -math.inf)


def same_side_logits(
    query: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    temperature: float | Float[Tensor, ""],
    known: Bool[Tensor, "n k"] | None,
    query_ids: Int[Tensor, " n"] | None,
    threshold: Float[Tensor, " n"] | None,
) -> list[Float[Tensor, "n n"]]:
    """The logits of each query with the other queries, and of each target with other targets."""
    right = torch.eye(len(query), dtype=torch.bool, device=query.device)
    if known is not None:
        right = right | known[:, : len(query)] | known[:, : len(query)].T
    if query_ids is not None:
        right = right | (query_ids[:, None] == query_ids[None, :])
    among_queries = query @ query.T
    queries = without_false(among_queries / temperature, among_queries, threshold)
    logits = (queries, target @ target.T / temperature)
    return [own.masked_fill(right, -math.inf) for own in logits]
