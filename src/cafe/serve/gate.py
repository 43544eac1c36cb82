"""What every request passes before a route sees it, and how it ends.

Host and key, draining, the body's size and time; then the route runs beside a watch over the
connection: a client that leaves, or a deadline that passes, cancels it. Whatever the request has
taken (places in the queue, pixels) is registered in `scope[CLEANUP]` and given back at its end,
however it ends.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from cafe.serve.door import LOGIN, LOGIN_BYTES, Door
from cafe.serve.limits import Budget, Limits, Share
from cafe.serve.meters import Meters
from cafe.serve.refusal import Refused

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLEANUP = "cafe.cleanup"
DEADLINE = "cafe.deadline"
PROBES = {"/health", "/ready"}
GONE = 499
"""The status that is counted for a client that did not wait."""

DISCARDED_BODIES = 4
"""A refused request's body is read and thrown away up to so many times the limit: a client that is
still sending would not see the answer."""


class _GoneError(Exception):
    pass


@dataclass(eq=False)
class _Reply:
    """What has been sent so far."""

    send: Send
    seconds: float
    status: int = 0
    complete: bool = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        async with asyncio.timeout(self.seconds):
            await self.send(message)


@dataclass(eq=False)
class Gate:
    """An ASGI application around the routes.

    routes     their paths, as counters name them
    api_key    what "Authorization: Bearer …" must say; None: no key is asked
    hosts      what the Host header may say; None: anything. A web page that somebody looks at can
               make a browser ask a server on loopback under a name of its own
    door       of the web page: a browser has a cookie instead of a header; None: there is no page
    """

    app: App
    routes: frozenset[str]
    meters: Meters
    limits: Limits
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    door: Door | None = None
    draining: bool = False
    active: int = 0
    _bodies: Budget = field(init=False)

    def __post_init__(self) -> None:
        self._bodies = Budget(self.limits.held_body_bytes, "request bodies")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        begin = time.monotonic()
        reply = _Reply(send, self.limits.send_seconds)
        self.active += path not in PROBES
        try:
            await self._answer(scope, receive, reply)
        except (_GoneError, TimeoutError):
            reply.status = GONE
        except Exception:
            log.exception("%s %s failed", scope["method"], path)
            if not reply.status:
                await _refuse(Refused(500, "internal error"), scope, receive, reply)
        finally:
            self.active -= path not in PROBES
            route = path if path in self.routes else "page" if self._of_page(path) else "other"
            self.meters.request(route, reply.status or GONE, time.monotonic() - begin)

    async def _answer(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        with ExitStack() as cleanup:
            scope[CLEANUP] = cleanup
            share = Share(self._bodies)
            cleanup.callback(share.release)
            try:
                body = await self._body_in_time(scope, receive, share)
                await self._run(scope, receive, body, reply)
            except Refused as refused:
                await _refuse(refused, scope, receive, reply)

    # ------------------------------------------------------------------ coming in

    async def _body_in_time(self, scope: Scope, receive: Receive, share: Share) -> bytes:
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                return await self._admit(scope, receive, share)
        except TimeoutError:
            raise Refused(408, "the request's body came too slowly") from None

    async def _admit(self, scope: Scope, receive: Receive, share: Share) -> bytes:
        """The body of a request that may come in. Raises Refused."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused: Refused | None = None
        try:
            self._check(scope, headers)
        except Refused as error:
            refused = error
        if refused is not None and b"100-continue" in headers.get(b"expect", b"").lower():
            raise refused  # its body has not been sent yet
        body = bytearray()
        limit = self._body_limit(scope["path"])
        count, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            chunk, more = message.get("body", b""), message.get("more_body", False)
            count += len(chunk)
            if refused is None and count > limit:
                refused = Refused(413, f"the request's body exceeds {limit:,} bytes")
                body.clear()
            if refused is None:
                try:
                    share.take(len(chunk))
                except Refused as error:
                    refused = error
                    body.clear()
                else:
                    body += chunk
            elif count > DISCARDED_BODIES * limit:
                break
        if refused is not None:
            raise refused
        return bytes(body)

    def _of_page(self, path: str) -> bool:
        return self.door is not None and self.door.leads_to(path)

    def _body_limit(self, path: str) -> int:
        """Who has not given the key yet has nothing long to say."""
        login = self.door is not None and path == LOGIN
        return min(LOGIN_BYTES, self.limits.body_bytes) if login else self.limits.body_bytes

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
            if name.lower() not in self.hosts:
                raise Refused(
                    403, f"host {host[:100]!r} is not this server's; start it with an API key"
                )
        if path in PROBES:
            return
        if self.door is not None and self.door.leads_to(path):
            self.door.check(scope["method"], path, headers)
        elif self.api_key is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(key.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not right:
                raise Refused(
                    401,
                    'a wrong key or none: send "Authorization: Bearer KEY"',
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.draining:
            raise Refused.unavailable("the server is shutting down", "shutting_down")

    # ------------------------------------------------------------------ the route

    async def _run(self, scope: Scope, receive: Receive, body: bytes, reply: _Reply) -> None:
        """The route, for as long as its client is there and the deadline has not passed."""
        gone = asyncio.ensure_future(_disconnected(receive))
        seconds = self.limits.request_seconds
        scope[DEADLINE] = asyncio.get_running_loop().time() + seconds
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> MutableMapping[str, Any]:
            for message in messages:
                return message
            await asyncio.shield(gone)
            return {"type": "http.disconnect"}

        route = asyncio.ensure_future(self.app(scope, replay, reply))
        try:
            # A stream ends itself at the deadline, with a word; this is for all others.
            await asyncio.wait({route, gone}, timeout=seconds + 1, return_when="FIRST_COMPLETED")
            late = not route.done() and not gone.done()
        finally:
            route.cancel()
            gone.cancel()
            await asyncio.gather(route, gone, return_exceptions=True)
        if late and not reply.status:
            raise Refused(504, f"no answer within {seconds:.0f} seconds", code="timeout")
        if route.cancelled():
            raise _GoneError
        route.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(refused: Refused, scope: Scope, receive: Receive, reply: _Reply) -> None:
    response = refused.response
    response.headers["Connection"] = "close"
    await response(scope, receive, reply)  # pyright: ignore[reportArgumentType]
