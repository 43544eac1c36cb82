"""Limits of one request, and budgets that all requests share."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import dataclass

from cafe.serving.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one request; `held_…` are limits of all requests together.

    request_seconds      from the complete body to the complete answer
    send_seconds         how long a client may leave one piece of an answer unread
    token_vector_characters  of the texts for whose tokens a request wants vectors: each is hundreds
                         of numbers
    text_characters      of one text: far above any context length, low enough to tokenise quickly
    new_tokens           the largest `max_tokens`
    default_new_tokens   used when a request has no `max_tokens`
    """

    body_bytes: int = 20 * 2**20
    held_body_bytes: int = 512 * 2**20
    read_seconds: float = 30.0
    send_seconds: float = 30.0
    request_seconds: float = 300.0
    inputs: int = 2048
    text_characters: int = 200_000
    token_vector_characters: int = 100_000
    request_characters: int = 4_000_000
    images: int = 64
    image_pixels: int = 32_000_000
    request_pixels: int = 128_000_000
    held_pixels: int = 512_000_000
    image_fetch_bytes: int = 10 * 2**20
    fetch_seconds: float = 10.0
    new_tokens: int = 4096
    default_new_tokens: int = 512


class Budget:
    """A number of bytes or pixels that all requests share. Thread-safe."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How much is in use."""
        return self._taken

    def take(self, amount: int) -> None:
        """Take `amount`. Raises ApiError (429) when it is not available at the moment."""
        with self._lock:
            if self._taken + amount > self._total:
                raise ApiError.busy(f"the requests in progress hold too many {self._what}")
            self._taken += amount

    def give_back(self, amount: int) -> None:
        """Return `amount`."""
        with self._lock:
            self._taken -= amount


class Reservation:
    """What one request has taken from a `Budget`. Thread-safe."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._released = False
        self.taken = 0

    def take(self, amount: int) -> None:
        """Take `amount`.

        Raises:
            ApiError: 429 when the budget has too little left, 503 after `release`.
        """
        with self._lock:
            if self._released:
                raise ApiError.unavailable("the request has ended", "ended")
            self._budget.take(amount)
            self.taken += amount

    def release(self) -> None:
        """Give everything back, for good. Idempotent."""
        with self._lock:
            self._released = True
            amount, self.taken = self.taken, 0
        self._budget.give_back(amount)


# ---------------------------------------------------------------------- before parsing

MAX_FIELDS = 50_000
MAX_VALUES = 1_000_000

_STRING_OR_SIGN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[:,]', re.DOTALL)
"""A string that does not end goes on to the end of the body; looking for its end again from each of
its quotation marks would take time quadratic in its length."""


def too_many(body: bytes) -> str | None:
    """What a JSON body has too many of: "fields" or "values"; None when it may be parsed.

    A body of 14 MB can hold a million fields, and each unknown one becomes an error of its own: the
    event loop would stand still for half a minute. What a long body may hold instead is long texts
    and images.

    Colons and commas outside strings are counted. Most bodies have fewer anywhere, which takes a
    few milliseconds to see; the others are read string by string, for at most as many strings and
    signs as a body may have.
    """
    if body.count(b":") <= MAX_FIELDS and body.count(b",") <= MAX_VALUES:
        return None
    fields = values = 0
    for found in _STRING_OR_SIGN.finditer(body):
        sign = found[0]
        fields += sign == b":"
        values += sign == b","
        if fields > MAX_FIELDS:
            return "fields"
        if values > MAX_VALUES:
            return "values"
    return None


async def check_json_size(body: bytes) -> None:
    """Check a body, on a thread if it is long. Raises ApiError (400) for one of too many parts."""
    if len(body) <= MAX_FIELDS:
        return
    what = await asyncio.to_thread(too_many, body)
    if what is not None:
        most = MAX_FIELDS if what == "fields" else MAX_VALUES
        raise ApiError.invalid(f"the body has more than {most:,} {what}")
