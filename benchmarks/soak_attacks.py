"""Hostile and demanding clients of the soak test (`soak.py`), one kind for each known attack.

Each is a function that makes one request and returns the problem with the response, or None. What
they send is what once ended a server's process, or made it deaf to everybody else for minutes.
"""

from __future__ import annotations

import functools
import json
import random
import socket
import struct
import time
from typing import Any

from soak_clients import KEY, LATER, SECONDS, ask, chat, image, refused, uri

BODY_BYTES = 20 * 2**20
SCANS = 5000
SIDE = 5656
KEYS = 1_000_000
BIG_CALL = 2048
TEXT = 190_000


def conditions(host: str, chance: random.Random) -> str | None:
    """Conditions of a search that overflow a stack, take all memory, or name inner columns."""
    where = chance.choice(
        [
            "width=" + "+".join(["1"] * 900),
            "array_length(array_repeat(id,200000000))>1",
            "(" * 900 + "width=1" + ")" * 900,
            "NOT " * 400 + "width=1",
            "_rowaddr>0",
            "id LIKE '" + "%a" * 900 + "'",
            "width IN (" + ",".join(["1"] * 1500) + ")",
        ]
    )
    status, reply, _ = ask(host, "/search", {"query": "a", "where": where})
    return None if status in {200, 400, *LATER} else f"{where[:40]}: {status} {str(reply)[:200]}"


def progressive(host: str, chance: random.Random) -> str | None:
    """A JPEG of 300 kB whose thousands of scans take minutes to decode."""
    return refused(host, "/v1/embeddings", {"messages": chat(uri(many_scans()))["messages"]}, 400)


def many_keys(host: str, chance: random.Random) -> str | None:
    """An object of a million unknown fields."""
    return refused(host, "/v1/embeddings", keys(), 400)


def no_key(host: str, chance: random.Random) -> str | None:
    """Bodies of those who have no key: refused when they are complete, or held open for a while."""
    name, _, port = host.rpartition(":")
    path = chance.choice(["/health", "/v1/embeddings", "/nowhere"])
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
    whole = chance.random() < 0.5
    with socket.create_connection((name, int(port)), timeout=SECONDS) as connection:
        try:
            connection.sendall(head.encode() + b"x" * (BODY_BYTES - (not whole)))
            if not whole:
                time.sleep(3 * chance.random())
                return None
            answer = connection.recv(100)
        except ConnectionError:
            return None
    first = answer.split(b"\r\n")[0].decode()
    return None if not first or " 4" in first or " 503" in first else f"{path}: {first}"


def long_texts(host: str, chance: random.Random) -> str | None:
    """Twenty texts that are far too long, of a kind that tokenizers are slow with."""
    letters = chance.choice(["a", "<|im_end|>", "aZ9 <|>\n\t.,", "a\u200d\u0301", "<image>", " "])
    text = (letters * TEXT)[:TEXT]
    return refused(host, "/v1/embeddings", {"input": [f"{text}{i}" for i in range(20)]}, 400)


def big_call(host: str, chance: random.Random) -> str | None:
    """A call as large as one may be. Others are served meanwhile (`good` says if not)."""
    texts = [f"{chance.random()} cats {i}" for i in range(BIG_CALL)]
    status, reply, _ = ask(host, "/v1/embeddings", {"input": texts})
    if status in LATER:
        return None
    if status != 200 or len(reply["data"]) != BIG_CALL:
        return f"{status} {str(reply)[:200]}"
    return None


def captions(host: str, chance: random.Random) -> str | None:
    """An image embedded with what the model says of it; `think` is no field of a request."""
    body = {"messages": chat(uri(image(chance.randrange(10**6))))["messages"], "caption": True}
    body["messages"][0]["content"] = body["messages"][0]["content"][:1]  # the image alone
    if chance.random() < 0.3:
        return refused(host, "/v1/embeddings", body | {"think": True}, 400)
    status, reply, _ = ask(host, "/v1/embeddings", body)
    return None if status in {200, *LATER} else f"{status} {str(reply)[:200]}"


def no_unicode(host: str, chance: random.Random) -> str | None:
    """Bytes that are no UTF-8, and halves of surrogate pairs."""
    body = chance.choice(
        [
            b'{"input": "\xff\xfe"}',
            b'{"input": "\xc0\xaf"}',
            b'{"input": "\\ud800"}',
            b'{"in\xe9put": "a"}',
        ]
    )
    return refused(host, "/v1/embeddings", body, 400)


def slow(host: str, chance: random.Random) -> str | None:
    """Sends its request piece by piece, and reads the stream slowly; it is answered whole."""
    body = json.dumps(chat(uri(image(2)), stream=True, max_tokens=8)).encode()
    name, _, port = host.rpartition(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((name, int(port)), timeout=SECONDS) as connection:
        for begin in range(0, len(sent), len(sent) // 8):
            connection.sendall(sent[begin : begin + len(sent) // 8])
            time.sleep(0.3)
        answer = b""
        while piece := connection.recv(64):
            answer += piece
            time.sleep(0.01)
    if answer.split(b" ", 2)[1] in {str(status).encode() for status in LATER}:
        return None
    return None if b"data: [DONE]" in answer else f"the answer is {answer[-200:]!r}"


@functools.cache
def many_scans() -> bytes:
    """A grey progressive JPEG with thousands of empty AC scans (runs of end-of-block)."""
    blocks = ((SIDE + 7) // 8) ** 2

    def segment(marker: int, content: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    def table(kind: int, value: int) -> bytes:
        return segment(0xC4, bytes([kind, 1, *[0] * 15, value]))

    bits, left = "", blocks
    while left > 0:
        run = max(min(left, 32_767), 16_384)
        bits, left = bits + "0" + format(run - 16_384, "014b"), left - run
    bits += "1" * (-len(bits) % 8)
    empty = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    size = struct.pack(">BHHB", 8, SIDE, SIDE, 1) + b"\x01\x11\x00"
    start = b"\xff\xd8" + segment(0xDB, b"\x00" + b"\x01" * 64) + segment(0xC2, size)
    first = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes((blocks + 7) // 8)
    scan = segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + empty.replace(b"\xff", b"\xff\x00")
    return start + table(0, 0) + table(0x10, 0xE0) + first + scan * SCANS + b"\xff\xd9"


@functools.cache
def keys() -> bytes:
    return b"{" + b",".join(b'"k%d":1' % i for i in range(KEYS)) + b"}"


ATTACKS: list[tuple[Any, int, float]] = [
    (conditions, 1, 0.5),
    (progressive, 1, 3.0),
    (many_keys, 1, 5.0),
    (no_key, 2, 1.0),
    (long_texts, 1, 5.0),
    (big_call, 1, 60.0),
    (captions, 1, 2.0),
    (no_unicode, 1, 0.5),
    (slow, 1, 1.0),
]
"""Function, number of clients, and seconds between two requests of one client."""
