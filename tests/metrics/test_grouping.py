"""Groups of alike pairs: the graph by brute force, planted groups, and what keeps pairs apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.metrics.grouping import groups_of_neighbours, hardest_in_group, mutual_neighbours
from cafe.metrics.mining import hard_negatives


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def neighbours_by_loops(window: np.ndarray, target_of: np.ndarray) -> list[list[int]]:
    reaches = [{j for j, t in enumerate(target_of) if t in row} for row in window.tolist()]
    count = range(len(window))
    return [[j for j in count if j in reaches[i] and i in reaches[j] and i != j] for i in count]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 6), st.integers(0, 6))
def test_neighbours_are_those_of_the_slow_twin(seed: int, n: int, width: int, shared: int) -> None:
    rng = np.random.default_rng(seed)
    target_of = rng.integers(0, max(1, n - shared), n)
    window = rng.integers(-1, n, (n, width))
    found = mutual_neighbours(window, target_of)
    assert [part.tolist() for part in found] == neighbours_by_loops(window, target_of)


def planted(rng: np.random.Generator, groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit queries and targets around `groups` centres, and shuffled."""
    centres = np.eye(groups).repeat(size, axis=0)[rng.permutation(groups * size)]
    noisy = [centres + 0.05 * rng.normal(size=centres.shape) for _ in range(2)]
    return unit(noisy[0]), unit(noisy[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_found_whole(seed: int) -> None:
    """Eight centres of six pairs each; groups of six are exactly these, groups of three parts."""
    queries, targets = planted(np.random.default_rng(seed), 8, 6)
    own = np.arange(48)
    relevant = [[i] for i in own]
    found = hard_negatives(queries, targets, relevant, window=(0, 5), count=5)
    neighbours = mutual_neighbours(found.indices, own)
    centre = queries.argmax(axis=1)
    for size in (6, 3):
        groups = groups_of_neighbours(neighbours, own, relevant, size=size, seed=seed)
        assert sorted(i for group in groups for i in group) == own.tolist()
        assert {len(group) for group in groups} == {size}
        assert all(len({*centre[group]}) == 1 for group in groups)
        hard = np.nanmean(hardest_in_group(queries, targets, own, relevant, groups))
        order = np.random.default_rng(seed).permutation(48).reshape(-1, size)
        random = np.nanmean(hardest_in_group(queries, targets, own, relevant, order.tolist()))
        assert hard > 0.9 > random + 0.3


def test_the_window_skips_what_is_too_near() -> None:
    """With the five best skipped, the neighbours of a pair are around another centre."""
    rng = np.random.default_rng(0)
    queries, targets = planted(rng, 4, 6)
    relevant = [[i] for i in range(24)]
    found = hard_negatives(queries, targets, relevant, window=(5, 12), count=7)
    centre = queries.argmax(axis=1)
    for i, near in enumerate(mutual_neighbours(found.indices, np.arange(24))):
        assert centre[i] not in centre[near]


def test_pairs_that_are_right_for_one_another_are_apart() -> None:
    """Pairs 0 and 1 have one target, 2 and 3 one query; all are neighbours."""
    target_of = np.array([0, 0, 1, 2, 3, 4])
    relevant = [[0], [0], [1, 2], [2, 1], [3], [4]]
    neighbours = [np.array([j for j in range(6) if j != i]) for i in range(6)]
    for seed in range(20):
        groups = groups_of_neighbours(neighbours, target_of, relevant, size=3, seed=seed)
        assert sorted(i for group in groups for i in group) == list(range(6))
        for group in map(set, groups):
            assert not {0, 1} <= group
            assert not {2, 3} <= group


def test_more_equal_targets_than_groups_leave_groups_smaller() -> None:
    relevant, target_of = [[0]] * 3 + [[1]], np.array([0, 0, 0, 1])
    groups = groups_of_neighbours([np.zeros(0, int)] * 4, target_of, relevant, size=4)
    assert sorted(map(len, groups)) == [1, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 9))
def test_every_pair_is_in_one_full_group(seed: int, n: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    window = rng.integers(0, n, (n, 4))
    neighbours = mutual_neighbours(window, np.arange(n))
    relevant = [[i] for i in range(n)]
    groups = groups_of_neighbours(neighbours, np.arange(n), relevant, size=size, seed=seed)
    assert sorted(i for group in groups for i in group) == list(range(n))
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    again = groups_of_neighbours(neighbours, np.arange(n), relevant, size=size, seed=seed)
    assert again == groups


def test_another_seed_begins_elsewhere() -> None:
    none = [np.zeros(0, int)] * 30
    relevant = [[i] for i in range(30)]
    found = [groups_of_neighbours(none, np.arange(30), relevant, size=5, seed=s) for s in (0, 1)]
    assert found[0] != found[1]


def test_the_hardest_wrong_target_by_hand() -> None:
    angles = np.deg2rad([0, 10, 40, 90])
    both = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    relevant = [[0], [1], [2], [3]]
    found = hardest_in_group(both, both, np.arange(4), relevant, [[0, 1, 3], [2]])
    np.testing.assert_allclose(found[:2], np.cos(np.deg2rad(10)))
    assert found[3] == pytest.approx(np.cos(np.deg2rad(80)))
    assert np.isnan(found[2]), "it is alone"
    related = hardest_in_group(both, both, np.arange(4), [[0, 1], [1], [2], [3]], [[0, 1, 3], [2]])
    assert related[0] == pytest.approx(0.0, abs=1e-12), "target 1 is right for it"


def test_a_group_of_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="size is 1"):
        groups_of_neighbours([], np.zeros(0, int), [], size=1)
