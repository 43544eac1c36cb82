"""Scores as functions of column sums: computed once for the score, on resamples for its interval.

Every score of a result is a function of sums over samples (`cafe.metrics.resampled_sums`), and the
result file keeps the columns. So a difference between two models can be computed on the same
resamples from two files, without a model and without knowing the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol
from zlib import crc32

import numpy as np

from cafe.metrics import (
    Interval,
    bleu_summary,
    calibration_summary,
    percentile_interval,
    resampled_sums,
    throne_summary,
)
from cafe.types import Scores

RESAMPLES = 1000
CONFIDENCE = 0.95

Sums = Mapping[str, np.ndarray]
Derivation = Literal["throne", "bleu", "calibration"]

DERIVATIONS: dict[Derivation, Callable[[Sums], dict[str, np.ndarray]]] = {
    "throne": throne_summary,
    "bleu": bleu_summary,
    "calibration": calibration_summary,
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """A score that is one column's sum over another's; without `whole`, a mean over samples."""

    part: str
    whole: str | None = None


class Scored(Protocol):
    """The parts of a result that determine its scores; a result file has them too."""

    @property
    def items(self) -> dict[str, np.ndarray]: ...
    @property
    def ratios(self) -> dict[str, Ratio]: ...
    @property
    def means(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def derived(self) -> Derivation | None: ...


def point_scores(result: Scored) -> Scores:
    """The scores on the samples as they are (not resampled)."""
    sums = {name: np.asarray(c, float).sum(axis=0)[None] for name, c in result.items.items()}
    return {name: float(values[0]) for name, values in _scores(result, sums).items()}


def score_samples(
    result: Scored, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Score -> its values, [1 + resamples]: on the samples as they are, then on each resample.

    Two results with the same samples and the same seed see the same resamples.
    """
    sums: dict[str, np.ndarray] = {}
    for data_set, columns in columns_by_set(result.items).items():
        own_seed = seed + crc32(data_set.encode())
        sums |= resampled_sums(columns, resamples=resamples, seed=own_seed)
    return _scores(result, sums)


def score_intervals(
    result: Scored, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Score -> its bootstrap interval, for every score that is a function of columns."""
    samples = score_samples(result, resamples=resamples, seed=seed)
    return {
        name: percentile_interval(values, confidence=CONFIDENCE) for name, values in samples.items()
    }


def columns_by_set(items: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Data set -> its columns, under their full names; columns without a data set are under ""."""
    by_set: dict[str, dict[str, np.ndarray]] = {}
    for name, column in items.items():
        by_set.setdefault(name.rpartition(":")[0], {})[name] = column
    return by_set


def _scores(result: Scored, sums: Sums) -> dict[str, np.ndarray]:
    scores = {
        name: _quotient(
            sums[ratio.part],
            float(len(result.items[ratio.part])) if ratio.whole is None else sums[ratio.whole],
        )
        for name, ratio in result.ratios.items()
    }
    if result.derived is not None:
        scores |= DERIVATIONS[result.derived](sums)
    for name, parts in result.means.items():
        scores[name] = np.mean([scores[part] for part in parts], axis=0)
    return scores


def _quotient(part: np.ndarray, whole: np.ndarray | float) -> np.ndarray:
    """The quotient; 0 / 0 is 0."""
    whole = np.broadcast_to(np.asarray(whole, float), part.shape)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)
