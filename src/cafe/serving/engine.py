"""The queue, its batches, and the one thread that owns the model.

Calls (one per HTTP request) wait in lanes; a lane holds one kind of work, with or without images,
so that a short text is not padded to an image's length. A batch takes items from the waiting calls
in turn, so a call of two thousand texts does not delay a call of one. Between any two batches every
running generation decodes one token: neither side can starve the other.
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

from cafe.serving.errors import ApiError
from cafe.serving.messages import Decoding, EngineModel, Event, RequestKind, WorkItem

Lane = tuple[RequestKind, bool]
OnBatch = Callable[[RequestKind, int, float], None]

MAX_GENERATIONS = 4
"""Maximum number of batches of prompts generated concurrently; later prompts stay in the queue."""

EAGER_GENERATIONS = 2
PATIENCE_SECONDS = 1.0
"""A step costs nearly the same for one prompt as for ten. So while `EAGER_GENERATIONS` run, new
prompts gather until one of these ends; after this time they start as another generation."""


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
        self._running: list[_RunningGeneration] = []
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._model: EngineModel | None = None
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------ for requests

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
        return sum(len(running.items) for running in list(self._running))

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
            waiting += [entry.call for running in self._running for entry in running.items]
            for call in waiting:
                call.fail(ApiError.unavailable("the server is shutting down", "shutting_down"))

    def _loop(self, model: EngineModel) -> None:
        functions: dict[RequestKind, Callable[[list[WorkItem]], list[Any]]] = {
            "embed": model.embed,
            "tokens": model.token_vectors,
            "score": model.score,
        }
        while True:
            batches = self._next_batches()
            if not batches and not self._running:
                return
            for kind, batch in batches:
                if kind == "generate":
                    self._running.append(self._start_generation(model, batch))
                else:
                    self._run_batch(kind, batch, functions[kind])
            for running in list(self._running):
                self._step(model, running)

    def _next_batches(self) -> list[tuple[RequestKind, list[_QueuedItem]]]:
        """A batch of every lane that is due. Waits for one when no generation is running.

        Empty when only running generations need their next step, or at the end.
        """
        with self._changed:
            while True:
                now = self._clock()
                due = [lane for lane in self._lanes if self._due(lane) <= now]
                batches: list[tuple[RequestKind, list[_QueuedItem]]] = []
                for lane in due:
                    if batch := self._lanes[lane].take(self._max_batch):
                        batches.append((lane[0], batch))
                if batches or self._running:
                    return batches
                soonest = min((self._due(lane) for lane in self._lanes), default=float("inf"))
                if self._closing and soonest == float("inf"):
                    return []
                wait = None if soonest == float("inf") else max(0.0, soonest - self._clock())
                self._changed.wait(wait)

    def _due(self, lane: Lane) -> float:
        """When a lane's next batch should start: immediately when it is full."""
        queue = self._lanes[lane]
        running = len(self._running) if lane[0] == "generate" else 0
        if not queue.calls or running >= MAX_GENERATIONS:
            return float("inf")
        if running >= EAGER_GENERATIONS:
            return queue.oldest + PATIENCE_SECONDS
        if self._closing or queue.waiting >= self._max_batch:
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

    def _start_generation(self, model: EngineModel, batch: list[_QueuedItem]) -> _RunningGeneration:
        """Start a generation for these prompts."""
        started_at = self._clock()
        decoding = model.generate([entry.item for entry in batch])
        return _RunningGeneration(decoding, batch, started_at)

    def _step(self, model: EngineModel, running: _RunningGeneration) -> None:
        """Decode one token of each row of a running generation."""
        for row, entry in enumerate(running.items):
            if entry.call.future.done():
                running.decoding.drop(row)
        try:
            events = running.decoding.step()
        except Exception as error:
            self._running.remove(running)
            if len(running.items) == 1 or running.prefilled:
                for entry in running.items:
                    entry.call.fail(error)
                return
            self._running.extend(self._start_generation(model, [entry]) for entry in running.items)
            return
        running.prefilled = True
        for event in events:
            running.deliver(event)
        if running.decoding.finished:
            self._running.remove(running)
            self._on_batch("generate", len(running.items), self._clock() - running.started_at)


@dataclass(eq=False, slots=True)
class _RunningGeneration:
    """A generation, and the items that its rows answer.

    started_at   by the engine's clock
    prefilled    the prompts have been read
    """

    decoding: Decoding
    items: list[_QueuedItem]
    started_at: float
    prefilled: bool = False

    def deliver(self, event: Event) -> None:
        """Pass an event on to the call of its row."""
        entry = self.items[event.row]
        if entry.call.future.done():
            return
        if event.piece and entry.call.on_piece is not None:
            try:
                entry.call.on_piece(event.piece)
            except RuntimeError:  # its event loop is closed: the request is gone
                entry.call.future.cancel()
                return
        if event.answer is not None:
            entry.call.finish(entry.index, event.answer)
