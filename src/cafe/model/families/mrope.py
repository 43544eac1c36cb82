"""M-RoPE: the positions of Qwen-VL, which count time, height and width apart.

Text counts one position per token on all axes alike. A picture lies on a grid that begins at the
position where it stands; its longer side is how far the text after it moves on. This is the rule
of the models' own `get_rope_index`, as a function of one sequence alone: it needs no weights, so
it runs where the data is made, and equal beginnings of sequences get equal positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cafe.model.families.base import Grid
from cafe.model.trie import image_of_key, picture_runs


def mrope_positions(keys: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Keys [t] of one sequence -> int64 [4, t]: depth, time, height, width.

    grids   of the pictures that the keys name
    """
    positions = np.empty((4, len(keys)), dtype=np.int64)
    positions[0] = np.arange(len(keys))
    position = placed = 0
    for begin, end in picture_runs(keys):
        positions[1:, placed:begin] = position + np.arange(begin - placed)
        position += begin - placed
        picture, first = image_of_key(int(keys[begin]))
        grid = grids[picture]
        positions[1:, begin:end] = position + _offsets(grid)[:, first : first + end - begin]
        position += max(grid.lines, grid.columns)
        placed = end
    positions[1:, placed:] = position + np.arange(len(keys) - placed)
    return positions


def _offsets(grid: Grid) -> np.ndarray:
    """int64 [3, features]: each feature's time, height and width from the grid's corner."""
    time, height, width = np.indices((grid.frames, grid.lines, grid.columns)).reshape(3, -1)
    # float32, as in the models.
    time = (np.float32(grid.time_step) * time.astype(np.float32)).astype(np.int64)
    return np.stack([time, height, width])
