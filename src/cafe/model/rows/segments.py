"""Rows that branch, for layers that carry a state along the sequence.

What a layer needs to continue a prefix decides how rows may branch:

    attention             the keys and values of the prefix's tokens: a mask chooses them
                          (`cafe.model.rows.trie.AttentionRule`)
    causal convolution    the inputs of its last `kernel - 1` tokens: a gather along the branch
    recurrence            the state after its last token: the walk below

A mask cannot separate branches of a recurrence, because its state has passed through every token
of the row. So the trie is cut into *segments*, its unbranched runs of tokens, and walked by depth:
all segments of one depth are a batch, and each starts from the state at the end of its parent.
Packed sequences are segments without a parent. Every state equals the one its sequence would have
in a row of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Segments of one depth and similar length, padded on the right.

    All indices are made once for a batch of rows, and serve every layer.

    tokens    int64 [s, l]  flat index, row * t + token; at the padding, the segment's first token
    real      bool [s, l]   False at the padding
    unpadded  int64 [n]     where the real tokens are in `tokens`, flattened
    taken     int64 [n]     the real tokens, one segment after the other
    begins    int64 [s + 1] where each segment begins in `taken`, and n
    parents   int64 [s]     whose final state each starts from, as an index of all states kept by
                            the batches before; None: they start from nothing
    keeps     whether later segments start from the final states of these
    """

    tokens: Int[Tensor, "s l"]
    real: Bool[Tensor, "s l"]
    unpadded: Int[Tensor, " n"]
    taken: Int[Tensor, " n"]
    begins: Int[Tensor, " b"]
    parents: Int[Tensor, " s"] | None
    keeps: bool


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a batch of rows.

    before    int64 [rows * t + 1]  flat index of the token before each in its sequence; rows * t
              where there is none, and for that index itself
    batches   in the order in which their states are known
    taken     int64 [rows * t]  the tokens of all batches, in their order
    """

    before: Int[Tensor, " n"]
    batches: tuple[SegmentBatch, ...]
    taken: Int[Tensor, " t"]

    @classmethod
    def of(cls, subtree_end: Int[Tensor, "rows t"]) -> Segments:
        """Find the segments of rows, padded ones too (`cafe.model.rows.trie.stack_rows`)."""
        ends, device = subtree_end.cpu().numpy(), subtree_end.device
        before = np.full(ends.size + 1, ends.size, dtype=np.int64)
        of_row = before[:-1].reshape(ends.shape)
        runs: list[_Run] = []
        for row, row_ends in enumerate(ends):
            _cut(row, row_ends, of_row[row], runs)
        batches = tuple(_batches(runs, device))
        return cls(
            torch.from_numpy(before).to(device),
            batches,
            torch.cat([batch.taken for batch in batches]),
        )


class _Run(NamedTuple):
    """One segment: flat indices of its tokens, its depth, and its parent among the runs."""

    begin: int
    end: int
    depth: int
    parent: int


def _cut(row: int, ends: np.ndarray, before: np.ndarray, runs: list[_Run]) -> None:
    """Append the segments of a row, parents first, and write which token comes before each."""
    length = len(ends)
    index = np.arange(length)
    follows = np.zeros(length, dtype=bool)  # the token before it in the row is its parent
    follows[1:] = (ends[:-1] > index[1:]) & (ends[:-1] == ends[1:])
    before[1:][follows[1:]] = row * length + index[:-1][follows[1:]]
    starts = np.flatnonzero(~follows)
    stops = np.append(starts[1:], length)
    branch: list[int] = []  # the runs above the current token, outermost first
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        while branch and ends[runs[branch[-1]].end - 1 - row * length] <= start:
            branch.pop()
        if branch:
            before[start] = runs[branch[-1]].end - 1
        parent = branch[-1] if branch else -1
        runs.append(_Run(row * length + start, row * length + stop, len(branch), parent))
        if ends[stop - 1] > stop:
            branch.append(len(runs) - 1)


def _batches(runs: list[_Run], device: torch.device) -> list[SegmentBatch]:
    """Segments of one depth whose lengths differ by less than a factor of two are one batch."""
    parents = {run.parent for run in runs}
    groups: dict[tuple[int, bool, int], list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        leaf = number not in parents
        groups[run.depth, leaf, (run.end - run.begin - 1).bit_length()].append(number)
    kept: dict[int, int] = {}
    batches = []

    def on(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    for (depth, leaf, _), members in sorted(groups.items()):
        begins = np.array([runs[m].begin for m in members])
        lengths = np.array([runs[m].end - runs[m].begin for m in members])
        steps = np.arange(lengths.max())
        real = steps < lengths[:, None]
        tokens = np.where(real, begins[:, None] + steps, begins[:, None])
        above = None if depth == 0 else np.array([kept[runs[m].parent] for m in members])
        if not leaf:
            kept |= {m: len(kept) + i for i, m in enumerate(members)}
        batches.append(
            SegmentBatch(
                tokens=on(tokens),
                real=on(real),
                unpadded=on(np.flatnonzero(real)),
                taken=on(tokens[real]),
                begins=on(np.cumsum([0, *lengths])),
                parents=None if above is None else on(above),
                keeps=not leaf,
            )
        )
    return batches
