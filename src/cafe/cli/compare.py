"""`cafe compare`: results of the same tasks, side by side, with what papers report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cafe.evaluate.compare import Comparison, Published, Row


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
    from cafe.evaluate.compare import collect, compare, published

    for of_task in collect(results):
        comparison = compare(of_task)
        _tell(comparison)
        for row in published():
            if row.task == comparison.task:
                _tell_published(row)


def _tell(comparison: Comparison) -> None:
    print(f"\n{comparison.task}")
    names = [_short(model) for model in comparison.models]
    for number, name in enumerate(names):
        print(f"  {chr(ord('A') + number % 26)}  {name}")
    width = max(len(row.score) for row in comparison.rows)
    for row in comparison.rows:
        print(f"  {row.score:<{width}}  {_line(row)}")


def _line(row: Row) -> str:
    first, *others = row.values
    parts = [_number(first)]
    for value, difference in zip(others, row.differences, strict=True):
        parts.append(_number(value))
        if difference is not None:
            sure = "*" if difference.low > 0 or difference.high < 0 else " "
            low, high = difference.low, difference.high
            parts.append(f"({difference.estimate:+.4f} [{low:+.4f}, {high:+.4f}]{sure})")
    return "  ".join(parts)


def _tell_published(row: Published) -> None:
    scores = ", ".join(f"{name} {value:.3f}" for name, value in row.scores.items())
    print(f"  published: {row.model}: {scores} ({row.source})")


def _number(value: float | None) -> str:
    return "     -" if value is None else f"{value:.4f}"


def _short(model: str) -> str:
    return model if len(model) <= 60 else "…" + model[-59:]
