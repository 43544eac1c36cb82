"""Retrieval: scores become ranks; ranks become hit@1 and NDCG. A tie counts against the model.

Recall@k is the share of ranks that are at most k.

Shapes: n queries, m candidates, d embedding coordinates, c candidates of one query. Embeddings are
unit-normalised by the caller; a score is a dot product, the cosine.

**Ties.** A rank is 1 plus the number of *other* candidates whose score is at least the positive's.
The other positives of the same query do not compete. So a model that embeds everything alike
is last everywhere. With `argmax`, which keeps the first of equals, it would answer all of MMEB
correctly, because there the positive is the first candidate.

**Precision.** The rounding of a product of matrices depends on where in the matrix a number stands:
in float32, equal embeddings of 3,584 coordinates differ in score by up to 1e-5, and chance would
break their tie. Scores are therefore float64, where that noise stays below 1e-13, and scores nearer
than `TIE_TOLERANCE` are equal. Different float32 embeddings practically never come so near.

**Memory.** Scores exist block x block at a time. Neither the n x m scores are kept nor a one-hot
tensor of positives, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cafe.errors import DataError

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

T = TypeVar("T", bound=Hashable)

__all__ = [
    "TIE_TOLERANCE",
    "candidate_scores",
    "first_relevant_ranks",
    "hit_at_1",
    "ndcg_at_k",
    "rank_relevances",
    "reciprocal_rank_fusion",
    "two_way_ranks",
]

TIE_TOLERANCE = 1e-10
"""Scores that differ by no more are equal: above float64's rounding, below any real difference."""

Indices = Sequence[Sequence[int] | np.ndarray]
"""For each query, indices of candidates."""


def first_relevant_ranks(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    relevant: Indices,
    *,
    block: int = 1024,
) -> Int[np.ndarray, " n"]:
    """Rank of each query's best relevant candidate among all m candidates, 1-based, in [1, m].

    Args:
        queries: unit-normalised; half precision and float32 are widened block by block.
        candidates: unit-normalised; candidates that are relevant to no query are distractors.
        relevant: for each query, the indices of all its relevant candidates.
        block: queries and candidates per block of scores; 8 * block**2 bytes.

    Raises:
        DataError: a query without a relevant candidate, an index out of range or repeated, or
            an embedding with NaN or infinity.
        ValueError: shapes that do not fit, or a block below 1.
    """
    rows, columns = _relevant_pairs(queries, candidates, relevant, block)
    return _ranks(queries, candidates, rows, columns, block)[0]


