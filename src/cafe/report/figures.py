"""What all figures share: the map of embeddings, the colours, quiet axes and writing PNG files.

A map shows where images and texts lie on the principal axes of both together; the two differ in
marker as well as in colour. The colours are those of Okabe and Ito, which people with any kind of
colour vision can tell apart. Figures use matplotlib's file backend, so nothing opens a window.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cafe.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, LINE = "#222222", "#6b6b6b", "#d9d9d9"


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
    axes.scatter(*images.T, s=size, c=BLUE, marker="o", label="images", **marks)
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


def quiet(axes: Axes) -> None:
    """Only the axes that carry numbers, in a quiet grey."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    ticks: Any = {"colors": GREY, "labelsize": 8.5}
    axes.tick_params(**ticks)


def write_png(figure: Figure, path: Path) -> None:
    """Raises DataError when the file cannot be written."""
    try:
        FigureCanvasAgg(figure).print_png(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
