"""Threads that work ahead, and the search for the broken input of a batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from cafe.batching import encode_each, prefetch_map
from cafe.errors import DataError

# ---------------------------------------------------------------------- ahead of their use


def test_results_come_in_order_whatever_takes_longest():
    def slow(i: int) -> int:
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    for threads in (0, 1, 2, 5, 50):
        assert list(prefetch_map(slow, range(12), threads)) == [i * i for i in range(12)]
        assert list(prefetch_map(slow, [], threads)) == []


def test_the_next_items_are_begun_and_no_more_than_that():
    begun: list[int] = []
    third = threading.Event()

    def note(i: int) -> int:
        begun.append(i)
        if i == 2:
            third.set()
        return i

    results = prefetch_map(note, range(10), 2)
    assert next(results) == 0
    assert third.wait(10), "while the first is used, the third is made"
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 3


def test_an_error_comes_where_its_result_would():
    def fail(i: int) -> int:
        if i == 3:
            raise KeyError(i)
        return i

    results: Iterator[int] = prefetch_map(fail, range(9), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
    assert threading.active_count() == 1 or not any(
        t.name.startswith("prefetch") for t in threading.enumerate()
    )


def test_more_items_may_be_begun_than_there_are_threads():
    begun: list[int] = []
    taken = iter(range(20))
    results = prefetch_map(lambda i: begun.append(i) or i, taken, 2, begun=5)
    assert next(results) == 0
    assert next(taken) == 6, "five were begun, and one when the first was given"
    assert list(results) == [1, 2, 3, 4, 5, *range(7, 20)]
    assert sorted(begun) == [0, 1, 2, 3, 4, 5, *range(7, 20)]


def test_a_generator_is_read_as_its_items_are_wanted():
    assert list(prefetch_map(str, (i for i in range(3)), 2)) == ["0", "1", "2"]
    caller = threading.current_thread()
    for items, threads in (([1], 4), ([1, 2, 3], 0)):
        names = prefetch_map(lambda _: threading.current_thread(), items, threads)
        assert set(names) == {caller}


def test_closing_drops_what_is_not_begun():
    begun: list[int] = []
    go = threading.Event()

    def wait(i: int) -> int:
        begun.append(i)
        assert i == 0 or go.wait(10)
        return i

    results = prefetch_map(wait, range(10), 1, begun=4)
    assert next(results) == 0
    threading.Timer(0.05, go.set).start()
    results.close()  # type: ignore[attr-defined]
    assert begun in ([0], [0, 1])
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


# ---------------------------------------------------------------------- broken inputs


@pytest.mark.parametrize("broken", [set(), {0}, {6}, {2, 3}, {0, 1, 2, 3, 4, 5, 6}])
def test_the_broken_inputs_of_a_batch_are_found_and_the_others_encoded(broken: set[int]):
    asked: list[int] = []

    def encode(values: Sequence[int]) -> list[str]:
        asked.append(len(values))
        if bad := [i for i in values if i in broken]:
            raise DataError(f"{bad[0]} is broken")
        return [str(i) for i in values]

    found, failures = encode_each(encode, range(7))
    assert found == {i: str(i) for i in range(7) if i not in broken}
    assert {i: str(error) for i, error in failures.items()} == {i: f"{i} is broken" for i in broken}
    assert asked[0] == 7
    assert len(asked) <= 1 + 6 * max(1, len(broken))


def test_no_input_asks_nothing_and_other_errors_are_not_held():
    assert encode_each(lambda values: pytest.fail("asked"), []) == ({}, {})
    with pytest.raises(ZeroDivisionError):
        encode_each(lambda values: [1 // 0], ["a"])
