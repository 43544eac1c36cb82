"""M-RoPE: the positions of Qwen-VL, which count time, height and width separately.

Text advances one position per token on all axes. An image is a grid that begins at its own
position; the text after it advances by the grid's longer side. This is the rule of the models'
`get_rope_index`, as a function of one sequence: it needs no weights, so it runs during collation,
and equal beginnings of sequences get equal positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.model.families.base import Grid
from cafe.model.image_keys import image_of_key, image_runs

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int


def mrope_positions(
    keys: Int[np.ndarray, " t"], grids: Sequence[Grid | None], *, after_time: bool = False
) -> Int[np.ndarray, "4 t"]:
    """Positions of one sequence: depth, time, height, width.

    Args:
        keys: of the sequence (`cafe.model.image_keys`).
        grids: of the images that the keys name; None: counted like text.
        after_time: a video's time counts, too, for where the text after it begins (Qwen-Omni).
    """
    positions = np.empty((4, len(keys)), dtype=np.int64)
    positions[0] = np.arange(len(keys))
    position = placed = 0
    for begin, end in image_runs(keys):
        image, first = image_of_key(int(keys[begin]))
        if (grid := grids[image]) is None:
            continue
        positions[1:, placed:begin] = position + np.arange(begin - placed)
        position += begin - placed
        offsets = _offsets(grid)
        positions[1:, begin:end] = position + offsets[:, first : first + end - begin]
        position += int(offsets.max()) + 1 if after_time else max(grid.lines, grid.columns)
        placed = end
    positions[1:, placed:] = position + np.arange(len(keys) - placed)
    return positions


def _offsets(grid: Grid) -> np.ndarray:
    """Each feature's time, height and width from the grid's corner, int64 [3, features]."""
    time, height, width = np.indices((grid.frames, grid.lines, grid.columns)).reshape(3, -1)
    # float32, as in the models.
    time = (np.float32(grid.time_step) * time.astype(np.float32)).astype(np.int64)
    return np.stack([time, height, width])
