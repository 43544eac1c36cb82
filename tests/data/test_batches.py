"""The order of the data: complete, shuffled, shared by weight, and the same from any step on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.batches import BatchPlan
from cafe.errors import DataError

SOURCES = st.lists(st.tuples(st.integers(2, 40), st.floats(0.01, 100.0)), min_size=1, max_size=5)


def make(sources: list[tuple[int, float]], batch: int, seed: int = 0) -> BatchPlan:
    sizes, weights = zip(*sources, strict=True)
    return BatchPlan(sizes, weights, batch, seed)


def one_after_another(weights: list[float], steps: int) -> list[int]:
    """The slow twin of the turns: always the source whose next batch is due first."""
    total, given_ = sum(weights), [0] * len(weights)
    turns = []
    for _ in range(steps):
        due = [(count + 0.5) / (w / total) for count, w in zip(given_, weights, strict=True)]
        turns.append(due.index(min(due)))
        given_[turns[-1]] += 1
    return turns


def test_turns_by_hand() -> None:
    # shares 3/4 and 1/4: due at 2/3, 6/3, 10/3, 14/3, ... and at 2, 6, 10, ...; a tie goes first
    plan = BatchPlan([10, 10], [3.0, 1.0], 2, seed=0)
    assert [plan.source(step) for step in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.integers(0, 300))
def test_turns_are_those_of_the_slow_twin(sources: list[tuple[int, float]], start: int) -> None:
    plan = make(sources, batch=4)
    turns = one_after_another(list(plan.weights), start + 20)
    assert [plan.source(step) for step in range(start, start + 20)] == turns[start:]


@settings(max_examples=50, deadline=None)
@given(SOURCES)
def test_every_source_gets_its_share(sources: list[tuple[int, float]]) -> None:
    plan, steps = make(sources, batch=4), 200
    counts = Counter(plan.source(step) for step in range(steps))
    for source, weight in enumerate(plan.weights):
        share = weight / sum(plan.weights)
        assert abs(counts[source] - steps * share) <= share * len(plan.sizes) / 2 + 0.5 + 1e-6


@settings(max_examples=50, deadline=None)
@given(SOURCES, st.integers(1, 50), st.integers(-3, 3))
def test_an_epoch_of_a_source_repeats_nothing_and_leaves_out_less_than_a_batch(
    sources: list[tuple[int, float]], batch: int, seed: int
) -> None:
    plan = make(sources, batch, seed)
    seen: list[list[list[int]]] = [[] for _ in sources]
    for step in range(120):
        seen[plan.source(step)].append(plan.plan(step))
    offset = 0
    for (size, _), batches in zip(sources, seen, strict=True):
        per_epoch = max(1, size // batch)
        assert {len(b) for b in batches} <= {min(batch, size)}
        for begin in range(0, len(batches), per_epoch):
            drawn = [index for b in batches[begin : begin + per_epoch] for index in b]
            assert len(set(drawn)) == len(drawn)
            assert set(drawn) <= set(range(offset, offset + size))
            if len(batches) >= begin + per_epoch:
                assert size - len(drawn) < batch
        offset += size


@settings(max_examples=50, deadline=None)
@given(SOURCES, st.integers(1, 20), st.integers(0, 100))
def test_a_plan_that_starts_anywhere_goes_on_as_if_it_had_never_stopped(
    sources: list[tuple[int, float]], batch: int, start: int
) -> None:
    whole = make(sources, batch, seed=5)
    batches = [whole.plan(step) for step in range(start + 10)]
    resumed = make(sources, batch, seed=5)
    assert [resumed.plan(step) for step in range(start, start + 10)] == batches[start:]
    backwards = make(sources, batch, seed=5)
    assert [backwards.plan(step) for step in reversed(range(start + 10))] == batches[::-1]


def test_one_epoch_holds_every_example_once_when_batches_fill_it() -> None:
    plan = BatchPlan([12], [1.0], 4, seed=0)
    assert plan.steps_per_epoch == 3
    epochs = [[i for step in range(3) for i in plan.plan(3 * e + step)] for e in range(5)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5  # shuffled anew


def test_who_is_left_out_changes_from_epoch_to_epoch() -> None:
    plan = BatchPlan([7], [1.0], 3, seed=0)
    assert plan.steps_per_epoch == 2
    left_out = [set(range(7)) - {*plan.plan(2 * e), *plan.plan(2 * e + 1)} for e in range(40)]
    assert {len(out) for out in left_out} == {1}
    assert set().union(*left_out) == set(range(7))


def test_seeds_and_sources_have_orders_of_their_own() -> None:
    orders = {tuple(BatchPlan([30], [1.0], 30, seed).plan(0)) for seed in (-1, 0, 1, 2**40)}
    assert len(orders) == 4
    twins = BatchPlan([30, 30], [1.0, 1.0], 30, seed=0)
    first, second = twins.plan(0), twins.plan(1)
    assert sorted(second) == list(range(30, 60))
    assert [index - 30 for index in second] != first


def test_a_source_smaller_than_a_batch_comes_whole() -> None:
    plan = BatchPlan([3, 16], [1.0, 1.0], 8, seed=0)
    assert [sorted(plan.plan(step)) for step in (0, 2, 4)] == [[0, 1, 2]] * 3
    assert {len(plan.plan(step)) for step in (1, 3, 5)} == {8}
    assert plan.steps_per_epoch == 1 + 2


def test_a_source_without_weight_is_never_drawn() -> None:
    plan = BatchPlan([0, 8], [0.0, 2.0], 4, seed=0)
    assert [plan.source(step) for step in range(6)] == [1] * 6
    assert plan.steps_per_epoch == 2


def test_a_late_step_is_planned_without_the_steps_before_it() -> None:
    plan = BatchPlan([1000, 50, 7], [1.0, 0.3, 1e-3], 10, seed=0)
    far = 10**12
    counts = Counter(plan.source(far + step) for step in range(1303))
    assert counts[0] == pytest.approx(1000, abs=2)
    assert counts[1] == pytest.approx(300, abs=2)
    assert counts[2] == pytest.approx(1, abs=1)
    assert len(plan.plan(far)) == (7 if plan.source(far) == 2 else 10)


@pytest.mark.parametrize(
    ("sizes", "weights", "batch", "error", "message"),
    [
        ([1], [1.0], 4, DataError, "source 1: 1 examples, and a batch needs at least 2"),
        ([8, 0], [1.0, 1.0], 1, DataError, "source 2: 0 examples"),
        ([8], [0.0], 4, DataError, "no source has a weight above 0"),
        ([8], [-1.0], 4, ValueError, "not negative"),
        ([8], [float("nan")], 4, ValueError, "finite"),
        ([8], [1.0, 1.0], 4, ValueError, "one weight per source"),
        ([8], [1.0], 0, ValueError, "at least one example per batch"),
    ],
)
def test_what_cannot_be_planned_is_an_error(
    sizes: list[int], weights: list[float], batch: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BatchPlan(sizes, weights, batch, seed=0)


def test_errors_name_the_source_and_steps_count_from_zero() -> None:
    with pytest.raises(DataError, match=r"questions\.json: 1 examples"):
        BatchPlan([8, 1], [1.0, 1.0], 4, 0, ["captions.json", "questions.json"])
    with pytest.raises(ValueError, match="count from 0"):
        BatchPlan([8], [1.0], 4, 0).plan(-1)
    assert BatchPlan([1], [1.0], 1, 0).plan(3) == [0]  # nothing to contrast: one is enough
