"""The figures of an ablation, each a small PNG: trade-off, sweep, hallucination, maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from cafe.ablation import claims
from cafe.ablation.arms import BASE, CONTRASTIVE, JOINT, LANGUAGE
from cafe.ablation.findings import ArmScores, Findings, Measured
from cafe.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE,
    ORANGE,
    empty_map,
    quiet,
    scatter,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 110
COLOURS = {BASE: GREY, LANGUAGE: ORANGE, CONTRASTIVE: BLUE, JOINT: GREEN}
_MARKERS = {BASE: "D", LANGUAGE: "s", CONTRASTIVE: "^", JOINT: "o"}
_NAMES = {BASE: "base", LANGUAGE: "language only", CONTRASTIVE: "contrastive only", JOINT: "joint"}

RETRIEVAL = (claims.I2T, claims.T2I)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure: its alternative text, and the function that draws it."""

    alt: str
    draw: Callable[[Findings, Path], None]


def draw_tradeoff(findings: Findings, path: Path) -> None:
    """Retrieval against generation: a small mark per run, a large one for the mean of each arm."""
    figure = Figure(figsize=(9.0, 3.9), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2)
    shown = (
        (claims.ANSWERS, "questions answered rightly, %"),
        (claims.OBJECTS, "objects in captions, F1, %"),
    )
    for axes, (score, name) in zip(panels, shown, strict=True):
        _style(axes, name)
        axes.set_xlabel("retrieval R@1, mean of both ways, %", fontsize=9.5, color=INK)
        if _has(findings, score, *RETRIEVAL):
            _draw_arms(axes, findings, score)
        axes.margins(0.1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)
    write_png(figure, path)


def _draw_arms(axes: Axes, findings: Findings, score: str) -> None:
    swept = [_point(arm, score) for arm in findings.sweep]
    if len(swept) > 1:
        axes.plot(
            *np.array(swept).T, color=GREEN, linewidth=1, alpha=0.5, marker="o", markersize=3,
            label="joint, other weights", zorder=1,
        )  # fmt: skip
    for name, colour in COLOURS.items():
        arm = findings.arm(name)
        x, y = _runs(arm, RETRIEVAL), _runs(arm, (score,))
        if len(x) > 1:
            axes.scatter(x, y, s=14, color=colour, marker=_MARKERS[name], alpha=0.45, linewidths=0)
        axes.scatter(
            *_point(arm, score), s=70, color=colour, marker=_MARKERS[name], label=_NAMES[name],
            edgecolors="white", linewidths=0.8, zorder=3,
        )  # fmt: skip


def _point(arm: ArmScores, score: str) -> tuple[float, float]:
    retrieval = np.mean([arm.scores[name].interval.estimate for name in RETRIEVAL])
    return float(100 * retrieval), 100 * arm.scores[score].interval.estimate


def _runs(arm: ArmScores, scores: Sequence[str]) -> np.ndarray:
    """The mean of these scores for each seed, in percent; [seeds]."""
    return 100 * np.mean([arm.scores[score].runs for score in scores], axis=0)


