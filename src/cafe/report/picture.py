"""The picture of a demo: how it learned, what it finds, and where its embeddings lie."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from cafe.metrics import modality_gap, project_2d
from cafe.report.map import scatter
from cafe.report.style import GREEN, GREY, INK, LINE, quiet, write_png

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

_INCHES = (12.0, 8.4)
_DPI = 150
_QUERY_CHARACTERS = 110  # per line


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses by step: `contrastive` in nats per pair, `language` in nats per token."""

    steps: Sequence[int]
    contrastive: Sequence[float]
    language: Sequence[float]


@dataclass(frozen=True, slots=True)
class Found:
    """One hit of a search; `right` for the picture that the text is about."""

    image: PIL.Image.Image
    score: float
    right: bool


@dataclass(frozen=True, slots=True)
class Search:
    """A text, what it found (best first), and the rank of the right picture among `candidates`."""

    text: str
    found: Sequence[Found]
    rank: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Clouds:
    """Embeddings of pictures [n, d] and of texts [m, d]."""

    images: Float[np.ndarray, "n d"]
    texts: Float[np.ndarray, "m d"]


def draw_demo(path: Path, curves: Curves, search: Search, before: Clouds, after: Clouds) -> None:
    """Write the picture of a demo to `path` (PNG, about 1800 x 1260 pixels).

    Each map shows the two principal axes of its own embeddings: the two models' coordinates have
    nothing in common.

    Raises:
        DataError: the file cannot be written.
    """
    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white")
    rows = figure.add_gridspec(
        2, 1, height_ratios=(1.4, 1.0), left=0.065, right=0.98, top=0.915, bottom=0.03, hspace=0.56
    )
    top = rows[0].subgridspec(1, 3, width_ratios=(1.15, 1.0, 1.0), wspace=0.2)
    losses = top[0].subgridspec(2, 1, hspace=0.18)
    upper = figure.add_subplot(losses[0])
    lower = figure.add_subplot(losses[1], sharex=upper)
    _draw_curves(upper, lower, curves)
    maps = [figure.add_subplot(top[column]) for column in (1, 2)]
    for axes, name, clouds in zip(maps, ("before", "after"), (before, after), strict=True):
        _draw_map(axes, name, clouds)
    # After the axes have their frames, so that all titles of a row stand at one height.
    strip = rows[1].subgridspec(1, max(1, len(search.found)), wspace=0.16)
    pictures = [figure.add_subplot(strip[place]) for place in range(len(search.found))]
    _draw_search(figure, pictures, search)
    _heading(figure, upper, "Training")
    _heading(figure, maps[0], "Embeddings of pictures and texts")
    write_png(figure, path)


def _draw_curves(upper: Axes, lower: Axes, curves: Curves) -> None:
    rows = (
        (upper, curves.contrastive, GREEN, "contrastive loss"),
        (lower, curves.language, INK, "language loss"),
    )
    for axes, values, colour, name in rows:
        axes.plot(curves.steps, values, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(curves.steps, smooth(values), color=colour, linewidth=1.8)
        axes.set_ylabel(name, color=INK, fontsize=9.5)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.margins(x=0.01)
        quiet(axes)
        axes.yaxis.set_label_coords(-0.115, 0.5)  # both names on one line
    upper.tick_params(labelbottom=False)
    upper.set_ylim(bottom=0)
    lower.set_xlabel("step", color=INK, fontsize=9.5)


def smooth(values: Sequence[float]) -> Float[np.ndarray, " n"]:
    """The mean of each value and its neighbours, about a thirtieth of all on either side."""
    array = np.asarray(values, dtype=np.float64)
    reach = len(array) // 30
    sums = np.concatenate([[0.0], np.cumsum(array)])
    first = np.maximum(np.arange(len(array)) - reach, 0)
    last = np.minimum(np.arange(len(array)) + reach + 1, len(array))
    return (sums[last] - sums[first]) / (last - first)


def _draw_map(axes: Axes, name: str, clouds: Clouds) -> None:
    images, texts = project_2d(clouds.images, clouds.texts)
    scatter(axes, images, texts)
    gap = modality_gap(clouds.images, clouds.texts)
    axes.set_title(f"{name}: gap {gap:.2f}", fontsize=10, color=INK, pad=6)
    if name == "before":
        legend = axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, fontsize=9.5,
            handletextpad=0.2, columnspacing=1.2, markerscale=1.6,
        )  # fmt: skip
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def _draw_search(figure: Figure, axes: Sequence[Axes], search: Search) -> None:
    for place, (panel, found) in enumerate(zip(axes, search.found, strict=True), start=1):
        panel.imshow(np.asarray(found.image), interpolation="bicubic")
        panel.set_anchor("N")
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_color(GREEN if found.right else LINE)
            spine.set_linewidth(4.5 if found.right else 0.8)
        label = f"{place}.  {found.score:.2f}" + ("   the right one" if found.right else "")
        panel.set_xlabel(
            label,
            fontsize=10,
            color=GREEN if found.right else GREY,
            fontweight="bold" if found.right else "normal",
            labelpad=6,
        )
    if not axes:
        return
    place = f"the right one is number {search.rank} of {search.candidates}"
    lines = textwrap.wrap(f"“{search.text}”   ({place})", _QUERY_CHARACTERS)
    left, high = _corner(axes[0])
    figure.text(
        left, high + 0.018, "\n".join(lines), fontsize=10.5, color=INK, va="bottom",
        style="italic", linespacing=1.35,
    )  # fmt: skip
    _heading(figure, axes[0], "Search: a text finds its picture", 0.03 + 0.025 * len(lines))


def _heading(figure: Figure, axes: Axes, text: str, above: float = 0.04) -> None:
    left, high = _corner(axes)
    figure.text(left, high + above, text, fontsize=13, fontweight="bold", color=INK, va="bottom")


def _corner(axes: Axes) -> tuple[float, float]:
    """The upper left corner in shares of the figure, before an aspect ratio moves it."""
    box = axes.get_position(original=True)
    return box.x0, box.y1
