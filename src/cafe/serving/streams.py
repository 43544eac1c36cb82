"""Answers that are streamed: the pieces of all answers to one request, as they are decoded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from starlette.responses import StreamingResponse

from cafe.errors import DataError
from cafe.serving.engine import Call
from cafe.serving.errors import ApiError
from cafe.serving.messages import Completion, WorkItem

T = TypeVar("T")


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Turn errors that the request caused into an ApiError (400)."""
    try:
        yield
    except DataError as error:
        raise ApiError.invalid(str(error)) from error
    except TemplateError as error:
        raise ApiError.invalid(f"the model's chat template rejects this: {error}") from error


class AnswerStream:
    """The answers of several calls, each of one prompt, piece by piece in the order they come."""

    def __init__(self, deadline: float) -> None:
        """`deadline` is by the event loop's clock."""
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        self._calls: list[Call] = []
        self._first: tuple[int, str | Completion] | None = None

    def call(self, number: int, item: WorkItem) -> Call:
        """A call for the engine, whose answer has this number in the stream."""

        def post(piece: str | None) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, piece))

        call = Call("generate", [item], on_piece=post)
        call.future.add_done_callback(lambda _: post(None))
        self._calls.append(call)
        return call

    async def begin(self) -> None:
        """Wait for the first piece: a failure before it can be an ordinary error response.

        Raises:
            ApiError: A prompt cannot be answered.
        """
        self._first = await self._next()

    async def _next(self) -> tuple[int, str | Completion]:
        number, piece = await next_event(self._deadline, self._events)
        if piece is not None:
            return number, piece
        with as_api_errors():
            (answer,) = self._calls[number].future.result()
        return number, answer

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | Completion]]:
        """Numbers of answers with pieces of them; each answer is followed by itself as a whole.

        Raises:
            ApiError: The deadline has passed, or the engine cannot go on.
        """
        left = len(self._calls)
        while left:
            number, event = self._first or await self._next()
            self._first = None
            left -= isinstance(event, Completion)
            yield number, event


async def next_event(deadline: float, events: asyncio.Queue[T]) -> T:
    """The next event. Raises ApiError (504) at the deadline, by the event loop's clock."""
    try:
        # Not wait_for: in Python 3.11 it loses a cancellation that arrives together with an event,
        # and the answer that the client has stopped is generated to its end.
        async with asyncio.timeout_at(deadline):
            return await events.get()
    except TimeoutError:
        raise ApiError(
            504, "the answer was not finished within the time limit", code="timeout"
        ) from None


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events. An error becomes an event of its own, the last one."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except ApiError as error:
            yield data_event(error.body)
        except Exception:
            yield data_event(ApiError(500, "internal error").body)
            raise

    return StreamingResponse(
        guarded(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


def data_event(value: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event, with its name if it has one."""
    return f"event: {name}\n" * (name is not None) + f"data: {json.dumps(value)}\n\n"
