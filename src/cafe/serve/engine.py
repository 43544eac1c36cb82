"""The queue, its batches, and the one thread that owns the model.

Calls (one per HTTP request) wait in lanes; a lane holds one kind of work, with or without pictures,
so that a short text is not padded to a picture's length. A batch takes one item of each waiting
call in turn, so a call of two thousand texts does not keep a single one waiting. Between any two
batches every running generation decodes one token: neither side can starve the other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from cafe.serve.refusal import Refused
from cafe.serve.work import Decoding, Event, Item, Kind, ModelCalls

Lane = tuple[Kind, bool]
OnBatch = Callable[[Kind, int, float], None]

MAX_GENERATIONS = 4
"""So many batches of prompts are answered side by side; later ones wait in the queue."""

EAGER_GENERATIONS = 2
PATIENCE_SECONDS = 1.0
"""A step costs nearly the same for one prompt as for ten. So while two generations run, prompts
wait together for the end of one; who has waited this long begins beside them."""


@dataclass(eq=False, slots=True)
class Call:
    """The work of one request: items of one kind, and a future for their results, in order.

    on_piece   called on the engine's thread with every piece of a streamed answer
    """

    kind: Kind
    items: Sequence[Item]
    on_piece: Callable[[str], None] | None = None
    future: Future[list[Any]] = field(default_factory=Future)
    _next: int = 0
    _results: dict[int, Any] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self.items) - self._next

    @property
    def lane(self) -> Lane:
        return self.kind, any(item.pictured for item in self.items)

    def take(self) -> int:
        """The index of the next item."""
        self._next += 1
        return self._next - 1

    def finish(self, index: int, result: Any) -> None:
        self._results[index] = result
        if len(self._results) == len(self.items):
            with contextlib.suppress(InvalidStateError):  # it was cancelled just now
                self.future.set_result([self._results[i] for i in range(len(self.items))])

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Place:
    """An item inside its call."""

    call: Call
    index: int

    @property
    def item(self) -> Item:
        return self.call.items[self.index]


@dataclass(eq=False, slots=True)
class _Queue:
    """Calls of one lane, in turn. `since`: when the oldest came."""

    calls: deque[tuple[Call, float]] = field(default_factory=deque)

    @property
    def waiting(self) -> int:
        return sum(call.waiting for call, _ in self.calls)

    @property
    def since(self) -> float:
        return min((when for _, when in self.calls), default=float("inf"))

    def take(self, count: int) -> list[_Place]:
        """Up to `count` items, one of each call in turn."""
        batch: list[_Place] = []
        while self.calls and len(batch) < count:
            call, when = self.calls.popleft()
            if call.future.done():
                continue
            batch.append(_Place(call, call.take()))
            if call.waiting:
                self.calls.append((call, when))
        return batch


class Engine:
    """Batches the calls of all requests for one model.

    load               makes the model, on the engine's thread
    max_batch          most items of one batch
    max_wait_seconds   how long an item waits for company while the model is idle
    max_queue          with so many items waiting, calls are refused
    on_batch           told of every batch: kind, items, seconds
    """

    def __init__(
        self,
        load: Callable[[], ModelCalls],
        *,
        max_batch: int = 32,
        max_wait_seconds: float = 0.005,
        max_queue: int = 256,
        on_batch: OnBatch | None = None,
    ) -> None:
        self._load = load
        self._max_batch, self._max_queue = max_batch, max_queue
        self._max_wait_seconds = max_wait_seconds
        self._on_batch = on_batch or (lambda kind, count, seconds: None)
        self._changed = threading.Condition()
        self._lanes: dict[Lane, _Queue] = {}
        self._running: list[_Running] = []
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._model: ModelCalls | None = None
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------ for requests

    @property
    def model(self) -> ModelCalls:
        """Raises Refused (503) before the model is loaded."""
        if self.failure is not None:
            raise Refused.unavailable("the model has failed", "model_failed")
        if self._model is None:
            raise Refused.unavailable("the model is being loaded", "model_loading")
        return self._model

    @property
    def loaded(self) -> bool:
        return self._model is not None and self.failure is None

    @property
    def waiting(self) -> dict[Kind, int]:
        """Items that wait, by kind."""
        counts: dict[Kind, int] = {"embed": 0, "score": 0, "generate": 0}
        with self._changed:
            for (kind, _), queue in self._lanes.items():
                counts[kind] += queue.waiting
        return counts

    @property
    def generating(self) -> int:
        """Answers that are being written."""
        return sum(len(running.places) for running in list(self._running))

    @property
    def full(self) -> bool:
        return sum(self.waiting.values()) >= self._max_queue

    def submit(self, call: Call) -> None:
        """Queue a call. One of many items is taken whole as long as there is room for one.

        Raises Refused: 429 when the queue is full, 503 when the engine is not ready or closing.
        """
        with self._changed:
            if self._closing and self.failure is None:
                raise Refused.unavailable("the server is shutting down", "shutting_down")
            _ = self.model
            if self.full:
                raise Refused.busy("the queue is full")
            queue = self._lanes.setdefault(call.lane, _Queue())
            queue.calls.append((call, time.monotonic()))
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        """Nobody waits for this call any more: free its places, stop writing its answer."""
        call.future.cancel()
        with self._changed:
            queue = self._lanes.get(call.lane)
            if queue is not None:
                queue.calls = deque(entry for entry in queue.calls if entry[0] is not call)

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish what has been accepted, then stop. Waits for it, at most so long."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _main(self) -> None:
        try:
            self._model = self._load()
            self._work(self._model)
        except BaseException as error:  # told to everybody who waits and to `run`
            self.failure = error
        finally:
            with self._changed:
                self._closing = True
                waiting = [call for queue in self._lanes.values() for call, _ in queue.calls]
            waiting += [place.call for running in self._running for place in running.places]
            for call in waiting:
                call.fail(Refused.unavailable("the server is shutting down", "shutting_down"))

    def _work(self, model: ModelCalls) -> None:
        while True:
            batches = self._next_batches()
            if not batches and not self._running:
                return
            for kind, batch in batches:
                if kind == "generate":
                    self._running.append(_Running(model.generate([p.item for p in batch]), batch))
                else:
                    self._answer(kind, batch, model.embed if kind == "embed" else model.score)
            for running in list(self._running):
                self._step(model, running)

    def _next_batches(self) -> list[tuple[Kind, list[_Place]]]:
        """A batch of every lane that is due. Waits for one when nothing is running.

        Empty when only a generation wants its next step, or at the end.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                due = [lane for lane in self._lanes if self._due(lane) <= now]
                batches: list[tuple[Kind, list[_Place]]] = []
                for lane in due:
                    if batch := self._lanes[lane].take(self._max_batch):
                        batches.append((lane[0], batch))
                if batches or self._running:
                    return batches
                soonest = min((self._due(lane) for lane in self._lanes), default=float("inf"))
                if self._closing and soonest == float("inf"):
                    return []
                wait = None if soonest == float("inf") else max(0.0, soonest - time.monotonic())
                self._changed.wait(wait)

    def _due(self, lane: Lane) -> float:
        """When a lane's next batch should begin: at once when it is full."""
        queue = self._lanes[lane]
        running = len(self._running) if lane[0] == "generate" else 0
        if not queue.calls or running >= MAX_GENERATIONS:
            return float("inf")
        if running >= EAGER_GENERATIONS:
            return queue.since + PATIENCE_SECONDS
        if self._closing or queue.waiting >= self._max_batch:
            return 0.0
        return queue.since + self._max_wait_seconds

    # ------------------------------------------------------------------ batches

    def _answer(
        self, kind: Kind, batch: list[_Place], function: Callable[[list[Item]], list[Any]]
    ) -> None:
        """One broken item must not fail the others: then each is tried alone."""
        begin = time.monotonic()
        try:
            results = function([place.item for place in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].call.fail(error)
                return
            for place in batch:
                if not place.call.future.done():
                    self._answer(kind, [place], function)
            return
        self._on_batch(kind, len(batch), time.monotonic() - begin)
        for place, result in zip(batch, results, strict=True):
            place.call.finish(place.index, result)

    def _step(self, model: ModelCalls, running: _Running) -> None:
        """One token for a running generation."""
        for row, place in enumerate(running.places):
            if place.call.future.done():
                running.decoding.drop(row)
        try:
            events = running.decoding.step()
        except Exception as error:
            self._running.remove(running)
            if len(running.places) == 1 or running.begun:
                for place in running.places:
                    place.call.fail(error)
                return
            alone = [_Running(model.generate([place.item]), [place]) for place in running.places]
            self._running.extend(alone)
            return
        running.begun = True
        for event in events:
            running.tell(event)
        if running.decoding.finished:
            self._running.remove(running)
            self._on_batch("generate", len(running.places), running.seconds)


@dataclass(eq=False, slots=True)
class _Running:
    """A generation and whom its rows belong to. `begun`: its prompts have been read."""

    decoding: Decoding
    places: list[_Place]
    begun: bool = False
    _since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def tell(self, event: Event) -> None:
        place = self.places[event.row]
        if place.call.future.done():
            return
        if event.piece and place.call.on_piece is not None:
            try:
                place.call.on_piece(event.piece)
            except RuntimeError:  # its event loop is closed: nobody is there any more
                place.call.future.cancel()
                return
        if event.answer is not None:
            place.call.finish(place.index, event.answer)
