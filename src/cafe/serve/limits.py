"""What one request may ask for, and what all of them may hold at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from cafe.serve.refusal import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request; `held_…` are bounds of all requests together.

    request_seconds   from the whole body to the whole answer
    send_seconds      how long a client may leave one piece of an answer unread
    text_characters   of one text: far above what a model reads, low enough to tokenise at once
    new_tokens        the largest `max_tokens`; `default_new_tokens` holds when it is not given
    """

    body_bytes: int = 20 * 2**20
    held_body_bytes: int = 512 * 2**20
    read_seconds: float = 30.0
    send_seconds: float = 30.0
    request_seconds: float = 300.0
    inputs: int = 2048
    text_characters: int = 200_000
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
    """A number of bytes or pixels that all requests share. Any thread may take and give back."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        return self._taken

    def take(self, amount: int) -> None:
        """Raises Refused (429) when others hold too much at the moment."""
        with self._lock:
            if self._taken + amount > self._total:
                raise Refused.busy(f"the server holds too many {self._what} at the moment")
            self._taken += amount

    def give_back(self, amount: int) -> None:
        with self._lock:
            self._taken -= amount


class Share:
    """What one request has taken from a `Budget`. Any thread may take."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._released = False
        self.taken = 0

    def take(self, amount: int) -> None:
        """Raises Refused: 429 when the budget does not have it, 503 after `release`."""
        with self._lock:
            if self._released:
                raise Refused.unavailable("the request has ended", "ended")
            self._budget.take(amount)
            self.taken += amount

    def release(self) -> None:
        """Give everything back, for good; twice does no harm."""
        with self._lock:
            self._released = True
            amount, self.taken = self.taken, 0
        self._budget.give_back(amount)
