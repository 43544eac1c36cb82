"""A target comes once in a batch wherever that is possible."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.batches import BatchPlan, spread
from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.types import Example, Image, user


def spread_of(targets: list[int], batch: int, seed: int = 0) -> np.ndarray:
    stream = np.random.default_rng(seed)
    order = stream.permutation(len(targets))
    return spread(order, np.array(targets), batch, stream)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9))
def test_targets_are_shared_out_as_evenly_as_can_be(
    targets: list[int], batch: int, seed: int
) -> None:
    found = spread_of(targets, batch, seed)
    assert sorted(found) == list(range(len(targets)))
    count = len(targets) // batch
    batches = [found[b * batch : (b + 1) * batch] for b in range(count)]
    kept = Counter(targets[i] for whole in batches for i in whole)
    for whole in batches:
        for target, times in Counter(targets[i] for i in whole).items():
            assert times <= -(-kept[target] // count)  # 1, if it has at most `count` examples


def test_a_plain_shuffle_would_repeat_targets() -> None:
    targets = [n // 4 for n in range(32)]
    plan = BatchPlan([32], [1.0], 8, 0, targets=[np.array(targets)])
    without = BatchPlan([32], [1.0], 8, 0)
    for step in range(12):
        assert len({targets[i] for i in plan.plan(step)}) == 8
    assert any(len({targets[i] for i in without.plan(step)}) < 8 for step in range(12))


def test_batches_are_still_random() -> None:
    """Two examples with different targets meet as often as any others do."""
    targets = [0, 0, 1, 1, *range(2, 14)]
    together = Counter[tuple[int, int]]()
    for seed in range(2000):
        found = spread_of(targets, 4, seed)
        for whole in found.reshape(4, 4):
            together.update((int(a), int(b)) for a in whole for b in whole if a < b)
    assert together[0, 1] == together[2, 3] == 0
    assert together[6, 7] == pytest.approx(2000 * 3 / 15, rel=0.15)
    assert together[0, 6] == pytest.approx(2000 * 3 / 14, rel=0.2)  # 14: never with its twin


def test_a_plan_with_targets_is_the_same_from_any_step_on() -> None:
    targets = [np.array([n // 3 for n in range(30)]), None]
    plans = [BatchPlan([30, 9], [1.0, 0.5], 5, 7, targets=targets) for _ in range(2)]
    forward = [plans[0].plan(step) for step in range(30)]
    assert [plans[1].plan(step) for step in reversed(range(30))] == forward[::-1]
    assert sorted(i for step in range(3) for i in plans[0].plan(step) if i < 30)


def test_what_counts_as_one_target() -> None:
    def pair(name: str, target: object, target_id: str | None = None) -> Example:
        return Example(name, user("q"), user(target), target_id=target_id)  # type: ignore[arg-type]

    texts = [pair("a", "x"), pair("b", "x"), pair("c", "y"), pair("d", "z", "x-y"), pair("e", "x")]
    images = [pair("f", Image("1.png")), pair("g", Image("1.png")), pair("h", Image("2.png"))]
    chats = [Example(str(n), dialogues=(user("a"),)) for n in range(3)]
    once_pairs = [Example(str(n), dialogues=(user("a"),), target_id="xyx"[n]) for n in range(3)]
    names = ("texts", "images", "chats", "once pairs")
    kinds = (texts, images, chats, once_pairs)
    sources = [ExampleSource(*s) for s in zip(names, kinds, strict=True)]
    plan = ExampleSet.build(sources).plan(2, 0)
    first, second, third, fourth = plan.targets
    assert first is not None
    assert first.tolist() == [0, 0, 1, 2, 0]
    assert second is not None
    assert second.tolist() == [0, 0, 1]
    assert third is None
    assert fourth is not None
    assert fourth.tolist() == [0, 1, 0]
