"""A model without weights, and the server's HTTP by hand, for the tests of serving."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image

from cafe.errors import DataError
from cafe.serving.messages import (
    Completion,
    Embedding,
    Event,
    Prompt,
    Score,
    TokenEmbeddings,
    WorkItem,
)
from cafe.serving.run import Server, ServerSettings

DIMENSION = 4


def vector(text: str) -> np.ndarray:
    """What the fake embeds a text as."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=4).digest(), np.uint8).astype(
        np.float32
    )


def text_of(item: WorkItem) -> str:
    content = item.content
    return _said(content.conversation if isinstance(content, Prompt) else content)


def _said(conversation: Any) -> str:
    return "".join(message.text for message in conversation if message.role != "tools")


class Fake:
    """Embeds by hash, answers a prompt with its own words; records what it was asked.

    open       cleared: the model computes until it is set
    stop_at    the decoding step that waits for `go_on`
    """

    dimension = DIMENSION
    max_tokens = 64
    temperature = 0.05
    thinks = False
    token_width = 3
    vocabulary = 256
    tools = "none"
    prefixes = None

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.log: list[tuple[str, list[str]]] = []
        self.steps = 0
        self.dropped: list[int] = []
        self.step_seconds = 0.0
        self.stop_at: int | None = None
        self.go_on = threading.Event()

    def _enter(self, kind: str, items: list[WorkItem]) -> list[str]:
        texts = [text_of(item) for item in items]
        self.log.append((kind, texts))
        assert self.open.wait(30)
        for item, text in zip(items, texts, strict=True):
            if text == "broken":
                raise DataError(f"input {item.number}: broken")
            if text == "bug":
                raise RuntimeError("a secret in /home/me")
        return texts

    def excess(self, text: str) -> tuple[int, int] | None:
        return None

    def text_of(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def token_text(self, token: int) -> str:
        return chr(token)

    def tokens_of(self, text: str) -> list[int]:
        return list(map(ord, text))

    def prompt_text(self, conversation: Any) -> str:
        return "".join(message.text for message in conversation)

    def json_matcher(self, schema: Any, calls: Any) -> Any:
        raise ValueError("a fake knows no schema")

    def token_vectors(self, items: list[WorkItem]) -> list[TokenEmbeddings]:
        """One for each character."""
        texts = self._enter("tokens", items)
        return [TokenEmbeddings(np.ones((len(t), 3), np.float32), len(t)) for t in texts]

    def embed(self, items: list[WorkItem]) -> list[Embedding]:
        return [Embedding(vector(text), len(text)) for text in self._enter("embed", items)]

    def score(self, items: list[WorkItem]) -> list[Score]:
        return [Score(len(text) / 1000, len(text)) for text in self._enter("score", items)]

    def decoding(self) -> FakeDecoding:
        return FakeDecoding(self)


class FakeClock:
    """A clock that stands still until a test moves it; counts how often it is read."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


class FakeDecoding:
    """Writes a prompt's words again, one with every step, as many as it may.

    The word "fails" ends its answer with an error, and "breaks" fails the step of all.
    """

    def __init__(self, model: Fake) -> None:
        self._model = model
        self._left: dict[int, tuple[Prompt, list[str]]] = {}

    def admit(self, items: Mapping[int, WorkItem]) -> list[Event]:
        texts = self._model._enter("generate", list(items.values()))
        new = {}
        for (row, item), text in zip(items.items(), texts, strict=True):
            assert isinstance(item.content, Prompt)
            new[row] = (item.content, text.split())
        self._left |= new
        return self._write(list(new))

    def step(self) -> list[Event]:
        return self._write(list(self._left)) if self._left else []

    def _write(self, rows: list[int]) -> list[Event]:
        if self._model.steps == self._model.stop_at:
            assert self._model.go_on.wait(60)
        self._model.steps += 1
        time.sleep(self._model.step_seconds)
        events = []
        for row in rows:
            prompt, words = self._left[row]
            word = words.pop(0)
            if word == "breaks":
                raise RuntimeError("out of memory")
            if word == "fails":
                events.append(Event(row, error=DataError("its matcher fails")))
                del self._left[row]
                continue
            text = _said(prompt.conversation)
            answer = None if words else Completion(text, "stop", 1, 1)
            piece = word + " " * bool(words)
            events.append(Event(row, piece if prompt.stream else "", answer))
            if not words:
                del self._left[row]
        return events

    def drop(self, row: int) -> None:
        if self._left.pop(row, None) is not None:
            self._model.dropped.append(row)


def started(model: Any, **settings: Any) -> Server:
    """A server on a free port of loopback, with its model loaded."""
    server = Server(lambda: model, ServerSettings(**{"name": "fake", "port": 0, **settings}))
    server.start()
    wait_until(lambda: server.engine.loaded)
    return server


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def request(
    server: Server | str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or text) and headers of one request. `body`: a value, or raw bytes."""
    url = urlsplit(server if isinstance(server, str) else server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(
            method or ("GET" if body is None else "POST"),
            path,
            content,
            {"Content-Type": "application/json"} | (headers or {}),
        )
        response = connection.getresponse()
        text = response.read().decode()
        kind = response.getheader("Content-Type", "")
        value = json.loads(text) if kind.startswith("application/json") else text
        return response.status, value, {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def data_uri(image: PIL.Image.Image, kind: str = "png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | fields
