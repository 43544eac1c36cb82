"""Rows of similar length are computed together, which saves padding.

A chunk's rows are sorted by length and cut into blocks, each padded to its own longest row. Every
block is a forward of the language model; all are parts of one graph, with one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cafe.model.image_keys import MediaOrders

if TYPE_CHECKING:
    from jaxtyping import Int

BLOCK_COST = 512
"""What each further block costs, in tokens of a small model: its kernels have to be launched."""

_MOST_CUTS = 64
"""Number of places that are considered as the end of a block."""


@dataclass(frozen=True, slots=True)
class LengthBlock:
    """Rows of similar length that the language model computes together, cut to the longest.

    rows     number of rows
    width    number of tokens of the longest
    images   number of runs of placeholders in them that stand for images; `videos` for videos,
             `recordings` for recordings
    read     number of their tokens whose states are read
    """

    rows: int
    width: int
    images: int
    videos: int
    read: int
    recordings: int = 0


def length_blocks(lengths: Sequence[int], block_cost: int) -> list[int]:
    """Cut rows into blocks that are each padded to their longest row, at the least total cost.

    Args:
        lengths: numbers of tokens of the rows, in ascending order; at least one.
        block_cost: what each further block costs, in tokens.

    Returns:
        The number of rows of each block.
    """
    count = len(lengths)
    ends = sorted({count * i // _MOST_CUTS for i in range(1, _MOST_CUTS + 1)} - {0})
    best = {0: (0, 0)}  # end of a block -> cost up to there, beginning of the block
    for end in ends:
        cost = {b: c + (end - b) * lengths[end - 1] + block_cost for b, (c, _) in best.items()}
        begin = min(cost, key=cost.__getitem__)
        best[end] = cost[begin], begin
    sizes: list[int] = []
    end = count
    while end:
        begin = best[end][1]
        sizes.append(end - begin)
        end = begin
    return sizes[::-1]


def blocks_of(
    keys: Int[np.ndarray, "rows t"],
    lengths: Sequence[int],
    block_cost: int,
    orders: Callable[[np.ndarray], MediaOrders],
    read: Int[np.ndarray, " r"],
) -> tuple[LengthBlock, ...]:
    """The blocks of stacked rows; none where all are one block.

    Args:
        keys: of the tokens (`cafe.model.rows.trie`).
        lengths: of the rows, in ascending order.
        block_cost: what each further block costs, in tokens.
        orders: keys of some rows -> what their runs of placeholders stand for.
        read: flat indices, row * t + token, of the tokens that are read, in ascending order.
    """
    blocks: list[LengthBlock] = []
    begin = 0
    for size in length_blocks(lengths, block_cost):
        end = begin + size
        images, videos, recordings = orders(keys[begin:end])
        first, last = np.searchsorted(read, np.array([begin, end]) * keys.shape[1]).tolist()
        width = lengths[end - 1]
        shown = len(images), len(videos), last - first, len(recordings)
        blocks.append(LengthBlock(size, width, *shown))
        begin = end
    return tuple(blocks) if len(blocks) > 1 else ()
