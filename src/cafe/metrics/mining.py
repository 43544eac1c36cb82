"""Hard negatives: for each query, targets that score high and are not its own.

Candidates of a query are all targets but its relevant ones, best first (equal scores: lower index
first). The *window* (a, b) skips the a best, which are often right answers without a label, and
ends with the b-th. A *limit* relative to p, the score of the query's own target, then removes what
is still too close:

    margin   keeps s <= p - margin                      (sentence-transformers' absolute_margin)
    share    keeps s <= share * p                       (NV-Retriever's perc-pos, arXiv 2407.15831;
             for p < 0: s <= p - (1 - share) * |p|       sentence-transformers' relative_margin is
                                                         1 - share)

Of what remains, the `count` hardest are taken.

Shapes: n queries, m targets, d coordinates. Embeddings are unit-normalised by the caller, a score
is a dot product. Scores exist block x block at a time; per query only the b best so far are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = ["HardNegatives", "check_limits", "hard_negatives"]


@dataclass(frozen=True, slots=True, eq=False)
class HardNegatives:
    """The negatives of each query, hardest first.

    indices     int [n, count], the negatives' targets; -1 where there is none
    scores      float32 [n, count], NaN where there is none
    own_scores  float32 [n], of each query with its own target
    removed     candidates in the windows that the limits removed
    """

    indices: Int[np.ndarray, "n count"]
    scores: Float[np.ndarray, "n count"]
    own_scores: Float[np.ndarray, " n"]
    removed: int

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """Number of negatives of each query."""
        return (self.indices >= 0).sum(axis=1)


def hard_negatives(
    queries: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "m d"],
    relevant: Sequence[Sequence[int] | np.ndarray],
    *,
    window: tuple[int, int] = (10, 50),
    count: int = 7,
    margin: float | None = None,
    share: float | None = None,
    block: int = 1024,
) -> HardNegatives:
    """Find the hard negatives of every query; the module's docstring defines the terms.

    Args:
        queries: [n, d], unit-normalised.
        targets: [m, d], unit-normalised, each once.
        relevant: for each query the indices of the targets that are right; the first is its own,
            whose score the limits refer to.
        window: (a, b): skip the a best candidates, end with the b-th.
        count: maximum number of negatives per query.
        margin: keep what scores at least this much below the own target; None: no such limit.
        share: keep what scores at most this share of the own target; None: no such limit.
        block: queries and targets whose scores are in memory at one time.

    Raises:
        ValueError: shapes that do not fit, a query without a relevant target, an index out of
            range, a window without room for `count`, or a limit or block out of range.
    """
    _check(queries, targets, relevant, window, count, margin, share, block)
    n, depth = len(queries), window[1]
    own = np.array([int(r[0]) for r in relevant], dtype=np.int64)
    own_scores = np.einsum("nd,nd->n", _float32(queries), _float32(targets[own]))
    indices = np.full((n, count), -1, dtype=np.int64)
    scores = np.full((n, count), np.nan, dtype=np.float32)
    limits = _limits(own_scores, margin, share)
    removed = 0
    for start in range(0, n, block):
        rows = slice(start, start + block)
        best, found = _best(_float32(queries[rows]), targets, relevant[rows], depth, block)
        best, found = best[:, window[0] :], found[:, window[0] :]
        there = found >= 0
        near = there & (best > limits[rows, None])
        removed += int(near.sum())
        _take_first(best, found, there & ~near, scores[rows], indices[rows])
    return HardNegatives(indices, scores, own_scores, removed)


def _limits(
    own: Float[np.ndarray, " n"], margin: float | None, share: float | None
) -> Float[np.ndarray, " n"]:
    """The highest score that a negative of each query may have."""
    limits = np.full(len(own), np.inf, dtype=np.float32)
    if margin is not None:
        limits = np.minimum(limits, own - np.float32(margin))
    if share is not None:
        limits = np.minimum(limits, own - np.float32(1 - share) * np.abs(own))
    return limits


def _best(
    queries: Float[np.ndarray, "q d"],
    targets: Float[np.ndarray, "m d"],
    relevant: Sequence[Sequence[int] | np.ndarray],
    depth: int,
    block: int,
) -> tuple[Float[np.ndarray, "q depth"], Int[np.ndarray, "q depth"]]:
    """Scores and indices of the `depth` best irrelevant targets; -inf and -1 where none is."""
    best = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    found = np.full((len(queries), depth), -1, dtype=np.int64)
    row = np.repeat(np.arange(len(queries)), [len(r) for r in relevant])
    column = np.concatenate([np.asarray(r, dtype=np.int64) for r in relevant])
    for start in range(0, len(targets), block):
        scores = queries @ _float32(targets[start : start + block]).T
        here = (column >= start) & (column < start + scores.shape[1])
        scores[row[here], column[here] - start] = -np.inf
        packed, numbers = _above(scores, best[:, -1:])
        # What was found earlier has lower indices and stands first, so equal scores keep order.
        scores = np.hstack([best, packed])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        best = np.take_along_axis(scores, order, axis=1)
        numbers = np.hstack([found, np.where(numbers < 0, -1, numbers + start)])
        found = np.take_along_axis(numbers, order, axis=1)
    return best, found


def _above(
    scores: Float[np.ndarray, "q k"], least: Float[np.ndarray, "q 1"]
) -> tuple[Float[np.ndarray, "q w"], Int[np.ndarray, "q w"]]:
    """The scores above `least`, packed to the left in their order, and their columns; -inf and -1.

    After the first block few are left, and only those are sorted.
    """
    worth = scores > least
    places = np.cumsum(worth, axis=1, dtype=np.int32) - 1
    row, column = np.nonzero(worth)
    place = places[row, column]
    shape = (len(scores), int(place.max(initial=-1)) + 1)
    packed = np.full(shape, -np.inf, dtype=np.float32)
    numbers = np.full(shape, -1, dtype=np.int64)
    packed[row, place] = scores[row, column]
    numbers[row, place] = column
    return packed, numbers


def _take_first(
    best: Float[np.ndarray, "q k"],
    found: Int[np.ndarray, "q k"],
    allowed: Bool[np.ndarray, "q k"],
    scores: Float[np.ndarray, "q count"],
    indices: Int[np.ndarray, "q count"],
) -> None:
    """Write the first allowed entries of each row into `scores` and `indices`."""
    count = indices.shape[1]
    place = np.cumsum(allowed, axis=1) - 1
    row, column = np.nonzero(allowed & (place < count))
    indices[row, place[row, column]] = found[row, column]
    scores[row, place[row, column]] = best[row, column]


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float32)


def check_limits(
    window: tuple[int, int], count: int, margin: float | None, share: float | None
) -> None:
    """Check limits before anything is embedded.

    Raises:
        ValueError: a window without room for `count`, or a limit out of range.
    """
    low, high = window
    if count < 1 or low < 0 or high - low < count:
        raise ValueError(f"window is {low}-{high}, which has no room for {count} negatives")
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin is {margin}; use 0 or more")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}; use more than 0 and at most 1, e.g. 0.95")


def _check(
    queries: np.ndarray,
    targets: np.ndarray,
    relevant: Sequence[Sequence[int] | np.ndarray],
    window: tuple[int, int],
    count: int,
    margin: float | None,
    share: float | None,
    block: int,
) -> None:
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[1] != targets.shape[1]:
        raise ValueError(
            f"queries {queries.shape} and targets {targets.shape} must be (n, d) and (m, d)"
        )
    if len(relevant) != len(queries) or not all(len(r) for r in relevant):
        raise ValueError("relevant must name at least one target for each query")
    if any(not 0 <= int(i) < len(targets) for r in relevant for i in r):
        raise ValueError(f"relevant names a target outside 0 to {len(targets) - 1}")
    check_limits(window, count, margin, share)
    if block < 1:
        raise ValueError(f"block is {block}; use 1 or more")
