"""Intervals: closed forms, coverage, and that pairing narrows them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cafe.metrics import (
    bootstrap_interval,
    interval_over_seeds,
    paired_interval,
    percentile_interval,
    resampled_sums,
)
from helpers.metric_reference import bootstrap_scores, chair_scores


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- bootstrap --------------------------------------------------------------------------------


def test_a_mean_has_the_interval_of_the_normal_approximation() -> None:
    hits = np.arange(400) % 4 == 0
    estimate, low, high = bootstrap_interval(hits)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert estimate == 0.25
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.1 * half)


def test_equal_values_leave_no_doubt() -> None:
    assert bootstrap_interval(np.full(7, 0.5)) == (0.5, 0.5, 0.5)
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25, 0.25)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    for confidence in (0.95, 0.5):
        intervals = [
            bootstrap_interval(normal(60, seed=s), confidence=confidence, resamples=300)
            for s in range(300)
        ]
        covered = np.mean([i.low <= 0 <= i.high for i in intervals])
        assert covered == pytest.approx(confidence, abs=0.06)


def test_more_confidence_is_wider_and_more_samples_are_narrower() -> None:
    def width(n: int, confidence: float) -> float:
        interval = bootstrap_interval(normal(n), confidence=confidence)
        return interval.high - interval.low

    assert width(100, 0.8) < width(100, 0.95) < width(100, 0.99)
    assert width(1600, 0.95) == pytest.approx(width(100, 0.95) / 4, rel=0.25)


def test_the_seed_fixes_the_interval() -> None:
    values = normal(50)
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_scores_of_resampled_indices_equal_the_fast_mean() -> None:
    values = normal(37)
    slow = bootstrap_scores(lambda i: {"mean": float(values[i].mean())}, 37, resamples=200, seed=5)
    fast = bootstrap_interval(values, resamples=200, seed=5)
    assert slow["mean"] == pytest.approx(fast)


def test_the_interval_does_not_depend_on_how_many_draws_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = normal(30)
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr("cafe.metrics.interval._DRAWS_PER_BLOCK", 70)
    assert bootstrap_interval(values, resamples=100) == whole


def test_a_metric_that_is_no_mean_gets_an_interval_for_each_number() -> None:
    mentioned = [["dog", "cat"] if i % 2 else ["dog"] for i in range(40)]
    present = [{"dog"}] * 40
    intervals = bootstrap_scores(
        lambda draw: chair_scores([mentioned[i] for i in draw], [present[i] for i in draw]),
        40,
        resamples=200,
    )
    assert intervals["chair_i"].estimate == pytest.approx(20 / 60)
    assert intervals["chair_i"].low < 20 / 60 < intervals["chair_i"].high
    assert intervals["recall"] == (1.0, 1.0, 1.0)


# --- pairs ------------------------------------------------------------------------------------


def test_a_constant_gain_is_certain_however_noisy_the_samples() -> None:
    noisy = normal(100)
    assert paired_interval(noisy + 0.25, noisy) == pytest.approx((0.25, 0.25, 0.25))
    alone = bootstrap_interval(noisy)
    assert alone.high - alone.low > 0.3


def test_booleans_are_subtracted_as_numbers_and_the_sign_is_that_of_the_gain() -> None:
    after, before = np.array([True, True, False, True]), np.array([False, True, True, False])
    assert paired_interval(after, before).estimate == 0.25
    assert paired_interval(before, after).estimate == -0.25


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="must be finite"):
        bootstrap_interval(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="one-dimensional"):
        bootstrap_interval(np.ones((2, 2)))
    with pytest.raises(ValueError, match="0 resamples"):
        bootstrap_interval(np.ones(2), resamples=0)
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval(np.ones(2), confidence=95)
    with pytest.raises(ValueError, match="confidence is 1"):
        bootstrap_interval(np.ones(2), confidence=1)
    with pytest.raises(ValueError, match="pair them by sample id"):
        paired_interval(np.ones(2), np.ones(3))


def test_sums_begin_with_the_samples_as_they_are_and_agree_with_the_slow_bootstrap():
    rng = np.random.default_rng(0)
    hits, asked = rng.integers(0, 3, size=20), rng.integers(3, 5, size=20)
    cells = rng.normal(size=(20, 4))
    columns = {"hits": hits, "asked": asked, "cells": cells}
    sums = resampled_sums(columns, resamples=50, seed=3)
    assert sums["hits"].shape == (51,)
    assert sums["cells"].shape == (51, 4)
    assert sums["hits"][0] == hits.sum()
    np.testing.assert_allclose(sums["cells"][0], cells.sum(axis=0))
    seen = []

    def slow(draw: np.ndarray) -> dict[str, float]:
        seen.append([hits[draw].sum(), asked[draw].sum(), *cells[draw].sum(axis=0)])
        return {"ratio": hits[draw].sum() / asked[draw].sum()}

    expected = bootstrap_scores(slow, 20, resamples=50, seed=3)["ratio"]
    fast = np.column_stack([sums["hits"], sums["asked"], sums["cells"]])
    np.testing.assert_allclose(fast, seen)
    assert percentile_interval(sums["hits"] / sums["asked"]) == pytest.approx(expected)


def test_the_draws_depend_on_the_seed_and_the_number_of_samples_only():
    a = resampled_sums({"x": np.arange(9)}, resamples=20, seed=1)["x"]
    b = resampled_sums({"y": np.ones(9), "x": np.arange(9)}, resamples=20, seed=1)["x"]
    c = resampled_sums({"x": np.arange(9)}, resamples=20, seed=2)["x"]
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_columns_of_different_samples_and_no_resample_are_refused():
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        resampled_sums({"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(ValueError, match="lengths"):
        resampled_sums({})
    with pytest.raises(ValueError, match="at least one resample"):
        percentile_interval(np.ones(1))


# --- seeds ------------------------------------------------------------------------------------


def test_seeds_that_agree_leave_the_interval_of_the_samples() -> None:
    one = np.concatenate([[0.5], 0.5 + 0.1 * normal(2000)])
    for rows in (one[None], np.stack([one, one, one])):
        assert interval_over_seeds(rows) == pytest.approx(percentile_interval(one))


def test_seeds_that_are_all_that_varies_have_students_interval() -> None:
    rows = np.tile([[0.1], [0.2], [0.6]], 200_001)  # mean 0.3, standard deviation √0.07
    estimate, low, high = interval_over_seeds(rows)
    half = 4.3027 * math.sqrt(0.07 / 3)
    assert estimate == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.02 * half)


@pytest.mark.parametrize("seed_share", [0.0, 0.5, 1.0])
def test_the_interval_over_seeds_covers_the_truth_at_least_as_often_as_it_says(
    seed_share: float,
) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for trial in range(300):
        models = math.sqrt(seed_share) * rng.standard_normal((3, 1))
        samples = math.sqrt((1 - seed_share) * 40) * rng.standard_normal(40)
        sums = resampled_sums({"x": (models + samples).T}, resamples=300, seed=trial)["x"].T / 40
        _, low, high = interval_over_seeds(sums, seed=trial)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.91


@pytest.mark.parametrize("shape", [(3, 1), (0, 5), (5,)])
def test_an_interval_over_seeds_needs_a_seed_and_a_resample(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one row a seed"):
        interval_over_seeds(np.zeros(shape))
