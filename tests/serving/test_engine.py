"""The queue and its batches, with a model that only records its calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cafe.errors import DataError
from cafe.serving.engine import ROWS_PER_BATCH, Call, Engine
from cafe.serving.errors import ApiError
from cafe.serving.messages import Embedding, Prompt, RequestKind, WorkItem
from cafe.types import Image, user
from helpers.fakes import Fake, FakeClock, vector, wait_until

SECONDS = 20

WORDS = 10_000
LONG = " ".join(["word"] * WORDS)
"""An answer that does not end during a test."""


@pytest.fixture
def model() -> Fake:
    return Fake()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def timed(model: Fake, clock: FakeClock) -> Iterator[Engine]:
    """An engine whose items wait by `clock`."""
    engine = started(model, clock=clock, max_wait_seconds=0.0)
    yield engine
    engine.close(SECONDS)


@pytest.fixture
def engine(model: Fake) -> Iterator[Engine]:
    engine = started(model)
    yield engine
    model.open.set()
    engine.close(SECONDS)


def started(model: Fake, **settings) -> Engine:
    engine = Engine(lambda: model, **{"max_batch": 4, "max_queue": 8, **settings})
    engine.start()
    wait_until(lambda: engine.loaded)
    return engine


def call(*texts: str, kind: RequestKind = "embed") -> Call:
    return Call(kind, [WorkItem(user(text), i) for i, text in enumerate(texts)])


def prompt(text: str, stream: bool = False, **more) -> Call:
    item = WorkItem(Prompt(user(text), max_new_tokens=1000, stream=stream))
    return Call("generate", [item], **more)


def busy(engine: Engine, model: Fake) -> Call:
    """A call that keeps the model computing until `model.open` is set."""
    model.open.clear()
    first = call("first")
    engine.submit(first)
    wait_until(lambda: model.log)
    return first


def test_results_come_in_order_whatever_batches_they_were_in(engine: Engine):
    texts = [f"text {i}" for i in range(11)]
    many = call(*texts)
    engine.submit(many)
    results = many.future.result(SECONDS)
    assert [f.vector.tolist() for f in results] == [vector(t).tolist() for t in texts]
    assert [f.tokens for f in results] == [len(t) for t in texts]


def test_calls_that_wait_are_computed_together_up_to_the_largest_batch(engine: Engine, model: Fake):
    busy(engine, model)
    calls = [call(f"text {i}") for i in range(6)]
    for one in calls:
        engine.submit(one)
    model.open.set()
    for one in calls:
        one.future.result(SECONDS)
    assert [len(texts) for kind, texts in model.log] == [1, 4, 2]


def test_an_idle_model_waits_for_company(model: Fake, clock: FakeClock):
    engine = started(model, clock=clock, max_wait_seconds=0.1)
    first, second = call("a"), call("b")
    engine.submit(first)
    reads = clock.reads
    wait_until(lambda: clock.reads >= reads + 6)  # the engine has looked at its queue again
    assert not first.future.done()
    engine.submit(second)
    assert engine.waiting["embed"] == 2
    clock.now = 0.1
    first.future.result(SECONDS)
    second.future.result(SECONDS)
    assert model.log == [("embed", ["a", "b"])]
    full = call(*"cdef")
    engine.submit(full)
    full.future.result(SECONDS)  # a full batch does not wait: the clock stands
    engine.close(SECONDS)


def test_a_large_call_does_not_keep_a_small_one_waiting(engine: Engine, model: Fake):
    busy(engine, model)
    large, small = call(*[f"large {i}" for i in range(7)]), call("small")
    engine.submit(large)
    engine.submit(small)
    model.open.set()
    small.future.result(SECONDS)
    large.future.result(SECONDS)
    assert "small" in model.log[1][1]


def test_kinds_and_images_do_not_mix(engine: Engine, model: Fake):
    busy(engine, model)
    has_image = Call("embed", [WorkItem(user(Image(b""), "has_image"))])
    calls = [call("text"), has_image, call("question", kind="score"), prompt("a b")]
    for one in calls:
        engine.submit(one)
    model.open.set()
    for one in calls:
        one.future.result(SECONDS)
    assert sorted(model.log[1:]) == [
        ("embed", ["has_image"]),
        ("embed", ["text"]),
        ("generate", ["a b"]),
        ("score", ["question"]),
    ]


def test_a_full_queue_refuses_and_says_when_to_come_again(engine: Engine, model: Fake):
    busy(engine, model)
    for i in range(8):
        assert not engine.full
        engine.submit(call(f"text {i}"))
    assert engine.full
    with pytest.raises(ApiError) as caught:
        engine.submit(call("one more"))
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1


def test_a_large_call_is_taken_whole_while_there_is_room_for_one(engine: Engine, model: Fake):
    busy(engine, model)
    engine.submit(call(*[str(i) for i in range(100)]))
    assert engine.waiting == {"embed": 100, "tokens": 0, "score": 0, "generate": 0}


def test_a_large_call_takes_its_share_of_the_queue_and_leaves_the_others_theirs(model: Fake):
    engine = started(model, max_queue=16)
    busy(engine, model)
    engine.submit(call(*[f"large {i}" for i in range(2048)]))
    small = [call(f"small {i}") for i in range(14)]
    for one in small:
        engine.submit(one)  # none is refused
    assert engine.full
    model.open.set()
    for one in small:
        one.future.result(SECONDS)
    engine.close(SECONDS)


def test_a_cancelled_call_frees_its_places_and_is_never_computed(engine: Engine, model: Fake):
    busy(engine, model)
    left = call(*[f"left {i}" for i in range(8)])
    engine.submit(left)
    engine.cancel(left)
    assert engine.waiting["embed"] == 0
    stays = call("stays")
    engine.submit(stays)
    model.open.set()
    stays.future.result(SECONDS)
    assert [texts for _, texts in model.log] == [["first"], ["stays"]]


def test_one_broken_item_fails_only_its_own_call(engine: Engine, model: Fake):
    busy(engine, model)
    good, bad, bug = call("good"), call("fine", "broken"), call("bug")
    for one in (good, bad, bug):
        engine.submit(one)
    model.open.set()
    assert good.future.result(SECONDS)[0].tokens == 4
    with pytest.raises(DataError, match="input 1: broken"):
        bad.future.result(SECONDS)
    with pytest.raises(RuntimeError):
        bug.future.result(SECONDS)
    after = call("after")
    engine.submit(after)
    after.future.result(SECONDS)


def test_one_broken_prompt_fails_only_its_own_call(engine: Engine, model: Fake):
    busy(engine, model)
    good, bad = prompt("a b c"), prompt("broken")
    engine.submit(good)
    engine.submit(bad)
    model.open.set()
    assert good.future.result(SECONDS)[0].text == "a b c"
    with pytest.raises(DataError, match="broken"):
        bad.future.result(SECONDS)


def test_embeddings_are_served_between_two_tokens_of_a_long_answer(engine: Engine, model: Fake):
    model.step_seconds = 0.005
    long = prompt(LONG)
    engine.submit(long)
    wait_until(lambda: model.steps > 2)
    for i in range(5):
        one = call(f"text {i}")
        engine.submit(one)
        one.future.result(SECONDS)
    assert not long.future.done(), "the answer ended first, so nothing is shown"
    engine.cancel(long)


def test_endless_embeddings_do_not_starve_an_answer(model: Fake):
    engine = started(model, max_wait_seconds=0.0, max_queue=1000)
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            one = call(*"abcd")
            engine.submit(one)
            one.future.result(SECONDS)

    floods = [threading.Thread(target=flood) for _ in range(3)]
    for thread in floods:
        thread.start()
    answer = prompt("one two three four five")
    engine.submit(answer)
    assert answer.future.result(SECONDS)[0].text == "one two three four five"
    stop.set()
    for thread in floods:
        thread.join(SECONDS)
    engine.close(SECONDS)


def test_a_second_answer_does_not_wait_for_the_end_of_a_long_one(engine: Engine, model: Fake):
    model.step_seconds = 0.005
    long = prompt(LONG)
    engine.submit(long)
    wait_until(lambda: model.steps > 2)
    short = prompt("two words")
    engine.submit(short)
    short.future.result(SECONDS)
    assert not long.future.done()
    engine.cancel(long)


def test_more_answers_than_may_be_written_wait_in_the_queue(engine: Engine, model: Fake):
    model.step_seconds = 0.001
    rows = ROWS_PER_BATCH * 4
    calls = []
    for i in range(rows):
        calls.append(prompt(LONG))
        engine.submit(calls[-1])
        wait_until(lambda i=i: engine.generating == i + 1)
    waits = prompt("waits")
    engine.submit(waits)
    steps = model.steps
    wait_until(lambda: model.steps > steps + 3)
    assert (engine.waiting["generate"], engine.generating) == (1, rows)
    engine.cancel(calls[0])
    assert waits.future.result(SECONDS)[0].text == "waits"
    for one in calls:
        engine.cancel(one)


def test_prompts_join_between_two_tokens_without_waiting_for_company(
    timed: Engine, model: Fake, clock: FakeClock
):
    """The clock stands: nothing but an answer that is being written lets them begin."""
    model.step_seconds = 0.001
    long = prompt(LONG)
    timed.submit(long)
    wait_until(lambda: timed.generating == 1)
    for text in ("first", "second of all"):
        one = prompt(text)
        timed.submit(one)
        assert one.future.result(SECONDS)[0].text == text
    assert not long.future.done()
    timed.cancel(long)


def test_a_row_that_fails_ends_alone(engine: Engine, model: Fake):
    good, bad = prompt("a b c d e"), prompt("a b fails c")
    engine.submit(good)
    engine.submit(bad)
    with pytest.raises(DataError, match="matcher"):
        bad.future.result(SECONDS)
    assert good.future.result(SECONDS)[0].text == "a b c d e"
    assert engine.generating == 0


def test_a_step_that_fails_ends_the_rows_in_it_and_no_later_ones(engine: Engine, model: Fake):
    good, bad = prompt("a b c d e"), prompt("a breaks c")
    busy(engine, model)
    engine.submit(good)
    engine.submit(bad)
    model.open.set()
    for one in (good, bad):
        with pytest.raises(RuntimeError):
            one.future.result(SECONDS)
    after = prompt("after")
    engine.submit(after)
    assert after.future.result(SECONDS)[0].text == "after"


def test_pieces_of_a_stream_join_to_the_answer(engine: Engine):
    pieces: list[str] = []
    one = prompt("one two three", stream=True, on_piece=pieces.append)
    engine.submit(one)
    (answer,) = one.future.result(SECONDS)
    assert "".join(pieces) == answer.text
    assert len(pieces) == 3


def test_a_cancelled_answer_is_not_written_on(engine: Engine, model: Fake):
    model.step_seconds = 0.005
    long = prompt(LONG)
    engine.submit(long)
    wait_until(lambda: model.steps > 2)
    engine.cancel(long)
    wait_until(lambda: engine.generating == 0)
    assert model.dropped == [0]
    assert model.steps < WORDS


def test_a_reader_without_its_event_loop_fails_no_other_call(engine: Engine):
    def gone(piece: str) -> None:
        raise RuntimeError("Event loop is closed")

    engine.submit(prompt("one two three", stream=True, on_piece=gone))
    after = call("after")
    engine.submit(after)
    after.future.result(SECONDS)


def test_closing_finishes_what_was_accepted(model: Fake):
    engine = started(model, max_wait_seconds=60.0)
    embed, answer = call("a"), prompt("b c d")
    engine.submit(embed)
    engine.submit(answer)
    engine.close(SECONDS)
    assert embed.future.done()
    assert answer.future.result(0)[0].text == "b c d"
    with pytest.raises(ApiError) as caught:
        engine.submit(call("late"))
    assert caught.value.status == 503


def test_a_model_that_does_not_load_is_reported():
    def load() -> Fake:
        raise DataError("no such model")

    engine = Engine(load)
    with pytest.raises(ApiError) as caught:
        engine.submit(call("early"))
    assert caught.value.code == "model_loading"
    engine.start()
    wait_until(lambda: engine.failure is not None)
    assert str(engine.failure) == "no such model"
    with pytest.raises(ApiError) as caught:
        engine.submit(call("a"))
    assert (caught.value.status, caught.value.code) == (503, "model_failed")


def test_batches_are_reported_with_kind_size_and_duration(clock: FakeClock):
    class Slow(Fake):
        def embed(self, items: list[WorkItem]) -> list[Embedding]:
            clock.now += 2.5
            return super().embed(items)

    reports: list[tuple[str, int, float]] = []
    engine = started(
        Slow(), on_batch=lambda *batch: reports.append(batch), clock=clock, max_batch=2
    )
    one = call("a", "b")
    engine.submit(one)
    one.future.result(SECONDS)
    assert reports == [("embed", 2, 2.5)]
    engine.close(SECONDS)