def two_way_ranks(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    relevant: Indices,
    *,
    block: int = 1024,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """`first_relevant_ranks` of queries among candidates, and of candidates among queries.

    Every score is computed once and serves both directions.

    Raises:
        DataError: as there, and for a candidate that is relevant to no query.
        ValueError: as there.
    """
    rows, columns = _relevant_pairs(queries, candidates, relevant, block)
    lonely = np.flatnonzero(np.bincount(columns, minlength=len(candidates)) == 0)
    if lonely.size:
        raise DataError(
            f"target {lonely[0]} is relevant to no query, so it has no rank; remove it, or measure "
            "one direction with first_relevant_ranks"
        )
    return _ranks(queries, candidates, rows, columns, block)


def candidate_scores(
    queries: Float[np.ndarray, "n d"], candidates: Float[np.ndarray, "m d"], lists: Indices
) -> list[Float[np.ndarray, " c"]]:
    """Each query's scores of its own candidates, in the order of its list (MMEB's local lists).

    `candidates` holds every distinct candidate once; `lists[i]` are the indices that query i has to
    choose from. Float64, so that equal candidates tie (see the module's text). A list may name a
    candidate twice; the positive then ties with itself, which `hit_at_1` counts as a miss.

    Raises:
        DataError: an empty list, an index out of range, or an embedding with NaN or infinity.
        ValueError: shapes that do not fit.
    """
    rows, columns = _pairs(queries, candidates, lists)
    bounds = np.searchsorted(rows, np.arange(len(queries) + 1))
    return [
        candidates[columns[start:stop]].astype(np.float64) @ query.astype(np.float64)
        for query, (start, stop) in zip(queries, pairwise(bounds), strict=True)
    ]


def hit_at_1(scores: Sequence[Float[np.ndarray, " c"]]) -> Bool[np.ndarray, " n"]:
    """MMEB's hit@1 per query: does candidate 0, the positive, score above every other?

    A tie is a miss, and so is a NaN anywhere in the list. Scores from `candidate_scores`, or any
    others in which duplicates get equal numbers; their scale should be about 1 or larger.

    Raises:
        DataError: a query without candidates.
    """
    empty = [i for i, row in enumerate(scores) if len(row) == 0]
    if empty:
        raise DataError(f"query {empty[0]} has no candidates; the first one must be its positive")
    return np.array(
        [np.isfinite(row[0]) and bool((row[0] - row[1:] > TIE_TOLERANCE).all()) for row in scores],
        dtype=bool,
    )


def rank_relevances(
    scores: Float[np.ndarray, " c"], relevances: Float[np.ndarray, " c"]
) -> Float[np.ndarray, " c"]:
    """One query's relevances from the highest score to the lowest; among ties the least first.

    Scores within `TIE_TOLERANCE` of the next one form one tie. NaN scores come last, and there too
    the least relevant is first.

    Raises:
        ValueError: two arrays of different lengths.
    """
    if scores.shape != relevances.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and relevances {relevances.shape} must be alike")
    known = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-known)
    ordered = known[order]
    # -inf - -inf is NaN, which is no step down either: all unknown scores tie.
    with np.errstate(invalid="ignore"):
        lower = ordered[:-1] - ordered[1:] > TIE_TOLERANCE
    tie = np.concatenate([[0], np.cumsum(lower)])[: len(order)]
    return relevances[order][np.lexsort((relevances[order], tie))]


