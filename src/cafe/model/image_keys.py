"""The keys of image placeholders: which image a token stands for, and which of its features.

A sequence is compared with others by its keys (`cafe.model.rows.trie`). A text token is its own
key, 0 or more. All placeholders share one token id, so each has a negative key, which names the
image and the feature:

    key = -(image * 2^32 + index + 1)

This module stands apart because both sides need it: `rows`, which makes and merges keys, and
`families`, whose positions depend on where the images of a sequence lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int

IMAGE_STRIDE = 1 << 32

MediaOrders = tuple[list[int], list[int], list[int]]
"""Which images, which videos and which recordings the runs of placeholders stand for, in order."""


def image_keys(image: int, count: int) -> Int[np.ndarray, " count"]:
    """Keys of the `count` placeholders of image number `image`: negative, so never a text's."""
    return -(np.int64(image) * IMAGE_STRIDE + np.arange(count, dtype=np.int64) + 1)


def image_of_key(key: int) -> tuple[int, int]:
    """The image, and the index of its feature, that a negative key stands for."""
    return divmod(-int(key) - 1, IMAGE_STRIDE)


def images_in_order(keys: Int[np.ndarray, "rows t"]) -> list[int]:
    """The image of every whole run of placeholders, in order: where its first feature stands."""
    placeholders = keys[keys < 0]
    firsts = placeholders[(-placeholders - 1) % IMAGE_STRIDE == 0]
    return [image_of_key(key)[0] for key in firsts]


def image_runs(keys: Int[np.ndarray, " t"]) -> list[tuple[int, int]]:
    """The (begin, end) of each run of one image's placeholders, in order."""
    at = np.flatnonzero(keys < 0)
    if len(at) == 0:
        return []
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(keys[at]) != -1)) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(at, breaks)]


def visible_until(keys: Int[np.ndarray, "rows t"]) -> Int[np.ndarray, "rows t"]:
    """How far ahead each token may look where an image's tokens see each other (Gemma3).

    The end of its own run of image placeholders; for a text token the index after itself.
    """
    ends = np.broadcast_to(np.arange(1, keys.shape[1] + 1), keys.shape).copy()
    for r, row in enumerate(keys):
        for begin, end in image_runs(row):
            ends[r, begin:end] = end
    return ends
