"""Limits, servers and queues that the tests of the server's defences share."""

from __future__ import annotations

import base64
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cafe.serving.limits import Limits
from cafe.serving.run import Server
from helpers.fakes import Fake, request, started, wait_until

LIMITS = Limits(
    body_bytes=2_000_000,
    inputs=5,
    images=2,
    image_pixels=10_000,
    request_pixels=15_000,
    held_pixels=20_000,
    text_characters=1000,
    request_characters=1500,
    new_tokens=500,
)


@contextmanager
def serving(model: Fake, **settings: Any) -> Iterator[Server]:
    server = started(model, **settings)
    yield server
    model.open.set()
    server.stop()


def message(reply: Any) -> str:
    """The message of an error in OpenAI's shape."""
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    return reply["error"]["message"]


def bomb(width: int, height: int) -> str:
    """A PNG of a few hundred bytes that says it is large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(content).decode()


@contextmanager
def waiting(server: Server, model: Fake, *bodies: Any) -> Iterator[Callable[[], list[int]]]:
    """Requests that are in the queue, behind a model that computes one for as long as this lasts.

    Gives a function for their statuses; they are known afterwards.
    """
    model.log.clear()
    model.open.clear()
    statuses: list[int] = []
    threads = []

    def ask(body: Any) -> None:
        statuses.append(request(server, "/v1/embeddings", body)[0])

    try:
        for body in ({"input": "first"}, *bodies):
            threads.append(threading.Thread(target=ask, args=(body,)))
            threads[-1].start()
            if len(threads) == 1:
                wait_until(lambda: model.log)
        wait_until(lambda: server.engine.waiting["embed"] >= len(bodies))
        yield lambda: statuses
    finally:
        model.open.set()
        for thread in threads:
            thread.join(20)
