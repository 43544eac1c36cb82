"""A map of embeddings: where pictures and texts lie, on the principal axes of both together.

Pictures and texts differ in shape as well as in colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from cafe.report.style import BLUE, GREY, INK, LINE, ORANGE, write_png

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes


def draw_map(
    path: Path, images: Float[np.ndarray, "n 2"], texts: Float[np.ndarray, "m 2"], gap: float
) -> None:
    """Write one map to `path` (PNG, about 780 x 720 pixels), the modality gap in its title.

    Raises:
        DataError: the file cannot be written.
    """
    figure = Figure(figsize=(5.2, 4.8), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    scatter(axes, images, texts)
    axes.set_title(f"modality gap {gap:.2f}", fontsize=11, color=INK)
    axes.set_xlabel("first principal axis", fontsize=9, color=GREY)
    axes.set_ylabel("second principal axis", fontsize=9, color=GREY)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, markerscale=1.6)
    write_png(figure, path)


def scatter(
    axes: Axes,
    images: Float[np.ndarray, "n 2"],
    texts: Float[np.ndarray, "m 2"],
    *,
    size: float = 13,
) -> None:
    """Both clouds in a frame without numbers: only distances mean something. `size` in points²."""
    marks = {"alpha": 0.55, "linewidths": 0}
    axes.scatter(*images.T, s=size, c=BLUE, marker="o", label="pictures", **marks)
    axes.scatter(*texts.T, s=1.15 * size, c=ORANGE, marker="^", label="texts", **marks)
    axes.margins(0.08)
    empty_map(axes)


def empty_map(axes: Axes) -> None:
    """The frame of a map."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    for spine in axes.spines.values():
        spine.set_color(LINE)