def draw_sweep(findings: Findings, path: Path) -> None:
    """Scores by contrastive weight, from no contrastive loss (left) to nothing else (right)."""
    figure = Figure(figsize=(9.0, 5.2), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(2, 3).flat
    shown = (
        (claims.I2T, "image → text R@1, %"),
        (claims.MMEB, "scenes-mmeb hit@1, %"),
        (claims.GAP, "modality gap"),
        (claims.ANSWERS, "questions answered rightly, %"),
        (claims.OBJECTS, "objects in captions, F1, %"),
        (claims.CHAIR_I, "CHAIR_i, %  (less is better)"),
    )
    arms = [findings.arm(LANGUAGE), *findings.sweep, findings.arm(CONTRASTIVE)]
    weights = [f"{arm.weights[0]:g}" for arm in findings.sweep if arm.weights]
    for axes, (score, name) in zip(panels, shown, strict=True):
        _style(axes, name)
        axes.set_xticks(range(len(arms)), ["language\nonly", *weights, "contrastive\nonly"])
        if not _has(findings, score):
            continue
        scale = 1 if score == claims.GAP else 100
        middle = range(1, len(arms) - 1)
        values = [scale * arms[i].scores[score].interval.estimate for i in middle]
        axes.plot(middle, values, color=GREEN, linewidth=1.2, zorder=1)
        for position, arm in enumerate(arms):
            name = arm.name if arm.name in COLOURS else JOINT
            _whisker(axes, position, arm.scores[score], scale, name)
        base = findings.arm(BASE).scores[score].interval.estimate
        axes.axhline(scale * base, color=GREY, linewidth=0.9, linestyle=":", label="base")
        axes.margins(x=0.07, y=0.12)
        axes.tick_params(axis="x", labelsize=8)
    figure.supxlabel("contrastive weight (language weight as in the recipe)", fontsize=9.5)
    figure.axes[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    write_png(figure, path)


def draw_hallucination(findings: Findings, path: Path) -> None:
    """Hallucination scores of each arm, with intervals."""
    figure = Figure(figsize=(9.0, 3.3), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 5)
    shown = (
        (claims.CHAIR_I, "CHAIR_i, %\n← less is better"),
        (claims.CHAIR_S, "CHAIR_s, %\n← less is better"),
        (claims.THRONE, "THRONE F0.5, %\nmore is better →"),
        ("scenes-pope/adversarial/accuracy", "POPE adversarial, %\nmore is better →"),
        (claims.POPE, "POPE accuracy, %\nmore is better →"),
    )
    names = list(COLOURS)
    for number, (axes, (score, title)) in enumerate(zip(panels, shown, strict=True)):
        axes.set_title(title, fontsize=9, color=INK)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        quiet(axes)
        axes.set_yticks(range(len(names)), [_NAMES[n] for n in names] if number == 0 else [])
        axes.tick_params(axis="y", labelsize=9.5, labelcolor=INK, length=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        if _has(findings, score):
            for position, name in enumerate(names):
                measured = findings.arm(name).scores[score]
                _whisker(axes, position, measured, 100, name, horizontal=True)
        axes.margins(x=0.15)
    write_png(figure, path)


def draw_maps(findings: Findings, path: Path) -> None:
    """Maps of image and text embeddings by arm; each has its own two principal axes."""
    figure = Figure(figsize=(9.0, 2.9), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, name in zip(panels, COLOURS, strict=True):
        arm = findings.arm(name)
        empty_map(axes)
        title = _NAMES[name]
        if arm.map is not None:
            scatter(axes, arm.map.images, arm.map.texts, size=8)
            title += f": gap {arm.scores[claims.GAP].runs[0]:.2f}"
        axes.set_title(title, fontsize=9.5, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5,
        markerscale=1.8,
    )  # fmt: skip
    write_png(figure, path)


FIGURES = {
    "tradeoff": Drawing(
        "Retrieval against generation: one mark per run, a larger one for the mean of each arm.",
        draw_tradeoff,
    ),
    "sweep": Drawing("Scores by the weight of the contrastive loss.", draw_sweep),
    "hallucination": Drawing("Hallucination scores of each arm.", draw_hallucination),
    "maps": Drawing(
        "Embeddings of images and texts on their principal axes, first seed.", draw_maps
    ),
}


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    quiet(axes)


def _whisker(
    axes: Axes,
    position: int,
    measured: Measured,
    scale: float,
    name: str,
    *,
    horizontal: bool = False,
) -> None:
    """The mean with its interval, and the runs as small marks next to it."""
    estimate, low, high = (scale * value for value in measured.interval)
    below, above = max(0.0, estimate - low), max(0.0, high - estimate)
    style = {
        "color": COLOURS[name], "marker": _MARKERS[name], "markersize": 6.5, "linewidth": 0,
        "elinewidth": 1.6, "zorder": 3,
    }  # fmt: skip
    if horizontal:
        axes.errorbar(estimate, position, xerr=[[below], [above]], **style)
    else:
        axes.errorbar(position, estimate, yerr=[[below], [above]], **style)
    if len(measured.runs) > 1:
        runs = [scale * value for value in measured.runs]
        offset = [position + 0.18] * len(runs)
        x, y = (runs, offset) if horizontal else (offset, runs)
        axes.scatter(x, y, s=8, color=COLOURS[name], alpha=0.5, linewidths=0)


def _has(findings: Findings, *scores: str) -> bool:
    """Whether every arm has these scores."""
    return all(score in arm.scores for arm in findings.arms for score in scores)
