"""Downloads remote images, without giving access to the server's own network (SSRF).

A host name is resolved once, all of its addresses must be public, and the connection goes to an
address that was checked. A redirect is a new URL and is checked in the same way.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from cafe.serving.errors import ApiError

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
MAX_URL_CHARACTERS = 4096
REDIRECTS = {301, 302, 303, 307, 308}
# Listed because `is_global` differs between Python versions, or because the addresses embed an IPv4
# address: where those lead depends on a gateway.
SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16")
)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    It must not be private, loopback, link-local (a cloud's metadata service), shared, multicast,
    reserved or unspecified; an IPv6 address must be global unicast and not embed an IPv4 address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if any(ip in block for block in SPECIAL):
        return False
    if ip.version == 6 and (ip.scope_id is not None or ip not in GLOBAL_UNICAST):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def resolve(host: str, port: int) -> list[str]:
    """The distinct addresses of a host. Raises OSError or UnicodeError when there are none."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


@dataclass(frozen=True, slots=True)
class Fetch:
    """Downloads an image; `allowed`, `resolve` and `ports` are fields for the tests.

    max_bytes   largest image
    seconds     for the whole download, redirects included
    allowed     whether an address may be connected to
    resolve     host and port -> addresses
    ports       allowed ports; None: any
    """

    max_bytes: int
    seconds: float
    allowed: Callable[[str], bool] = is_public
    resolve: Callable[[str, int], list[str]] = resolve
    ports: frozenset[int] | None = frozenset(PORTS.values())

    def __call__(self, url: str) -> bytes:
        """The content of a URL.

        Raises:
            ApiError: 400 for a URL that is not allowed or cannot be fetched.
        """
        deadline = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            content, redirect = self._get(url, deadline)
            if redirect is None:
                return content
            url = redirect
        raise _refused(f"more than {MAX_REDIRECTS} redirects")

    def _get(self, url: str, deadline: float) -> tuple[bytes, str | None]:
        """One request: the content, or the URL of a redirect."""
        parts, host, port = self._parse(url)
        try:
            with _within(deadline) as guard:
                connection = self._connect(parts.scheme, host, port, deadline, guard)
                path = parts.path or "/"
                connection.request(
                    "GET",
                    f"{path}?{parts.query}" if parts.query else path,
                    headers={"Accept": "image/*", "Accept-Encoding": "identity"},
                )
                response = connection.getresponse()
                if response.status in REDIRECTS:
                    return b"", urljoin(url, response.getheader("Location") or "")
                if response.status != 200:
                    raise _refused(f"its server returned status {response.status}")
                content = response.read(self.max_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused("it could not be fetched") from error
        if len(content) > self.max_bytes:
            raise _refused(f"it is larger than {self.max_bytes:,} bytes")
        return content, None

    def _parse(self, url: str) -> tuple[SplitResult, str, int]:
        if len(url) > MAX_URL_CHARACTERS or not url.isascii() or not url.isprintable():
            raise _refused("it is not a plain URL")
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError as error:
            raise _refused("it is not a plain URL") from error
        if parts.scheme not in PORTS or not parts.hostname or " " in url:
            raise _refused("only http and https URLs are supported")
        if "@" in parts.netloc:
            raise _refused("a URL with a user name is not allowed")
        if self.ports is not None and port not in self.ports:
            raise _refused(f"port {port} is not allowed")
        return parts, parts.hostname, port

    def _connect(
        self, scheme: str, host: str, port: int, deadline: float, guard: _Guard
    ) -> http.client.HTTPConnection:
        """Connect to an address of `host` that has been checked."""
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise _refused("its host name has no address") from error
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise _refused("its host is not on the public internet")
        left = max(0.1, deadline - time.monotonic())
        connected = guard.watch(socket.create_connection((addresses[0], port), timeout=left))
        if scheme == "https":
            context = ssl.create_default_context()
            connected = guard.watch(context.wrap_socket(connected, server_hostname=host))
        connection = http.client.HTTPConnection(host, port)
        connection.sock = connected  # otherwise it would resolve the name again
        return connection


class _Guard:
    """Shuts a socket down at the deadline, however slowly its peer sends."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def watch(self, watched: socket.socket) -> socket.socket:
        self._socket = watched
        return watched

    def shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


@contextmanager
def _within(deadline: float) -> Iterator[_Guard]:
    guard = _Guard()
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), guard.shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield guard
    finally:
        timer.cancel()
        guard.close()


def _refused(reason: str) -> ApiError:
    return ApiError.invalid(f"a remote image was refused: {reason}", "image_url", "image_url")
