"""Files of groups, and batches that keep groups together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.batches import BatchPlan
from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.data.groups import check_groups, digest_of, group_line, group_numbers, read_groups
from cafe.errors import DataError
from cafe.types import Example, user


def examples(count: int) -> list[Example]:
    return [Example(str(i), query=user(f"q {i}"), target=user(f"t {i}")) for i in range(count)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = [["1", "7"], ["a\u2028b", 'q"'], ["0"]]
    (tmp_path / "g").write_text("".join(map(group_line, lines)), encoding="utf-8")
    groups = read_groups(tmp_path / "g")
    assert groups == {"1": 0, "7": 0, "a\u2028b": 1, 'q"': 1, "0": 2}
    assert digest_of(groups) != digest_of({**groups, "0": 1})
    numbers = group_numbers(examples(9), groups)
    assert numbers is not None
    assert numbers[1] == numbers[7] != numbers[0]
    assert len({*numbers[[2, 3, 4, 5, 6, 8]]}) == 1, "those that no line names are together"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["1"]\n["2"\n', "line 2: is not JSON"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"1": 2}\n', "line 1: expected a list of ids"),
        ("[1, 2]\n", "line 1: expected a list of ids"),
        ('["1", "2"]\n\n["2"]\n', "line 3: the id '2' is in a group already"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "g").write_text(text)
    with pytest.raises(DataError, match=message):
        read_groups(tmp_path / "g")
    with pytest.raises(DataError, match="cannot be read"):
        read_groups(tmp_path / "gone")


def test_groups_of_other_data_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names none of the 3 examples"):
        check_groups(examples(3), {"x": 0}, tmp_path)
    with pytest.raises(DataError, match="2 examples have the id '1'"):
        check_groups([*examples(3), examples(2)[1]], {"1": 0}, tmp_path)
    check_groups(examples(3), {"2": 0}, tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 4), st.integers(-3, 3))
def test_a_batch_is_whole_groups(size: int, count: int, per_batch: int, seed: int) -> None:
    """Every epoch has every example once, groups in another order."""
    rng = np.random.default_rng(seed + 3)
    groups = rng.permutation(np.arange(count).repeat(size))
    batch = size * min(per_batch, count)
    if batch < 2:
        return
    plan = BatchPlan([len(groups)], [1.0], batch, seed, groups=[groups])
    per_epoch = len(groups) // batch
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [i for step in steps for i in plan.plan(step)]
        assert len(seen) == len({*seen}) == per_epoch * batch
        for step in steps:
            _, counts = np.unique(groups[plan.plan(step)], return_counts=True)
            assert (counts == size).all()


def test_orders_differ_between_epochs_and_any_step_can_be_asked_first() -> None:
    groups = np.arange(8).repeat(4)
    plan = BatchPlan([32], [1.0], 8, 5, groups=[groups])
    epochs = [[tuple(plan.plan(4 * e + i)) for i in range(4)] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(groups[list(epoch[0])]) for epoch in epochs}) > 1
    fresh = BatchPlan([32], [1.0], 8, 5, groups=[groups])
    assert fresh.plan(9) == plan.plan(9), "a resumed run asks for its next step only"
    plain = BatchPlan([32], [1.0], 8, 5)
    assert any(len({*groups[plain.plan(step)]}) > 2 for step in range(4)), "by chance they are not"


def test_what_does_not_fill_a_batch_differs_between_epochs() -> None:
    groups = np.array([0] * 4 + [1] * 4 + [2] * 2)
    plan = BatchPlan([10], [1.0], 4, 0, groups=[groups])
    left = {frozenset(range(10)) - {*plan.plan(2 * e), *plan.plan(2 * e + 1)} for e in range(12)}
    assert len(left) > 2


def test_sources_have_groups_of_their_own_and_merging_keeps_them() -> None:
    own = {str(i): i % 3 for i in range(12)}
    sources = [ExampleSource("a", examples(12), groups=own), ExampleSource("b", examples(8))]
    for merged in (False, True):
        every = ExampleSet.build(sources, merge_by_image=merged)
        plan = every.plan(4, seed=0)
        seen = 0
        for step in range(20):
            if plan.source(step) == 0:
                ids = [every[i].id for i in plan.plan(step)]
                assert len({own[one] for one in ids}) == 1
                seen += 1
        assert seen > 5
