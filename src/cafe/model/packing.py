"""Which sequences of a batch share a row, so that what they begin with is computed once.

A trie row of k sequences saves their common beginnings (a system turn, an instruction, a picture
that many questions are about), and costs attention between tokens that do not see each other: its
mask is dense. So a batch is put in order, equal beginnings side by side, and cut into equal parts;
how many parts is what the estimate finds cheapest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


def shared_rows(keys: Sequence[np.ndarray], token_cost: float) -> list[list[int]]:
    """Indices of `keys` (int64 [t] each, see `cafe.model.trie`), a list for each row.

    token_cost   of the matrices, for one token, in tokens that it could attend to instead
    """
    if not keys:
        return []
    order = sorted(range(len(keys)), key=lambda i: keys[i].tobytes())
    lengths = np.array([len(keys[i]) for i in order])
    common = np.array([0, *(_common(keys[a], keys[b]) for a, b in pairwise(order))])

    def cost(begins: np.ndarray) -> float:
        """Of all rows, each padded to the longest."""
        added = lengths - common
        added[begins] = lengths[begins]
        longest = int(np.add.reduceat(added, begins).max())
        return len(begins) * longest * (token_cost + longest)

    best = min(_cuts(len(keys)), key=cost)
    return [part.tolist() for part in np.split(np.array(order), best[1:])]


def _cuts(count: int) -> Iterator[np.ndarray]:
    """Where the parts begin: as many as there are sequences, half as many, … and one."""
    rows = count
    while True:
        yield np.arange(rows) * count // rows
        if rows == 1:
            return
        rows = (rows + 1) // 2


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first keys are equal."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length
