"""Clients of the soak test (`soak.py`), over loopback: well-behaved ones and four faulty kinds. The
attacks are in `soak_attacks.py`.

Each is a function that makes one request and returns the problem with the response, or None.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

Client = Callable[[str, random.Random], str | None]

SECONDS = 120
KEY = "of the soak"
LARGE_BYTES = 50_000_000
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
PATHS = ("/v1/embeddings", "/v1/chat/completions", "/v1/rerank", "/search")
LATER = {429, 503}
"""Statuses of a full queue; both come with Retry-After."""


def ask(host: str, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
    """Status, body (JSON or text) and headers. `body`: a value, raw bytes, or None for GET."""
    connection = http.client.HTTPConnection(host, timeout=SECONDS)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, content, HEADERS)
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, json.loads(text) if is_json else text, headers
    finally:
        connection.close()


def image(seed: int) -> bytes:
    """A PNG of 96 x 96, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize((96, 96)).save(buffer, "png")
    return buffer.getvalue()


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def chat(url: str | None, **fields: Any) -> dict[str, Any]:
    image_parts = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    parts = [*image_parts, {"type": "text", "text": "Describe this image."}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 12} | fields


# ---------------------------------------------------------------------- good


def good(host: str, chance: random.Random) -> str | None:
    """A valid request of a random kind: it must be answered, or deferred with Retry-After."""
    url = uri(image(chance.randrange(10**6)))
    path, body = chance.choice(
        [
            ("/v1/embeddings", {"input": [f"{chance.random()} red cats", "a dog"]}),
            ("/v1/embeddings", {"messages": chat(url)["messages"], "encoding_format": "base64"}),
            ("/v1/chat/completions", chat(url)),
            ("/v1/chat/completions", chat(url, stream=True)),
            ("/v1/rerank", {"query": "a red cat", "documents": [{"image": url}] * 2}),
            ("/search", {"query": "a red cat", "top": 5}),
            ("/search", {"image": url, "top": 5, "where": "width > 10"}),
        ]
    )
    status, reply, headers = ask(host, path, body)
    if status in LATER:
        return None if "retry-after" in headers else f"{path}: {status} without Retry-After"
    if status != 200:
        return f"{path}: {status} {reply}"
    if isinstance(reply, str) and not reply.endswith("data: [DONE]\n\n"):
        return f"{path}: the stream ends with {reply[-80:]!r}"
    return None


# ---------------------------------------------------------------------- bad


def vanishes(host: str, chance: random.Random) -> str | None:
    """Disconnects while sending, while waiting, or in the middle of a stream."""
    stream = chance.random() < 0.5
    body = json.dumps(chat(uri(image(1)), stream=stream, max_tokens=200)).encode()
    name, _, port = host.rpartition(":")
    with socket.create_connection((name, int(port)), timeout=SECONDS) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        if chance.random() < 0.3:
            connection.sendall(body[: chance.randrange(len(body))])
            return None
        connection.sendall(body)
        if stream and chance.random() < 0.7:
            connection.recv(100)
    return None


def malformed(host: str, chance: random.Random) -> str | None:
    junk = [b"{", b"", b"\xff\xfe", b"[" * 50_000, b'{"input": NaN}', b'{"input": 3}', b"null"]
    junk += [chance.randbytes(200), b'{"messages": [{"role": "cat"}]}', b'{"nothing": 1}']
    return refused(host, chance.choice(PATHS), chance.choice(junk), 400)


def large(host: str, chance: random.Random) -> str | None:
    """A body of 50 MB: refused, or the server closes the connection while receiving it."""
    try:
        return refused(host, "/v1/embeddings", b'{"input": "' + b"a" * LARGE_BYTES, 413)
    except ConnectionError:
        return None


def broken_image(host: str, chance: random.Random) -> str | None:
    whole = image(chance.randrange(10**6))
    content = chance.choice(
        [whole[: chance.randrange(8, 60)], chance.randbytes(300), b"", bomb(60_000), bomb(9_000)]
    )
    return refused(host, "/v1/embeddings", {"messages": chat(uri(content))["messages"]}, 400)


def refused(host: str, path: str, body: Any, wanted: int) -> str | None:
    status, reply, _ = ask(host, path, body)
    if status not in {wanted, *LATER}:
        return f"{path}: {status} instead of {wanted}: {str(reply)[:200]}"
    return None if set(reply) == {"error"} else f"{path}: an error of another format: {reply}"


def bomb(pixels: int) -> bytes:
    """A PNG of a few bytes whose header claims `pixels` in width and height."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", pixels, pixels, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
