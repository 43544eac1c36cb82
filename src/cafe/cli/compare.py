"""`cafe compare`: results of the same tasks, side by side, with what papers report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cafe.evaluation.compare import Comparison, ComparisonRow


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...", help="Result files, or --json folders; the first is the baseline."
        ),
    ],
) -> None:
    """Compare results of the same tasks.

    Differences are paired: computed on the same resamples of the same samples. One whose interval
    does not contain 0 is marked with a star.
    """
    from cafe.evaluation.compare import compare

    for comparison in compare(results):
        _print_comparison(comparison)


def _print_comparison(comparison: Comparison) -> None:
    print(f"\n{comparison.task}")
    for number, model in enumerate(comparison.models):
        print(f"  {chr(ord('A') + number % 26)}  {_short(model)}")
    width = max(len(row.score) for row in comparison.rows)
    for row in comparison.rows:
        print(f"  {row.score:<{width}}  {_format_row(row)}")
    for row in comparison.published:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row.scores.items())
        print(f"  published: {row.model}: {scores} ({row.source})")


def _format_row(row: ComparisonRow) -> str:
    first, *others = row.values
    parts = [_format_score(first)]
    for value, difference in zip(others, row.differences, strict=True):
        parts.append(_format_score(value))
        if difference is not None:
            star = "*" if difference.low > 0 or difference.high < 0 else " "
            low, high = difference.low, difference.high
            parts.append(f"({difference.estimate:+.4f} [{low:+.4f}, {high:+.4f}]{star})")
    return "  ".join(parts)


def _format_score(value: float | None) -> str:
    return "     -" if value is None else f"{value:.4f}"


def _short(model: str) -> str:
    return model if len(model) <= 60 else "…" + model[-59:]
