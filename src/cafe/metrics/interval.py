"""Uncertainty of a score: bootstrap intervals over samples, paired differences, several seeds.

n is the number of samples: images, questions or queries, whatever was drawn independently. Where
one image has five captions, resample the images.

All intervals are two-sided. The bootstrap's are percentile intervals (Efron): the middle
`confidence` of the statistic over `resamples` draws of n samples with replacement. They show
how the number would vary with other samples of the same kind, but not with other training seeds;
`interval_over_seeds` includes those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = [
    "Interval",
    "bootstrap_interval",
    "interval_over_seeds",
    "paired_interval",
    "percentile_interval",
    "resampled_sums",
]

_DRAWS_PER_BLOCK = 1 << 22  # 32 MiB of indices


class Interval(NamedTuple):
    """A number with the interval around it; `low <= high`, in the number's own unit."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of per-sample values (hits, accuracies, losses) with its bootstrap interval.

    Raises:
        ValueError: no values, a value that is not finite, not one dimension, a confidence outside
            (0, 1), or fewer than one resample.
    """
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape} must be finite and one-dimensional")
    wide = values.astype(np.float64)
    means = [wide[draws].mean(axis=1) for draws in _draws(len(wide), resamples, seed)]
    return _percentiles(float(wide.mean()), np.concatenate(means), confidence)


def paired_interval(
    values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    baseline: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `values - baseline` over the same samples in the same order, with its interval.

    Much narrower than two separate intervals where both models fail on the same samples.

    Raises:
        ValueError: as in `bootstrap_interval`, or two different lengths.
    """
    if values.shape != baseline.shape:
        raise ValueError(
            f"{values.shape} values and {baseline.shape} of the baseline; pair them by sample id"
        )
    difference = values.astype(np.float64) - baseline.astype(np.float64)
    return bootstrap_interval(difference, confidence=confidence, resamples=resamples, seed=seed)


def resampled_sums(
    columns: Mapping[str, Float[np.ndarray, "n ..."] | Int[np.ndarray, "n ..."]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "_ ..."]]:
    """Column sums over the samples as they are (row 0), and over each resample (rows 1 ...).

    Nearly every score is a function of such sums: a mean, a ratio, an F1, BLEU, class-wise means.
    Computed on all rows it gives the score and its bootstrap distribution; computed for two models
    with equal seeds, and subtracted, the paired distribution.

    Args:
        columns: per sample, what is summed: [n] or [n, c], all with the same n.
        resamples: how many to draw.
        seed: of the draws; they depend on it and on n, not on the columns.

    Returns:
        [1 + resamples] or [1 + resamples, c] for each column.

    Raises:
        ValueError: no columns, different lengths, no samples, or fewer than one resample.
    """
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of lengths {sorted(lengths)}; all must have the same samples")
    (count,) = lengths
    wide = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    blocks = [np.ones((1, count))]
    sums: dict[str, list[np.ndarray]] = {name: [] for name in wide}
    for block in itertools.chain(blocks, _multiplicities(count, resamples, seed)):
        for name, column in wide.items():
            sums[name].append(block @ column)
    return {name: np.concatenate(parts) for name, parts in sums.items()}


def percentile_interval(
    statistics: Float[np.ndarray, " r"], *, confidence: float = 0.95
) -> Interval:
    """The interval of a score from its values on `resampled_sums`: row 0 is the estimate.

    Raises:
        ValueError: fewer than two values, or a confidence outside (0, 1).
    """
    if len(statistics) < 2:
        raise ValueError("an interval needs the estimate and at least one resample")
    return _percentiles(float(statistics[0]), statistics[1:], confidence)


def interval_over_seeds(
    statistics: Float[np.ndarray, "k r"], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of a mean over k training seeds: other samples and other seeds.

    Row i holds a score of the model of seed i, or the difference between two models of that seed:
    column 0 on the samples as they are, the others on resamples, the same ones in every row
    (`resampled_sums` with one seed). To the mean of each resample comes s/√k · t, with s the
    standard deviation of column 0 and t drawn from Student's distribution with k - 1 degrees of
    freedom. So it is the bootstrap's interval where seeds agree, and Student's where they are all
    that varies; a bootstrap of three seeds would cover the truth in two thirds of such cases. With
    one seed, only the samples count.

    Args:
        statistics: as above, from at least one seed and with at least one resample.
        confidence: share of the distribution that lies within the interval.
        seed: of the draws of t; they depend on it and on the shape only.

    Raises:
        ValueError: another shape, or a confidence outside (0, 1).
    """
    if statistics.ndim != 2 or statistics.shape[0] < 1 or statistics.shape[1] < 2:
        raise ValueError(
            f"statistics of shape {statistics.shape}; give one row a seed, with the estimate and "
            "at least one resample"
        )
    wide = statistics.astype(np.float64)
    count, columns = wide.shape
    means = wide.mean(axis=0)
    if count > 1:
        drawn = np.random.default_rng(seed).standard_t(count - 1, size=columns - 1)
        means[1:] += wide[:, 0].std(ddof=1) / math.sqrt(count) * drawn
    return _percentiles(float(means[0]), means[1:], confidence)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "b n"]]:
    """Indices of all resamples, some at a time."""
    if count < 1 or resamples < 1:
        raise ValueError(f"{count} samples and {resamples} resamples; both must be at least 1")
    rng = np.random.default_rng(seed)
    per_block = max(1, _DRAWS_PER_BLOCK // count)
    for start in range(0, resamples, per_block):
        yield rng.integers(count, size=(min(per_block, resamples - start), count))


def _multiplicities(count: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "b n"]]:
    """How often each sample was drawn, resample by resample."""
    for draws in _draws(count, resamples, seed):
        offset = np.arange(len(draws))[:, None] * count
        times = np.bincount((draws + offset).ravel(), minlength=draws.size)
        yield times.reshape(draws.shape).astype(np.float64)


def _percentiles(
    estimate: float, statistics: Float[np.ndarray, " r"], confidence: float
) -> Interval:
    _check_confidence(confidence)
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95"
        )
