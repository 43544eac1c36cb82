"""What a visitor wants -> the engine, through the same reader, limits and queue as every request.

Raises Refused, whose message may be shown.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from starlette.requests import Request

from cafe.serve.gate import CLEANUP
from cafe.serve.refusal import Refused
from cafe.serve.schema import Content
from cafe.serve.service import Service, explained
from cafe.serve.vectors import hits_of
from cafe.serve.work import Answer, Item, Prompt
from cafe.types import Hit


async def find(service: Service, text: str, picture: str | None, top: int) -> list[Hit]:
    """The `top` nearest rows to words, to a picture file, or to both."""
    if not text.strip() and picture is None:
        raise Refused.invalid("Type what you look for, or give a picture.")
    assert service.search is not None
    with _visit() as request:
        query = _content(text.strip() or None, picture)
        return await hits_of(service, service.search, request, query, top)


async def answer(service: Service, question: str, picture: str | None) -> AsyncGenerator[str]:
    """The answer about a picture file so far, longer each time. Closing it stops the writing."""
    if picture is None:
        raise Refused.invalid("Choose a picture first.")
    if not question.strip():
        raise Refused.invalid("Type a question.")
    begin = time.monotonic()
    deadline = begin + service.limits.request_seconds
    with _visit() as request:
        content = _content(question.strip(), picture)
        conversation = await service.reader(request).content(content, "question")
        limits = service.limits
        length = min(limits.default_new_tokens, limits.new_tokens)
        call, pieces = service.stream(request, Item(Prompt(conversation, length, stream=True)))
        said = ""
        while (piece := await _before(deadline, pieces)) is not None:
            if not said:
                service.meters.first_token(time.monotonic() - begin)
            said += piece
            yield said
        with explained():
            (whole,) = call.future.result()
        assert isinstance(whole, Answer)
        service.meters.tokens(whole.prompt_tokens, whole.new_tokens)
        yield whole.text


async def check(service: Service, picture: str | None) -> None:
    """Whether a picture file can be looked at, within the limits."""
    if picture is not None:
        with _visit() as request:
            await service.reader(request).content(_content(None, picture), "picture")


@contextmanager
def _visit() -> Iterator[Request]:
    """A visitor's turn in the shape of a request: what it takes is given back at its end.

    Gradio answers it after its own request is over, so that one cannot serve.
    """
    with ExitStack() as cleanup:
        yield Request({"type": "http", "headers": [], CLEANUP: cleanup})


def _content(text: str | None, picture: str | None) -> Content:
    """The reader takes a data URI and finds the format out by itself."""
    if picture is None:
        return Content(text=text)
    try:
        encoded = base64.b64encode(Path(picture).read_bytes()).decode("ascii")
    except OSError:  # the oldest uploads make room for new ones
        raise Refused.invalid("The picture is not here any more; give it again.") from None
    return Content(text=text, image=f"data:image/any;base64,{encoded}")


async def _before(deadline: float, pieces: asyncio.Queue[str | None]) -> str | None:
    try:
        return await asyncio.wait_for(pieces.get(), deadline - time.monotonic())
    except TimeoutError:
        raise Refused(504, "no whole answer in the time allowed", code="timeout") from None
