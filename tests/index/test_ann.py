"""Settings are raised until the recall is reached, or say that it is not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cafe.index.ann import Approximate, nearest, partitions_for, recall, tuned

START = Approximate(partitions=100, rows=10_000)
TRUE = [str(i) for i in range(10)]


def finds(enough_probes: int, enough_refine: int):
    """Half of the ten until there are enough probes, and all but one until refine is enough."""

    def neighbours(query: int, settings: Approximate) -> list[str]:
        if settings.probes < enough_probes:
            return TRUE[:5]
        return TRUE[:9] if settings.refine < enough_refine else TRUE

    return neighbours


def test_good_settings_stay():
    found = tuned(START, finds(8, 4), [1, 2, 3], 3 * [TRUE])
    assert found == dataclasses.replace(START, recall=1.0, queries=3)


@pytest.mark.parametrize(
    ("probes", "refine", "expected"), [(9, 4, (16, 8)), (33, 4, (64, 32)), (8, 30, (64, 32))]
)
def test_settings_double_until_the_goal_is_reached(probes: int, refine: int, expected):
    found = tuned(START, finds(probes, refine), [1], 1 * [TRUE])
    assert (found.probes, found.refine, found.recall) == (*expected, 1.0)


def test_a_goal_that_cannot_be_reached_ends_with_the_measured_truth():
    found = tuned(START, finds(101, 4), [1], 1 * [TRUE])
    assert (found.probes, found.refine, found.recall) == (100, 64, 0.5)
    assert tuned(START, finds(8, 1000), [1], 1 * [TRUE], goal=0.9).recall == 0.9


def test_without_queries_nothing_is_claimed():
    assert math.isnan(tuned(START, finds(8, 4), [], []).recall)


def test_few_partitions_bound_the_probes():
    small = Approximate(partitions=3, rows=10)
    assert tuned(small, finds(1, 1), [1], 1 * [TRUE]).probes == 3
    assert [partitions_for(n) for n in (0, 1, 100, 100_000)] == [1, 1, 10, 316]


def test_settings_survive_as_text():
    found = tuned(START, finds(8, 4), [1], 1 * [TRUE])
    assert Approximate.from_json(found.to_json()) == found


def test_recall_is_the_mean_share_of_the_exact_that_was_found():
    assert recall([["a", "b"], ["c", "x"]], [["a", "b"], ["c", "d"]]) == 0.75
    assert recall([["a"], []], [["a", "b"], []]) == 0.5


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_reading_a_table_in_blocks_finds_the_nearest_of_all(size: int):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    queries = rng.normal(size=(4, 8)).astype(np.float32)
    names = [str(i) for i in range(50)]
    blocks = [(names[i : i + size], vectors[i : i + size]) for i in range(0, 50, size)]
    dense = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    assert nearest(blocks, queries, 5) == [[str(i) for i in row] for row in dense]
    assert nearest(blocks[:1], queries, 500)[0] == nearest([blocks[0]], queries, size)[0]
