"""Gap, alignment, uniformity, effective rank, probe and map: closed forms and invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import DataError
from cafe.metrics import (
    alignment,
    effective_rank,
    modality_gap,
    modality_probe_accuracy,
    project_2d,
    uniformity,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(d: int, seed: int = 9) -> np.ndarray:
    return np.linalg.qr(normal(d, d, seed=seed))[0]


E1, E2 = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])


# --- closed forms -----------------------------------------------------------------------------


def test_gap_by_hand() -> None:
    assert modality_gap(E1, E1) == 0.0
    assert modality_gap(E1, E2) == pytest.approx(math.sqrt(2))
    assert modality_gap(E1, -E1) == 2.0
    assert modality_gap(np.concatenate([E1, -E1]), E2) == pytest.approx(1.0)  # centroid at 0


def test_alignment_by_hand() -> None:
    assert alignment(E1, 5 * E1) == 0.0
    assert alignment(E1, -E1) == 4.0
    both = np.concatenate([E1, E2])
    assert alignment(both, np.concatenate([E1, E1])) == pytest.approx((0 + 2) / 2)


def test_uniformity_by_hand() -> None:
    assert uniformity(np.ones((5, 3))) == pytest.approx(0.0)
    assert uniformity(np.concatenate([E1, -E1])) == pytest.approx(-8.0)
    # A square: four pairs at distance² 2, two at distance² 4.
    square = np.concatenate([E1, E2, -E1, -E2])
    expected = math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6)
    assert uniformity(square) == pytest.approx(expected)


def test_uniformity_of_the_uniform_sphere() -> None:
    assert uniformity(normal(1500, 64)) == pytest.approx(-4 + 8 / 64, abs=0.02)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_effective_rank_of_a_basis_is_its_size_and_of_a_line_one(d: int) -> None:
    assert effective_rank(np.repeat(np.eye(d), 3, axis=0)) == pytest.approx(d)
    assert effective_rank(np.ones((6, d))) == pytest.approx(1.0)


def test_effective_rank_by_hand() -> None:
    # Rows e1, e1, e1, e1, e2: singular values 2 and 1, shares 2/3 and 1/3.
    rows = np.concatenate([E1, E1, E1, E1, E2])
    assert effective_rank(rows) == pytest.approx(3 / 2 ** (2 / 3))


# --- slow twins and invariances ---------------------------------------------------------------


def test_blocks_of_pairs_equal_the_sum_over_pairs() -> None:
    x = normal(23, 5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = itertools.combinations(unit, 2)
    slow = math.log(np.mean([math.exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs]))
    for block in (1, 4, 7, 23, 100):
        assert uniformity(x, block=block) == pytest.approx(slow, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 100))
def test_rotation_length_and_order_change_nothing(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 12, 4))
    turn, order = rotation(4, seed), rng.permutation(12)
    c, d = scale * (a @ turn)[order], (b @ turn)[order]
    assert modality_gap(c, d) == pytest.approx(modality_gap(a, b))
    assert alignment(c, d) == pytest.approx(alignment(a, b))
    assert uniformity(c) == pytest.approx(uniformity(a))
    assert effective_rank(c) == pytest.approx(effective_rank(a))


# --- the probe --------------------------------------------------------------------------------


def test_a_plane_between_the_kinds_is_found_also_when_one_kind_is_rare() -> None:
    shift = np.zeros(16)
    shift[0] = 6.0
    few, many = normal(40, 16) + shift, normal(400, 16, seed=1) - shift
    assert modality_probe_accuracy(few, many) > 0.99
    assert modality_probe_accuracy(many, few) > 0.99


@pytest.mark.parametrize(("n", "m"), [(300, 300), (100, 1000)])
def test_kinds_that_are_alike_are_told_apart_by_chance_only(n: int, m: int) -> None:
    accuracy = modality_probe_accuracy(normal(n, 16), normal(m, 16, seed=1))
    assert accuracy == pytest.approx(0.5, abs=0.08)


def test_the_probe_is_judged_on_what_it_has_not_seen() -> None:
    """With more coordinates than points a fit separates even noise; the other half shows it."""
    a, b = normal(30, 200), normal(30, 200, seed=1)
    rows = np.concatenate([a, b])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.repeat([1.0, -1.0], 30)
    fitted = np.linalg.lstsq(rows, labels, rcond=None)[0]
    assert (np.sign(rows @ fitted) == labels).all()
    assert modality_probe_accuracy(a, b) == pytest.approx(0.5, abs=0.2)


def test_half_a_gap_gives_the_accuracy_of_the_normal_distribution() -> None:
    """Far from the origin the sphere is flat: two normals at distance 2 overlap by Phi(-1)."""
    far = np.array([1000.0, 0.0, 0.0])
    a, b = (normal(2000, 3, seed=s) + far + [0, side, 0] for s, side in ((0, 1.0), (1, -1.0)))
    assert modality_probe_accuracy(a, b) == pytest.approx(0.8413, abs=0.02)


def test_one_point_for_all_is_chance() -> None:
    same = np.full((9, 5), 0.7)
    assert modality_probe_accuracy(same, same) == 0.5
    assert modality_probe_accuracy(same, -same) == 1.0


def test_the_probe_decides_as_ridge_regression_written_out() -> None:
    """Its slow twin solves the weighted normal equations with all terms in them."""
    shift = 0.4 * np.eye(6)[0]
    a, b = normal(40, 6) + shift, normal(90, 6, seed=1) - shift
    rng = np.random.default_rng(0)
    kinds = [rng.permutation(k / np.linalg.norm(k, axis=1, keepdims=True)) for k in (a, b)]
    accuracies = []
    for first, second in ((0, 1), (1, 0)):
        fitted, judged = ([kind[start::2] for kind in kinds] for start in (first, second))
        rows = np.concatenate(fitted)
        labels = np.repeat([1.0, -1.0], [len(k) for k in fitted])
        weights = np.repeat([0.5 / len(k) for k in fitted], [len(k) for k in fitted])
        rows_1 = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        ridge = 1e-3 * np.mean([np.var(k, axis=0) for k in fitted])
        penalty = np.diag([ridge] * 6 + [0])  # none on the bias
        normal_matrix = (rows_1.T * weights) @ rows_1 + penalty
        solution = np.linalg.solve(normal_matrix, (rows_1.T * weights) @ labels)
        margins = [kind @ solution[:6] + solution[6] for kind in judged]
        accuracies += [(margins[0] > 0).mean(), (margins[1] < 0).mean()]
    assert 0.55 < np.mean(accuracies) < 0.95
    assert modality_probe_accuracy(a, b) == pytest.approx(np.mean(accuracies))


def test_the_seed_fixes_the_split() -> None:
    a, b = normal(50, 8), normal(50, 8, seed=1)
    results = {modality_probe_accuracy(a, b, seed=s) for s in (0, 0, 1, 2)}
    assert modality_probe_accuracy(a, b, seed=0) == modality_probe_accuracy(a, b)
    assert 1 < len(results) <= 3


# --- the map ----------------------------------------------------------------------------------


def test_points_of_a_plane_keep_their_distances() -> None:
    angles = np.linspace(0, 2.5, 9)
    plane = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    hidden = plane @ rotation(6)[:2]
    first, second = project_2d(hidden[:4], hidden[4:])
    flat = np.concatenate([first, second])
    assert (first.shape, second.shape) == ((4, 2), (5, 2))
    for i, j in itertools.combinations(range(9), 2):
        expected = np.linalg.norm(plane[i] - plane[j])
        assert np.linalg.norm(flat[i] - flat[j]) == pytest.approx(expected)


def test_axes_are_those_of_the_union_by_falling_variance() -> None:
    groups = normal(30, 5) * [3, 2, 1, 1, 1], normal(20, 5, seed=1) * [3, 2, 1, 1, 1] + 1
    flat = np.concatenate(project_2d(*groups))
    rows = np.concatenate([g / np.linalg.norm(g, axis=1, keepdims=True) for g in groups])
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows.T, bias=True)))[::-1]
    assert flat.mean(axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert np.cov(flat.T, bias=True) == pytest.approx(np.diag(variances[:2]), abs=1e-12)


def test_the_map_is_not_mirrored_by_order_or_grouping() -> None:
    x = normal(25, 6)
    (whole,) = project_2d(x)
    order = np.random.default_rng(3).permutation(25)
    np.testing.assert_allclose(project_2d(x[order])[0], whole[order], atol=1e-12)
    np.testing.assert_allclose(np.concatenate(project_2d(x[:9], x[9:])), whole, atol=1e-12)


def test_a_space_of_fewer_dimensions_is_filled_with_zeros() -> None:
    (line,) = project_2d(np.array([[1.0], [-1.0], [1.0]]))
    assert line[:, 1].tolist() == [0, 0, 0]
    assert abs(line[0, 0] - line[1, 0]) == pytest.approx(2)
    assert project_2d(E1)[0] == pytest.approx(np.zeros((1, 2)))


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_an_embedding_without_direction_is_named(bad: float) -> None:
    rows = np.ones((3, 2))
    rows[1] = bad
    with pytest.raises(DataError, match="embedding 1 of group 1 is zero, NaN or infinite"):
        modality_gap(np.ones((2, 2)), rows)


def test_shapes_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="with one d"):
        modality_gap(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="none empty"):
        effective_rank(np.ones((0, 4)))
    with pytest.raises(ValueError, match="2 queries and 3 targets"):
        alignment(np.ones((2, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="there must be two"):
        uniformity(np.ones((1, 4)))
    with pytest.raises(ValueError, match="two of each kind"):
        modality_probe_accuracy(np.ones((1, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="at least one group"):
        project_2d()
