"""Groups of alike pairs, for batches in which the other targets are hard to tell from one's own.

B3 (arXiv 2505.11293) mines batches, not negatives. A teacher ranks all targets for each query; of
the ranking a *window* counts, because the very best are often right answers without a label. Two
pairs are *neighbours* if each one's target is in the window of the other's query. A batch should
hold many neighbours, so this sparse graph is divided into groups of equal size.

B3 divides it with METIS, which minimises the number of cut edges, and afterwards moves members
between groups until all are of one size. Here a group grows from a random pair by the free pair
that has most neighbours in it, as METIS begins on a small graph (greedy graph growing, Karypis &
Kumar 1998). Groups are small (a batch, or a part of one), and then this keeps as many edges, or
more: docs/log.md has the comparison. It needs no compiled library, gives exact sizes, and keeps
pairs apart that are right for one another.

Shapes: n pairs, m ranks of the window, t targets, d coordinates.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float, Int

__all__ = ["groups_of_neighbours", "hardest_in_group", "mutual_neighbours"]

Relevant = Sequence[Sequence[int] | np.ndarray]


def mutual_neighbours(
    window: Int[np.ndarray, "n m"], target_of: Int[np.ndarray, " n"]
) -> list[Int[np.ndarray, " k"]]:
    """The neighbours of each pair, in ascending order.

    Args:
        window: the targets in the window of each query; -1 where there is none.
        target_of: the target of each pair; several pairs may have the same.
    """
    n = len(window)
    by_target = np.argsort(target_of, kind="stable")
    pair, column = np.nonzero(window >= 0)
    wanted = window[pair, column]
    first = np.searchsorted(target_of[by_target], wanted, side="left")
    counts = np.searchsorted(target_of[by_target], wanted, side="right") - first
    before = np.repeat(np.cumsum(counts) - counts, counts)
    other = by_target[np.repeat(first, counts) + np.arange(counts.sum()) - before]
    pair = np.repeat(pair, counts)
    edges, back = np.unique(pair * n + other), np.unique(other * n + pair)
    both = np.intersect1d(edges, back, assume_unique=True)
    both = both[both // n != both % n]
    return np.split(both % n, np.searchsorted(both // n, np.arange(1, n)))


def groups_of_neighbours(
    neighbours: Sequence[Int[np.ndarray, " k"]],
    target_of: Int[np.ndarray, " n"],
    relevant: Relevant,
    *,
    size: int,
    seed: int = 0,
) -> list[list[int]]:
    """Every pair in one group. Groups have `size` pairs, but for the last ones.

    Two pairs are not in one group if the target of one is right for the query of the other. A group
    for which no pair is left that fits stays smaller.

    Args:
        neighbours: of each pair; symmetric.
        target_of: the target of each pair.
        relevant: all right targets of each pair's query.
        size: of a group, at least 2.
        seed: decides where groups begin, and between pairs with equally many neighbours.

    Raises:
        ValueError: a size below 2.
    """
    if size < 2:
        raise ValueError(f"size is {size}; a group has at least 2 pairs")
    order = np.random.default_rng(seed).permutation(len(neighbours)).tolist()
    turn = np.argsort(order).tolist()
    free, groups = set(order), list[list[int]]()
    while free:
        if len(order) > 2 * len(free):  # each search begins at the front: forget what is taken
            order = [pair for pair in order if pair in free]
        group = _Group(target_of, relevant)
        heap: list[tuple[int, int, int, int]] = []
        others = iter(order)
        while len(group.pairs) < size:
            pair = None
            while heap and pair is None:
                count, _, _, nearest = heapq.heappop(heap)
                # A pair is there once for each of its links; only the last entry counts.
                if nearest in free and group.links[nearest] == -count and group.fits(nearest):
                    pair = nearest
            if pair is None:  # none of the neighbours is left: a random one
                pair = next((one for one in others if one in free and group.fits(one)), None)
            if pair is None:
                break
            free.remove(pair)
            for other in group.add(pair, neighbours[pair].tolist()):
                if other in free:
                    entry = (-group.links[other], len(neighbours[other]), turn[other], other)
                    heapq.heappush(heap, entry)
        groups.append(group.pairs)
    return groups


class _Group:
    """A group that grows.

    pairs   its members
    links   pair -> how many members are its neighbours
    """

    def __init__(self, target_of: Int[np.ndarray, " n"], relevant: Relevant) -> None:
        self._target_of, self._relevant = target_of, relevant
        self.pairs: list[int] = []
        self.links: Counter[int] = Counter()
        self._own: set[int] = set()
        self._right: set[int] = set()

    def fits(self, pair: int) -> bool:
        """Whether neither the pair's target is right for a member, nor the reverse."""
        right = map(int, self._relevant[pair])
        return int(self._target_of[pair]) not in self._right and self._own.isdisjoint(right)

    def add(self, pair: int, neighbours: list[int]) -> list[int]:
        """Add a member; returns its neighbours."""
        self.pairs.append(pair)
        self.links.update(neighbours)
        self._own.add(int(self._target_of[pair]))
        self._right.update(map(int, self._relevant[pair]))
        return neighbours


def hardest_in_group(
    queries: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "t d"],
    target_of: Int[np.ndarray, " n"],
    relevant: Relevant,
    groups: Sequence[Sequence[int]],
) -> Float[np.ndarray, " n"]:
    """The score of each query's best wrong target among those of its group; NaN without one."""
    best = np.full(len(queries), np.nan)
    for group in groups:
        members = np.asarray(group, dtype=np.int64)
        own = target_of[members]
        scores = (queries[members] @ targets[own].T).astype(np.float64)
        for row, pair in enumerate(group):
            scores[row, np.isin(own, np.asarray(relevant[pair]))] = -np.inf
        found = scores.max(axis=1)
        best[members] = np.where(np.isfinite(found), found, np.nan)
    return best
