"""How every figure looks: colours of Okabe and Ito, which people of all kinds of colour vision tell
apart, quiet axes, and matplotlib's file backend, so that nothing opens a window.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cafe.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, LINE = "#222222", "#6b6b6b", "#d9d9d9"


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
