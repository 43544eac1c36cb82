"""What the routes share: the engine, limits, counters, and how a request's work is awaited."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from starlette.requests import Request

from cafe.errors import DataError
from cafe.serve.content import Reader
from cafe.serve.engine import Call, Engine
from cafe.serve.fetch import Fetch
from cafe.serve.gate import CLEANUP
from cafe.serve.limits import Budget, Limits, Share
from cafe.serve.meters import Meters
from cafe.serve.refusal import Refused
from cafe.serve.work import Item, Kind
from cafe.types import Hit

Search = Callable[[np.ndarray, int, str | None], Sequence[Hit]]
"""A unit vector [d], how many hits, SQL or None -> hits, best first. Raises Refused for bad SQL."""

FETCHES = 8
"""So many remote pictures are fetched at a time."""


@dataclass(eq=False)
class Service:
    """One served model.

    name     what requests call it
    fetch    for remote pictures; None: they are refused
    search   over an index; None: there is no such route
    """

    name: str
    engine: Engine
    meters: Meters
    limits: Limits
    fetch: Fetch | None = None
    search: Search | None = None
    _pixels: Budget = field(init=False)
    _decoders: ThreadPoolExecutor = field(init=False)
    _fetchers: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pixels = Budget(self.limits.held_pixels, "pixels")
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        self._fetchers = ThreadPoolExecutor(FETCHES, "fetch")

    def check_model(self, name: str | None) -> None:
        """Raises Refused (404) for another model's name."""
        if name not in (None, self.name):
            raise Refused(
                404,
                f"no model of that name here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def reader(self, request: Request) -> Reader:
        """Reads what `request` says; what it takes is given back when the request ends."""
        share = Share(self._pixels)
        request.scope[CLEANUP].callback(share.release)
        return Reader(
            self.limits, share, None if self.fetch is None else self._fetched, self._decoders
        )

    async def _fetched(self, url: str) -> bytes:
        assert self.fetch is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._fetchers, self.fetch, url)

    def submit(self, request: Request, call: Call) -> None:
        """Queue a call that lives as long as its request. Raises Refused (429, 503)."""
        self.engine.submit(call)
        request.scope[CLEANUP].callback(self.engine.cancel, call)

    async def results(self, request: Request, kind: Kind, items: list[Item]) -> list[Any]:
        """One result for each item. Raises Refused."""
        call = Call(kind, items)
        self.submit(request, call)
        with explained():
            return await asyncio.wrap_future(call.future)

    def stream(self, request: Request, item: Item) -> tuple[Call, asyncio.Queue[str | None]]:
        """Queue a prompt; its pieces come through the queue, None after the last. Raises Refused.

        What went wrong, and the whole answer, are in the call's future when None has come.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def post(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        call = Call("generate", [item], on_piece=post)
        call.future.add_done_callback(lambda _: post(None))
        self.submit(request, call)
        return call, pieces

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run what would keep the other requests waiting on a thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, function, *arguments
        )


@contextmanager
def explained() -> Iterator[None]:
    """What a request is to blame for becomes a refusal (400)."""
    try:
        yield
    except DataError as error:
        raise Refused.invalid(str(error)) from error
    except TemplateError as error:
        raise Refused.invalid(f"the model's chat template refuses this: {error}") from error
