"""Runs a visitor's search or question on the engine.

It goes through the same reader, limits and queue as every request. All functions raise ApiError,
whose message may be shown.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from starlette.requests import Request

from cafe.serving.errors import ApiError
from cafe.serving.messages import Completion, Prompt, WorkItem
from cafe.serving.middleware import CLEANUP, DEADLINE
from cafe.serving.routes.search import hits_of
from cafe.serving.schema import Content
from cafe.serving.service import Service
from cafe.types import Hit


async def find_hits(
    service: Service, text: str, image: str | None, top: int, hybrid: bool = False
) -> list[Hit]:
    """The `top` rows nearest to a text, an image file, or both; `hybrid`: by the words as well."""
    if not text.strip() and image is None:
        raise ApiError.invalid("Type what to search for, or add an image.")
    assert service.search is not None
    with _turn() as request:
        query = _content(text.strip() or None, image)
        hybrid = hybrid and bool(text.strip())
        return await hits_of(service, service.search, request, query, top, hybrid=hybrid)


async def stream_answer(service: Service, question: str, image: str | None) -> AsyncGenerator[str]:
    """The answer about an image file so far, longer each time. Closing it stops the generation."""
    if image is None:
        raise ApiError.invalid("Choose an image first.")
    if not question.strip():
        raise ApiError.invalid("Type a question.")
    begin = time.monotonic()
    with _turn(begin + service.limits.request_seconds) as request:
        content = _content(question.strip(), image)
        conversation = await service.reader(request).content(content, "question")
        limits = service.limits
        length = min(limits.default_new_tokens, limits.new_tokens)
        prompt = Prompt(conversation, length, stream=True)
        text = ""
        async for _, piece in await service.stream(request, [WorkItem(prompt)]):
            if not text:
                service.metrics.first_token(time.monotonic() - begin)
            if isinstance(piece, Completion):
                service.metrics.tokens(piece.prompt_tokens, piece.new_tokens)
                yield piece.text
            else:
                text += piece
                yield text


async def check_image(service: Service, image: str | None) -> None:
    """Raises ApiError for an image file that cannot be read within the limits."""
    if image is not None:
        with _turn() as request:
            await service.reader(request).content(_content(None, image), "image")


@contextmanager
def _turn(deadline: float | None = None) -> Iterator[Request]:
    """A request for one turn of a visitor; what it reserves is released at its end.

    `deadline` is by the monotonic clock, which is the event loop's.

    Gradio handles an event after the HTTP request that sent it has ended, so that request cannot
    be used.
    """
    with ExitStack() as cleanup:
        yield Request({"type": "http", "headers": [], CLEANUP: cleanup, DEADLINE: deadline})


def _content(text: str | None, image: str | None) -> Content:
    """The reader accepts a data URI and detects the image's format itself."""
    if image is None:
        return Content(text=text)
    try:
        encoded = base64.b64encode(Path(image).read_bytes()).decode("ascii")
    except OSError:  # the oldest uploads are deleted to make room for new ones
        raise ApiError.invalid("The image is no longer available. Please add it again.") from None
    return Content(text=text, image=f"data:image/any;base64,{encoded}")
