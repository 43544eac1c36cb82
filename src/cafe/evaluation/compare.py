"""Compare results of the same tasks: the job behind `cafe compare`.

Differences are paired and have intervals; the published numbers of the same task are listed next to
them. Everything is computed from result files, without a model.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cafe.errors import DataError
from cafe.evaluation.results import StoredResult, read_result
from cafe.evaluation.scoring import CONFIDENCE, score_samples
from cafe.metrics import Interval, percentile_interval
from cafe.types import Scores


class ComparisonRow(NamedTuple):
    """One score of several models.

    values       one per model; None where its result lacks the score
    differences  of each further model from the first; None where no columns explain the score
    """

    score: str
    values: list[float | None]
    differences: list[Interval | None]


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """A row of a published table.

    source   where it was read
    scores   fractions in [0, 1], as ours
    """

    task: str
    model: str
    source: str
    scores: Scores


@dataclass(frozen=True, slots=True)
class Comparison:
    """One task.

    models      in order; the first is the baseline
    rows        one per score
    published   what papers report for the task
    """

    task: str
    models: list[str]
    rows: list[ComparisonRow]
    published: tuple[PublishedScores, ...] = ()


def compare(results: Sequence[str | Path], *, seed: int = 0) -> list[Comparison]:
    """Compare results of the same tasks, as `cafe compare` does.

        >>> (comparison,) = compare(["results/tiny", "results/model"])
        >>> comparison.task, comparison.models
        ('retrieval', ['tiny', 'model'])
        >>> row = comparison.rows[-1]
        >>> row.score, row.values
        ('text_to_image_recall@10', [0.3, 0.32])
        >>> row.differences
        [Interval(estimate=0.020000000000000018, low=0.0, high=0.060000000000000026)]

    Args:
        results: Result files, or folders with one per task (`out` of
            `cafe.evaluation.run.evaluate`). The first result of a task is its baseline.
        seed: Of the bootstrap.

    Returns:
        One comparison per task, in the order in which the tasks first appear.

    Raises:
        DataError: A path without results or with one that cannot be read; results of one task
            that are of different samples, or of different versions of the task.
    """
    paths = [Path(path) for path in results]
    return [compare_results(of_task, seed=seed) for of_task in results_by_task(paths)]


def results_by_task(paths: Sequence[Path]) -> list[list[StoredResult]]:
    """Read results and group them by task, in the order of `paths`.

    Args:
        paths: Result files, or folders with one per task.

    Raises:
        DataError: A path without results, or with one that cannot be read.
    """
    by_task: dict[str, list[StoredResult]] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = [p for p in sorted(path.glob("*.json")) if _is_result(p)]
        if not files:
            raise DataError(f"{path}: no result of `cafe evaluate` in this folder")
        for file in files:
            result = read_result(file)
            by_task.setdefault(result.task, []).append(result)
    return list(by_task.values())


def compare_results(results: Sequence[StoredResult], *, seed: int = 0) -> Comparison:
    """Each result of one task minus the first, on the same resamples of the same samples.

    Raises:
        DataError: Results of different versions of the task, or of different samples.
    """
    first = results[0]
    for other in results[1:]:
        for what, fix in (
            ("version", "evaluate both with one version of cafe"),
            ("samples", "evaluate both on the same data and with the same --limit"),
        ):
            if other.record[what] != first.record[what]:
                raise DataError(
                    f"{first.task}: {first.model} and {other.model} differ in {what}; {fix}"
                )
    samples = [score_samples(result, seed=seed) if result.items else {} for result in results]
    rows = []
    for score in first.record["scores"]:
        values = [result.record["scores"].get(score) for result in results]
        differences = [
            percentile_interval(own[score] - samples[0][score], confidence=CONFIDENCE)
            if score in own and score in samples[0]
            else None
            for own in samples[1:]
        ]
        rows.append(ComparisonRow(score, values, differences))
    known = tuple(row for row in published() if row.task == first.task)
    return Comparison(first.task, [result.model for result in results], rows, known)


@cache
def published() -> tuple[PublishedScores, ...]:
    """All published rows (from `published.json`, which has percentages)."""
    text = (
        importlib.resources.files("cafe.evaluation")
        .joinpath("published.json")
        .read_text(encoding="utf-8")
    )
    return tuple(
        PublishedScores(
            row["task"],
            row["model"],
            row["source"],
            {name: value / 100 for name, value in row["scores"].items()},
        )
        for row in json.loads(text)
    )


def _is_result(path: Path) -> bool:
    try:
        return "samples" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
