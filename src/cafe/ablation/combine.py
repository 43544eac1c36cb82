"""Results of many runs → means, paired differences and intervals.

A score of one run is a row of numbers: its value on the test scenes, then on resamples of them, the
same resamples for every model (`cafe.evaluation.scoring`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from cafe.evaluation.results import StoredResult
from cafe.evaluation.scoring import CONFIDENCE, RESAMPLES, score_samples
from cafe.metrics import Interval, interval_over_seeds

if TYPE_CHECKING:
    from jaxtyping import Float

Samples = Mapping[str, "Float[np.ndarray, ' r']"]
"""`<task>/<score>` -> values, [1 + resamples]."""


def run_samples(results: Sequence[StoredResult], name: str, *, seed: int = 0) -> Samples:
    """The rows of one run's results.

    A score without per-sample columns varies as a normal distribution as wide as its own interval,
    with its own random numbers; without an interval it is constant.

    Args:
        results: The results of all tasks of the run.
        name: The name of the run, so that such scores are independent between runs.
        seed: Seed of the resamples.

    Returns:
        Every score with its row.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    samples: dict[str, np.ndarray] = {}
    for result in results:
        rows = score_samples(result, seed=seed) if result.items else {}
        for score, value in result.record["scores"].items():
            key = f"{result.task}/{score}"
            if score in rows:
                samples[key] = rows[score]
                continue
            spread = np.zeros(RESAMPLES)
            if score in result.record["intervals"]:
                low, high = result.record["intervals"][score]
                rng = np.random.default_rng([seed, crc32(f"{name}:{key}".encode())])
                spread = (high - low) / 2 / z * rng.standard_normal(RESAMPLES)
            samples[key] = np.concatenate([[value], value + spread])
    return samples


def mean_interval(runs: Sequence[Samples], score: str) -> Interval:
    """The mean over the runs of one arm, one per seed, with its interval."""
    return interval_over_seeds(np.stack([run[score] for run in runs]), confidence=CONFIDENCE)


def difference_interval(
    runs: Mapping[int, Samples],
    others: Mapping[int, Samples],
    score: str,
    *,
    scale: float = 1.0,
    other_score: str | None = None,
) -> Interval:
    """The mean of `run - scale * other` over the seeds that both have; both map seeds to rows.

    The score of the others is `other_score`, if it is given; resamples of the scenes are the same
    for all tasks, so two scores of one model are paired by scene, too.

    Raises:
        ValueError: they have no seed in common.
    """
    common = [seed for seed in runs if seed in others]
    if not common:
        raise ValueError("the two arms have no seed in common")
    baseline = other_score or score
    rows = [runs[seed][score] - scale * others[seed][baseline] for seed in common]
    return interval_over_seeds(np.stack(rows), confidence=CONFIDENCE)