def ndcg_at_k(
    ranked: Float[np.ndarray, " r"],
    k: int,
    *,
    judged: Float[np.ndarray, " j"] | None = None,
) -> float:
    """NDCG with linear gain, MMEB-V2's `ndcg_linear`, of one query.

        DCG = sum over i = 1..k of relevance_i / log2(i + 1);   NDCG = DCG / DCG of the best order

    Args:
        ranked: relevances in rank order (`rank_relevances`), grades of 0 and more.
        k: how far down the list to look; a shorter list is not padded.
        judged: relevances of everything that is relevant to the query, for the best order; needed
            only where `ranked` was cut and may lack some of them.

    Raises:
        DataError: nothing is relevant (the measure is 0 / 0), or a negative or NaN relevance.
        ValueError: a k below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    pool = ranked if judged is None else judged
    if not ((ranked >= 0).all() and (pool >= 0).all()):
        raise DataError("a relevance is negative or NaN; grades must be 0 or more")
    best = _dcg(np.sort(pool)[::-1], k)
    if best == 0:
        raise DataError("the query has no relevant candidate, so NDCG is undefined; leave it out")
    return _dcg(ranked, k) / best


def reciprocal_rank_fusion(rankings: Sequence[Sequence[T]], k: int = 60) -> list[tuple[T, float]]:
    """Merge several orders of the same things by their ranks alone.

    The score of a thing is the sum of 1 / (k + rank) over the rankings that have it; ranks begin
    with 1 (Cormack, Clarke and Büttcher, SIGIR 2009; k = 60 is theirs).

    Args:
        rankings: each best first, without repetition; they may hold different things.
        k: the larger, the less the first ranks count more than later ones.

    Returns:
        All things with their scores, the highest first; of equal ones, that which came first in the
        earliest ranking that has it.
    """
    scores: dict[T, float] = {}
    for ranking in rankings:
        for rank, one in enumerate(ranking, 1):
            scores[one] = scores.get(one, 0.0) + 1.0 / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def _dcg(relevances: Float[np.ndarray, " r"], k: int) -> float:
    head = np.asarray(relevances[:k], dtype=np.float64)
    return float((head / np.log2(np.arange(2, len(head) + 2))).sum())


def _ranks(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    rows: Int[np.ndarray, " p"],
    columns: Int[np.ndarray, " p"],
    block: int,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Ranks both ways from one walk over the blocks of scores.

    rows, columns   the p relevant (query, candidate) pairs, sorted by query

    A candidate without a relevant query gets a meaningless rank, which is not used.
    """
    n, m = len(queries), len(candidates)
    query_floor, candidate_floor = np.full(n, -np.inf), np.full(m, -np.inf)
    for start in range(0, len(rows), block):
        row, column = rows[start : start + block], columns[start : start + block]
        scores = (_wide(queries[row]) * _wide(candidates[column])).sum(axis=1)
        np.maximum.at(query_floor, row, scores - TIE_TOLERANCE)
        np.maximum.at(candidate_floor, column, scores - TIE_TOLERANCE)

    query_ranks, candidate_ranks = np.ones(n, dtype=np.int64), np.ones(m, dtype=np.int64)
    for top in range(0, n, block):
        across = slice(top, top + block)
        some_queries = _wide(queries[across])
        first, last = np.searchsorted(rows, (top, top + block))
        row, column = rows[first:last] - top, columns[first:last]
        for left in range(0, m, block):
            down = slice(left, left + block)
            scores = some_queries @ _wide(candidates[down]).T
            here = (column >= left) & (column < left + block)
            scores[row[here], column[here] - left] = -np.inf  # positives do not compete
            query_ranks[across] += np.count_nonzero(scores >= query_floor[across, None], axis=1)
            candidate_ranks[down] += np.count_nonzero(scores >= candidate_floor[down], axis=0)
    return query_ranks, candidate_ranks


def _wide(embeddings: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
    return embeddings.astype(np.float64, copy=False)


def _relevant_pairs(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    relevant: Indices,
    block: int,
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """`_pairs`, and each pair once."""
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    rows, columns = _pairs(queries, candidates, relevant)
    pairs, times = np.unique(rows * len(candidates) + columns, return_counts=True)
    if (times > 1).any():
        row, column = divmod(int(pairs[times.argmax()]), len(candidates))
        raise DataError(f"query {row} names candidate {column} twice; name it once")
    return rows, columns


def _pairs(
    queries: Float[np.ndarray, "n d"], candidates: Float[np.ndarray, "m d"], lists: Indices
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """The (query, candidate) pairs of `lists`, sorted by query, after all checks."""
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"embeddings are {queries.shape} and {candidates.shape}; they must be [n, d] and [m, d]"
        )
    if len(queries) == 0 or len(lists) != len(queries):
        raise ValueError(f"{len(queries)} queries, {len(lists)} lists; give each query one list")
    for name, array in (("query", queries), ("candidate", candidates)):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if bad.size:
            raise DataError(f"the embedding of {name} {bad[0]} has NaN or infinity")
    counts = np.array([len(indices) for indices in lists], dtype=np.int64)
    if (counts == 0).any():
        raise DataError(f"query {counts.argmin()} has no candidate in its list; give it one")
    rows = np.repeat(np.arange(len(lists)), counts)
    columns = np.concatenate([np.asarray(indices) for indices in lists])
    if columns.dtype.kind not in "iu":
        raise ValueError(f"candidate indices are {columns.dtype}; they must be integers")
    columns = columns.astype(np.int64)
    outside = np.flatnonzero((columns < 0) | (columns >= len(candidates)))
    if outside.size:
        raise DataError(
            f"query {rows[outside[0]]} names candidate {columns[outside[0]]}; there are only "
            f"{len(candidates)}, counted from 0"
        )
    return rows, columns
