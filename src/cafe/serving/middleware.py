"""The middleware around all routes: what a request must pass first, and how it ends.

It checks host and key, refuses while draining, and bounds the body's size and time. Then the route
runs while the connection is watched: a client that disconnects, or a deadline that passes, cancels
it. Whatever the request holds (queue slots, pixels) is registered in `scope[CLEANUP]` and released
when the request ends, however it ends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cafe.serving.errors import ApiError
from cafe.serving.ignored import HEADER, SCOPE_KEY
from cafe.serving.limits import Budget, Limits, Reservation, check_json_size
from cafe.serving.metrics import Metrics
from cafe.serving.page_auth import LOGIN, LOGIN_BYTES, UPLOAD, PageAuth

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

access = logging.getLogger("cafe.serving.access")
access.setLevel(logging.INFO)  # whoever asks for it wants it at any level of the other messages

REQUEST_ID = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")

CLEANUP = "cafe.cleanup"
DEADLINE = "cafe.deadline"
PROBES = {"/health", "/ready"}
CLIENT_CLOSED_REQUEST = 499
"""The status recorded for a client that disconnected before its answer (nginx uses the same)."""

DISCARD_FACTOR = 4
"""The body of a refused request is read and discarded up to this multiple of the size limit: a
client that is still sending would not see the response."""

STRANGERS_BYTES = 2**20
"""What all bodies that need no key may hold together, apart from the budget of those that do."""


class _ClientDisconnectedError(Exception):
    pass


@dataclass(eq=False)
class _Reply:
    """Sends the response, and records how much of it has been sent.

    request_id  for a header, by which the client finds the request in the logs
    ignored   names of the request's fields that change nothing, for a header
    sent      bytes of the body
    """

    send: Send
    seconds: float
    request_id: str
    ignored: list[str] = field(default_factory=list)
    status: int = 0
    sent: int = 0
    complete: bool = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (REQUEST_ID, self.request_id.encode())]
            if self.ignored:
                headers.append((HEADER, ", ".join(self.ignored).encode()))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        async with asyncio.timeout(self.seconds):
            await self.send(message)


@dataclass(eq=False)
class RequestGuard:
    """An ASGI application around the routes.

    routes      their paths, as the metrics label them
    api_key     the key that "Authorization: Bearer …" must carry; None: no key is required
    hosts       allowed values of the Host header; None: any. Without this check a web page could
                make its visitor's browser send requests to a server on loopback under a name of
                the page's own (DNS rebinding)
    page_auth   access control of the web page, where a browser has a cookie instead of a header;
                None: there is no page
    access_log  write one line for each request (`access_line`)
    draining    new requests are refused with 503
    active      number of accepted requests in progress, without health probes and logins: what a
                client sends without a key must not delay the end of the process
    """

    app: App
    routes: frozenset[str]
    metrics: Metrics
    limits: Limits
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    page_auth: PageAuth | None = None
    access_log: bool = False
    draining: bool = False
    active: int = 0
    _bodies: Budget = field(init=False)
    _strangers: Budget = field(init=False)

    def __post_init__(self) -> None:
        self._bodies = Budget(self.limits.held_body_bytes, "request bodies")
        self._strangers = Budget(STRANGERS_BYTES, "request bodies")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        begin = time.monotonic()
        reply = _Reply(send, self.limits.send_seconds, request_id(scope["headers"]))
        try:
            await self._handle(scope, receive, reply)
        except (_ClientDisconnectedError, TimeoutError):
            reply.status = CLIENT_CLOSED_REQUEST
        except Exception:
            log.exception("%s %s failed (request %s)", scope["method"], path, reply.request_id)
            if not reply.status:
                await _send_error(ApiError(500, "internal error"), scope, receive, reply)
        finally:
            route = path if path in self.routes else "page" if self._is_page(path) else "other"
            status, seconds = reply.status or CLIENT_CLOSED_REQUEST, time.monotonic() - begin
            self.metrics.request(route, status, seconds)
            if self.access_log:
                access.info("%s", access_line(scope["method"], route, status, seconds, reply))

    async def _handle(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        with ExitStack() as cleanup:
            scope[CLEANUP] = cleanup
            scope[SCOPE_KEY] = reply.ignored
            try:
                body = await self._body_in_time(scope, receive, cleanup)
                # An upload of the page is no JSON; all else is, or is a short form.
                if scope["path"] != UPLOAD:
                    await check_json_size(body)
                await self._run(scope, receive, body, reply)
            except ApiError as error:
                await _send_error(error, scope, receive, reply)

    # ------------------------------------------------------------------ admission

    async def _body_in_time(self, scope: Scope, receive: Receive, cleanup: ExitStack) -> bytes:
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                return await self._read_body(scope, receive, cleanup)
        except TimeoutError:
            raise ApiError(408, "the request body arrived too slowly") from None

    async def _read_body(self, scope: Scope, receive: Receive, cleanup: ExitStack) -> bytes:
        """The body of a request that passes the checks. Raises ApiError for one that does not."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        rejection: ApiError | None = None
        try:
            self._check(scope, headers)
        except ApiError as error:
            rejection = error
        if rejection is None and not self._without_key(scope["path"]):
            self.active += 1
            cleanup.callback(self._ended)
        share = Reservation(self._strangers if self._without_key(scope["path"]) else self._bodies)
        cleanup.callback(share.release)
        if rejection is not None and b"100-continue" in headers.get(b"expect", b"").lower():
            raise rejection  # the client has not sent the body yet
        body = bytearray()
        limit = self._body_limit(scope["path"])
        count, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientDisconnectedError
            chunk, more = message.get("body", b""), message.get("more_body", False)
            count += len(chunk)
            if rejection is None and count > limit:
                rejection = ApiError(413, f"the request body exceeds {limit:,} bytes")
                body.clear()
            if rejection is None:
                try:
                    share.take(len(chunk))
                except ApiError as error:
                    rejection = error
                    body.clear()
                else:
                    body += chunk
            elif count > DISCARD_FACTOR * limit:
                break
        if rejection is not None:
            raise rejection
        return bytes(body)

    def _ended(self) -> None:
        self.active -= 1

    def _is_page(self, path: str) -> bool:
        return self.page_auth is not None and self.page_auth.covers(path)

    def _without_key(self, path: str) -> bool:
        """Whether anyone may send a request to `path`: a probe or a login form."""
        return path in PROBES or (self.page_auth is not None and path == LOGIN)

    def _body_limit(self, path: str) -> int:
        """Bytes; those who need no key have little to send."""
        most = self.limits.body_bytes
        return min(LOGIN_BYTES, most) if self._without_key(path) else most

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
            if name.lower() not in self.hosts:
                raise ApiError(
                    403,
                    f"host {host[:100]!r} is not a name of this server; start it with an API key "
                    "to accept any host",
                )
        if path in PROBES:
            return
        if self.page_auth is not None and self.page_auth.covers(path):
            self.page_auth.check(scope["method"], path, headers)
        elif self.api_key is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            valid = hmac.compare_digest(key.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not valid:
                raise ApiError(
                    401,
                    'missing or wrong API key: send "Authorization: Bearer KEY"',
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.draining:
            raise ApiError.unavailable("the server is shutting down", "shutting_down")

    # ------------------------------------------------------------------ the route

    async def _run(self, scope: Scope, receive: Receive, body: bytes, reply: _Reply) -> None:
        """Run the route until it ends, its client disconnects or the deadline passes."""
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        seconds = self.limits.request_seconds
        scope[DEADLINE] = asyncio.get_running_loop().time() + seconds
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> MutableMapping[str, Any]:
            for message in messages:
                return message
            await asyncio.shield(disconnected)
            return {"type": "http.disconnect"}

        route = asyncio.ensure_future(self.app(scope, replay, reply))
        try:
            # A stream ends itself at the deadline, with an error event; this is for all others.
            await asyncio.wait(
                {route, disconnected}, timeout=seconds + 1, return_when="FIRST_COMPLETED"
            )
            late = not route.done() and not disconnected.done()
        finally:
            route.cancel()
            disconnected.cancel()
            await asyncio.gather(route, disconnected, return_exceptions=True)
        if late and not reply.status:
            raise ApiError(504, f"no answer within {seconds:.0f} seconds", code="timeout")
        if route.cancelled():
            raise _ClientDisconnectedError
        route.result()


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id of its request if that is a plain word, else a new one."""
    found = next((value for name, value in headers if name.lower() == REQUEST_ID), b"")
    return found.decode() if _SANE_ID.fullmatch(found) else uuid.uuid4().hex


def access_line(method: str, route: str, status: int, seconds: float, reply: _Reply) -> str:
    """A request as one line of JSON: no contents, no address of its sender, no path of ours."""
    return json.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": reply.request_id,
            "method": method if method.isalpha() else "?",
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": reply.sent,
        }
    )


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_error(error: ApiError, scope: Scope, receive: Receive, reply: _Reply) -> None:
    response = error.response
    response.headers["Connection"] = "close"
    await response(scope, receive, reply)  # pyright: ignore[reportArgumentType]
