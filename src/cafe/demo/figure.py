"""The figure of the demo: loss curves, one example search, and maps of the embeddings."""

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
from cafe.report.figures import GREEN, GREY, INK, LINE, quiet, scatter, write_png

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

_INCHES = (12.0, 8.4)
_STRIP_INCHES = 3.5  # of a second search
_DPI = 150
_QUERY_CHARACTERS = 110  # per line


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses by step: `contrastive` in nats per pair, `language` in nats per token."""

    steps: Sequence[int]
    contrastive: Sequence[float]
    language: Sequence[float]


@dataclass(frozen=True, slots=True)
class FigureHit:
    """One hit of a search; `correct` for the image that the query describes."""

    image: PIL.Image.Image
    score: float
    correct: bool


@dataclass(frozen=True, slots=True)
class ExampleSearch:
    """A query, its hits (best first), and the rank of the correct image among `candidates`."""

    text: str
    hits: Sequence[FigureHit]
    rank: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Clouds:
    """Embeddings of images [n, d] and texts [m, d], drawn as two point clouds."""

    images: Float[np.ndarray, "n d"]
    texts: Float[np.ndarray, "m d"]


def draw_demo(
    path: Path,
    curves: Curves,
    search: ExampleSearch,
    before: Clouds,
    after: Clouds,
    mended: ExampleSearch | None = None,
) -> None:
    """Write the demo's figure to `path` (PNG, about 1800 x 1260 pixels; higher with `mended`).

    Each map shows the two principal axes of its own embeddings: the coordinates of the two models
    are not comparable.

    Args:
        path: The file to write.
        curves: Losses of the training run.
        search: The example search with the fine-tuned model.
        before: Embeddings of the base model.
        after: Embeddings of the fine-tuned model.
        mended: The same search among images that are embedded with the model's own captions.

    Raises:
        DataError: the file cannot be written.
    """
    searches = [(search, "Search: a caption retrieves its image")]
    if mended is not None:
        searches = [
            (search, "Search by the image's embedding alone"),
            (mended, "The same search, images embedded with the captions that the model writes"),
        ]
    width, height = _INCHES
    height += _STRIP_INCHES * (len(searches) - 1)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    rows = figure.add_gridspec(
        1 + len(searches), 1, height_ratios=(1.4, *[1.0] * len(searches)), left=0.065, right=0.98,
        top=1 - 0.085 * _scale(figure), bottom=0.03 * _scale(figure), hspace=0.56,
    )  # fmt: skip
    top = rows[0].subgridspec(1, 3, width_ratios=(1.15, 1.0, 1.0), wspace=0.2)
    losses = top[0].subgridspec(2, 1, hspace=0.18)
    upper = figure.add_subplot(losses[0])
    lower = figure.add_subplot(losses[1], sharex=upper)
    _draw_curves(upper, lower, curves)
    maps = [figure.add_subplot(top[column]) for column in (1, 2)]
    for axes, name, clouds in zip(maps, ("before", "after"), (before, after), strict=True):
        _draw_map(axes, name, clouds)
    # The headings come last, when all axes have their frames, so that those of a row align.
    for row, (one, heading) in enumerate(searches, 1):
        strip = rows[row].subgridspec(1, max(1, len(one.hits)), wspace=0.16)
        panels = [figure.add_subplot(strip[column]) for column in range(len(one.hits))]
        _draw_search(figure, panels, one, heading)
    _heading(figure, upper, "Training")
    _heading(figure, maps[0], "Embeddings of images and texts")
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
        axes.yaxis.set_label_coords(-0.115, 0.5)  # aligns the labels of both panels
    upper.tick_params(labelbottom=False)
    upper.set_ylim(bottom=0)
    lower.set_xlabel("step", color=INK, fontsize=9.5)


def smooth(values: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Moving average; the window extends a thirtieth of the length to either side."""
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


def _draw_search(figure: Figure, axes: Sequence[Axes], search: ExampleSearch, heading: str) -> None:
    for rank, (panel, hit) in enumerate(zip(axes, search.hits, strict=True), start=1):
        panel.imshow(np.asarray(hit.image), interpolation="bicubic")
        panel.set_anchor("N")
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_color(GREEN if hit.correct else LINE)
            spine.set_linewidth(4.5 if hit.correct else 0.8)
        label = f"{rank}.  {hit.score:.2f}" + ("   correct image" if hit.correct else "")
        panel.set_xlabel(
            label,
            fontsize=10,
            color=GREEN if hit.correct else GREY,
            fontweight="bold" if hit.correct else "normal",
            labelpad=6,
        )
    if not axes:
        return
    note = f"the correct image is ranked {search.rank} of {search.candidates}"
    lines = textwrap.wrap(f"“{search.text}”   ({note})", _QUERY_CHARACTERS)
    left, top = _corner(axes[0])
    figure.text(
        left, top + 0.018 * _scale(figure), "\n".join(lines), fontsize=10.5, color=INK, va="bottom",
        style="italic", linespacing=1.35,
    )  # fmt: skip
    _heading(
        figure,
        axes[0],
        heading,
        0.03 + 0.025 * len(lines),
    )


def _heading(figure: Figure, axes: Axes, text: str, above: float = 0.04) -> None:
    left, top = _corner(axes)
    above *= _scale(figure)
    figure.text(left, top + above, text, fontsize=13, fontweight="bold", color=INK, va="bottom")


def _scale(figure: Figure) -> float:
    """A part of the height of the plain figure, as a part of this one's."""
    return _INCHES[1] / figure.get_figheight()


def _corner(axes: Axes) -> tuple[float, float]:
    """The upper left corner in figure coordinates, before the aspect ratio moves it."""
    box = axes.get_position(original=True)
    return box.x0, box.y1
