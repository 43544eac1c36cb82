"""Two results of one task: paired differences with intervals, beside the published numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from cafe.errors import DataError
from cafe.evaluate.results import StoredResult, read_result
from cafe.evaluate.scoring import CONFIDENCE, score_samples
from cafe.metrics import Interval, percentile_interval
from cafe.types import Scores


class Row(NamedTuple):
    """One score of several models. `differences` from the first are None where no sample tells."""

    score: str
    values: list[float | None]
    differences: list[Interval | None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One task: the models in order, the first of which is the baseline."""

    task: str
    models: list[str]
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Published:
    """A row of somebody's table: fractions in [0, 1], as ours."""

    task: str
    model: str
    source: str
    scores: Scores


def collect(paths: Sequence[Path]) -> list[list[StoredResult]]:
    """Results by task, in the order of `paths`: result files, or folders with one a task.

    Raises:
        DataError: a path without results, or with one that cannot be read.
    """
    found: dict[str, list[StoredResult]] = {}
    for path in paths:
        own = [path]
        if path.is_dir():
            own = [p for p in sorted(path.glob("*.json")) if _is_result(p)]
        if not own:
            raise DataError(f"{path}: no result of `cafe evaluate` in this folder")
        for file in own:
            result = read_result(file)
            found.setdefault(result.task, []).append(result)
    return list(found.values())


def compare(results: Sequence[StoredResult], *, seed: int = 0) -> Comparison:
    """Each result minus the first, on the same samples (paired bootstrap).

    Raises:
        DataError: results of other versions of the task, or of other samples.
    """
    first = results[0]
    for other in results[1:]:
        for what, mend in (
            ("version", "evaluate both with one version of cafe"),
            ("samples", "evaluate both on the same data and with the same --limit"),
        ):
            if other.record[what] != first.record[what]:
                raise DataError(
                    f"{first.task}: {first.model} and {other.model} differ in {what}; {mend}"
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
        rows.append(Row(score, values, differences))
    return Comparison(first.task, [result.model for result in results], rows)


@cache
def published() -> tuple[Published, ...]:
    """The published rows (`published.json`, in percent there), with where they were read."""
    text = files("cafe.evaluate").joinpath("published.json").read_text(encoding="utf-8")
    return tuple(
        Published(
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
