"""The queue, its batches, and the one thread that owns the model.

Calls (one per HTTP request) wait in lanes; a lane holds one kind of work, with or without images,
so that a short text is not padded to an image's length. A batch takes items from the waiting calls
in turn, so a call of two thousand texts does not delay a call of one. Answers are written together,
one token of each at a time: prompts join them and leave them between two tokens, and so do batches
of other work, so that neither side can starve the other.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from cafe.serving.errors import ApiError
from cafe.serving.messages import (
    Decoding,
    EngineModel,
    Event,
    PrefixUse,
    RequestKind,
    WorkItem,
)

Lane = tuple[RequestKind, bool]
OnBatch = Callable[[RequestKind, int, float], None]

ROWS_PER_BATCH = 4
"""About as many largest batches of prompts are answered at a time; later ones wait. A token of all
costs little more than one of a single answer, but each takes memory."""

PROMPTS_PER_STEP = 4
"""A batch of prompts is the largest batch divided by this: others wait while it is read."""

SHARES = 8
"""No call counts for more than this part of the queue, however many of its items wait: batches take
items from all calls in turn, so one large call delays the others by little, and must not have them
refused."""


@dataclass(eq=False, slots=True)
class Call:
    """The work of one request.

    kind       of all its items
    items      to be computed, in any batches
    on_piece   called on the engine's thread with every piece of a streamed answer
    future     receives the results, in the order of the items
    """

    kind: RequestKind
    items: Sequence[WorkItem]
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
        """The lane that the call waits in."""
        return self.kind, any(item.has_image for item in self.items)

    def take(self) -> int:
        """Mark the next item as taken; returns its index."""
        self._next += 1
        return self._next - 1

    def finish(self, index: int, result: Any) -> None:
        """Store an item's result; the last one completes the future."""
        self._results[index] = result
        if len(self._results) == len(self.items):
            with contextlib.suppress(InvalidStateError):  # it has just been cancelled
                self.future.set_result([self._results[i] for i in range(len(self.items))])

    def fail(self, error: BaseException) -> None:
        """Fail the whole call."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _QueuedItem:
    """An item of a call, by its index."""

    call: Call
    index: int

    @property
    def item(self) -> WorkItem:
        return self.call.items[self.index]


@dataclass(eq=False, slots=True)
class _Queue:
    """Calls of one lane, with their time of arrival; they are served in turn."""

    calls: deque[tuple[Call, float]] = field(default_factory=deque)

    @property
    def waiting(self) -> int:
        return sum(call.waiting for call, _ in self.calls)

    @property
    def oldest(self) -> float:
        """When the call that has waited longest arrived."""
        return min((when for _, when in self.calls), default=float("inf"))

    def take(self, count: int) -> list[_QueuedItem]:
        """Up to `count` items, one from each call in turn."""
        batch: list[_QueuedItem] = []
        while self.calls and len(batch) < count:
            call, when = self.calls.popleft()
            if call.future.done():
                continue
            batch.append(_QueuedItem(call, call.take()))
            if call.waiting:
                self.calls.append((call, when))
        return batch


class Engine:
    """Batches the calls of all requests for one model."""

    def __init__(
        self,
        load: Callable[[], EngineModel],
        *,
        max_batch: int = 32,
        max_wait_seconds: float = 0.005,
        max_queue: int = 256,
        on_batch: OnBatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an engine; `start` starts its thread.

        Args:
            load: Loads the model, on the engine's thread.
            max_batch: Largest number of items in a batch.
            max_wait_seconds: How long an item waits for others to share its batch while the model
                is idle.
            max_queue: Calls are refused while at least this number of items is waiting; of one
                call at most an eighth of it counts.
            on_batch: Called after every batch with its kind, number of items and duration.
            clock: Seconds since an arbitrary moment; measures waiting times and batches.
        """
        self._load = load
        self._max_batch, self._max_queue = max_batch, max_queue
        self._max_wait_seconds = max_wait_seconds
        self._on_batch = on_batch or (lambda kind, count, seconds: None)
        self._clock = clock
        self._changed = threading.Condition()
        self._lanes: dict[Lane, _Queue] = {}
        self._answering: dict[int, _QueuedItem] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._model: EngineModel | None = None
        self.failure: BaseException | None = None

    @property
    def model(self) -> EngineModel:
        """The loaded model. Raises ApiError (503) while it is loading or after it failed."""
        if self.failure is not None:
            raise ApiError.unavailable("the model has failed", "model_failed")
        if self._model is None:
            raise ApiError.unavailable("the model is still loading", "model_loading")
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the model is loaded and has not failed."""
        return self._model is not None and self.failure is None

    @property
    def prefixes(self) -> PrefixUse | None:
        """How the model's prefix cache is used; None: it has none, or is not loaded."""
        return None if self._model is None else self._model.prefixes

    @property
    def waiting(self) -> dict[RequestKind, int]:
        """Number of waiting items, by kind."""
        counts: dict[RequestKind, int] = {"embed": 0, "tokens": 0, "score": 0, "generate": 0}
        with self._changed:
            for (kind, _), queue in self._lanes.items():
                counts[kind] += queue.waiting
        return counts

    @property
    def generating(self) -> int:
        """Number of answers being generated."""
        return len(self._answering)

    @property
    def full(self) -> bool:
        """Whether new calls are refused."""
        share = max(1, self._max_queue // SHARES)
        with self._changed:
            calls = [call for queue in self._lanes.values() for call, _ in queue.calls]
            return sum(min(call.waiting, share) for call in calls) >= self._max_queue

    def submit(self, call: Call) -> None:
        """Queue a call. A call of many items is accepted as long as there is room for one item.

        Raises:
            ApiError: 429 when the queue is full, 503 when the engine is not ready or closing.
        """
        with self._changed:
            if self._closing and self.failure is None:
                raise ApiError.unavailable("the server is shutting down", "shutting_down")
            _ = self.model
            if self.full:
                raise ApiError.busy("the queue is full")
            queue = self._lanes.setdefault(call.lane, _Queue())
            queue.calls.append((call, self._clock()))
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        """Remove a call from the queue, or stop generating its answer."""
        call.future.cancel()
        with self._changed:
            queue = self._lanes.get(call.lane)
            if queue is not None:
                queue.calls = deque(entry for entry in queue.calls if entry[0] is not call)

    # ------------------------------------------------------------------ life cycle

    def start(self) -> None:
        """Start the engine's thread, which loads the model first."""
        self._thread.start()

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish the accepted calls, then stop; waits for that at most `timeout_seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _main(self) -> None:
        try:
            self._model = self._load()
            self._loop(self._model)
        except BaseException as error:  # reported to all waiting calls and by `Server.run`
            self.failure = error
        finally:
            with self._changed:
                self._closing = True
                waiting = [call for queue in self._lanes.values() for call, _ in queue.calls]
            waiting += [entry.call for entry in self._answering.values()]
            for call in waiting:
                call.fail(ApiError.unavailable("the server is shutting down", "shutting_down"))

    def _loop(self, model: EngineModel) -> None:
        functions: dict[RequestKind, Callable[[list[WorkItem]], list[Any]]] = {
            "embed": model.embed,
            "tokens": model.token_vectors,
            "score": model.score,
        }
        decoding = model.decoding()
        while True:
            batches = self._next_batches()
            if not batches and not self._answering:
                return
            if self._answering:
                self._step(decoding)
            for kind, batch in batches:
                if kind == "generate":
                    self._admit(decoding, batch)
                else:
                    self._run_batch(kind, batch, functions[kind])

    def _next_batches(self) -> list[tuple[RequestKind, list[_QueuedItem]]]:
        """A batch of every lane that is due. Waits for one when no answer is being written.

        Empty when only answers need their next token, or at the end.
        """
        with self._changed:
            while True:
                now = self._clock()
                due = [lane for lane in self._lanes if self._due(lane) <= now]
                batches: list[tuple[RequestKind, list[_QueuedItem]]] = []
                for lane in due:
                    if batch := self._lanes[lane].take(self._batch_size(lane)):
                        batches.append((lane[0], batch))
                if batches or self._answering:
                    return batches
                soonest = min((self._due(lane) for lane in self._lanes), default=float("inf"))
                if self._closing and soonest == float("inf"):
                    return []
                wait = None if soonest == float("inf") else max(0.0, soonest - self._clock())
                self._changed.wait(wait)

    @property
    def _room(self) -> int:
        return ROWS_PER_BATCH * self._max_batch - len(self._answering)

    def _batch_size(self, lane: Lane) -> int:
        if lane[0] != "generate":
            return self._max_batch
        return min(self._room, max(1, self._max_batch // PROMPTS_PER_STEP))

    def _due(self, lane: Lane) -> float:
        """When a lane's next batch starts: at once when it is full, or joins other answers."""
        queue = self._lanes[lane]
        if not queue.calls or (lane[0] == "generate" and self._room <= 0):
            return float("inf")
        joins = lane[0] == "generate" and self._answering
        if self._closing or joins or queue.waiting >= self._max_batch:
            return 0.0
        return queue.oldest + self._max_wait_seconds

    # ------------------------------------------------------------------ batches

    def _run_batch(
        self,
        kind: RequestKind,
        batch: list[_QueuedItem],
        function: Callable[[list[WorkItem]], list[Any]],
    ) -> None:
        """Run a batch; if it fails, run each item alone, so that a bad item fails only its call."""
        begin = self._clock()
        try:
            results = function([entry.item for entry in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].call.fail(error)
                return
            for entry in batch:
                if not entry.call.future.done():
                    self._run_batch(kind, [entry], function)
            return
        self._on_batch(kind, len(batch), self._clock() - begin)
        for entry, result in zip(batch, results, strict=True):
            entry.call.finish(entry.index, result)

    def _admit(self, decoding: Decoding, batch: list[_QueuedItem]) -> None:
        """Read prompts; if that fails, read each alone, so that a bad one fails only its call."""
        begin = self._clock()
        entries = {next(self._numbers): entry for entry in batch}
        try:
            events = decoding.admit({row: entry.item for row, entry in entries.items()})
        except Exception as error:
            if len(batch) == 1:
                batch[0].call.fail(error)
                return
            for entry in batch:
                if not entry.call.future.done():
                    self._admit(decoding, [entry])
            return
        self._answering |= entries
        self._deliver(events)
        self._on_batch("generate", len(batch), self._clock() - begin)

    def _step(self, decoding: Decoding) -> None:
        """Write one token of every answer."""
        self._drop(decoding, [r for r, e in self._answering.items() if e.call.future.done()])
        begin, count = self._clock(), len(self._answering)
        try:
            events = decoding.step()
        except Exception as error:  # of all rows together: none of them can go on
            for entry in self._answering.values():
                entry.call.fail(error)
            self._drop(decoding, list(self._answering))
            return
        self._deliver(events)
        if count:
            self._on_batch("generate", count, self._clock() - begin)

    def _drop(self, decoding: Decoding, rows: list[int]) -> None:
        for row in rows:
            decoding.drop(row)
            del self._answering[row]

    def _deliver(self, events: list[Event]) -> None:
        """Pass events on to the calls of their rows."""
        for event in events:
            entry = self._answering[event.row]
            call = entry.call
            if event.piece and call.on_piece is not None and not call.future.done():
                try:
                    call.on_piece(event.piece)
                except RuntimeError:  # its event loop is closed: the request is gone
                    call.future.cancel()
            if event.error is not None:
                call.fail(event.error)
            elif event.answer is not None and not call.future.done():
                call.finish(entry.index, event.answer)
            if event.error is not None or event.answer is not None:
                del self._answering[event.row]
