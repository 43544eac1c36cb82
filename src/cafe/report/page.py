"""One self-contained page: curves as inline SVG, tables, images. It needs no network.

Charts are drawn at the width of a phone and stand beside one another on wider screens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.ticker import MaxNLocator

BINS = 180
"""Most points of a curve; more steps are drawn as the means of equal shares of them."""
WIDTH, HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 10.0, 10.0, 24.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Values of one run over its steps. `run` is its number, which decides the colour."""

    run: int
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table; the first column names its rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page. Charts are dicts as `chart` returns them, maps as `scatter_map` does."""

    title: str
    text: str = ""
    charts: Sequence[dict[str, Any]] = ()
    tables: Sequence[tuple[str, PageTable]] = ()
    samples: Sequence[dict[str, Any]] = ()
    searches: Sequence[dict[str, Any]] = ()
    maps: Sequence[dict[str, Any]] = ()
    texts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. `runs` are the names of the colours."""

    title: str
    runs: Sequence[str]
    sections: Sequence[PageSection]
    notices: Sequence[str] = field(default_factory=tuple)


def rendered(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page)


@cache
def _template() -> Any:
    text = files("cafe.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def chart(title: str, curves: Sequence[Curve]) -> dict[str, Any] | None:
    """The geometry of a chart; None: no curve has a finite value."""
    drawn = [(curve, _binned(curve)) for curve in curves]
    every = [point for _, points in drawn for point in points]
    if not every:
        return None
    x_low, x_high = _range([x for x, _ in every], pad=0.0)
    y_low, y_high = _range([y for _, y in every], pad=0.06)

    def at_x(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def at_y(y: float) -> float:
        return round(
            HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 1
        )

    return {
        "title": title,
        "x_ticks": [(at_x(x), number(x)) for x in _ticks(x_low, x_high, 5, integer=True)],
        "y_ticks": [(at_y(y), number(y)) for y in _ticks(y_low, y_high, 4)],
        "curves": [
            {
                "run": curve.run,
                "points": " ".join(f"{at_x(x)},{at_y(y)}" for x, y in points),
                "dots": [(at_x(x), at_y(y)) for x, y in points] if len(points) <= 12 else [],
                "data": ";".join(f"{x:g},{number(y)},{at_x(x)}" for x, y in points),
                "last": number(points[-1][1]),
            }
            for curve, points in drawn
            if points
        ],
    }


def scatter_map(
    title: str, sides: Sequence[str], points: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """The geometry of a map of embeddings: circles of the first side, triangles of the second."""
    every = [(float(x), float(y)) for side in points for x, y in side]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    half = max(max(xs) - min(xs), max(ys) - min(ys), 1e-9) / 2 * 1.08

    def placed(side: Sequence[Any]) -> list[tuple[float, float]]:
        return [
            (
                round(150 + 150 * (x - middle[0]) / half, 1),
                round(150 - 150 * (y - middle[1]) / half, 1),
            )
            for x, y in side
        ]

    return {"title": title, "sides": list(sides), "points": [placed(side) for side in points]}


def number(value: float) -> str:
    """Four significant digits, thousands shortened: 0.4123, 12.5k, 3.1e-05."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _binned(curve: Curve) -> list[tuple[float, float]]:
    pairs = [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if math.isfinite(y)]
    count = min(BINS, len(pairs))
    edges = [i * len(pairs) // max(count, 1) for i in range(count + 1)]
    parts = [pairs[a:b] for a, b in itertools.pairwise(edges)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _range(values: Sequence[float], *, pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high == low:
        return low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float, count: int, *, integer: bool = False) -> list[float]:
    found = MaxNLocator(nbins=count, integer=integer).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]
