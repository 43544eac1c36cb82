"""From a model to a listening socket, and from SIGTERM to a clean end."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from cafe.errors import CafeError
from cafe.serve.app import create_app
from cafe.serve.engine import Engine
from cafe.serve.fetch import Fetch
from cafe.serve.gate import Gate
from cafe.serve.limits import Limits
from cafe.serve.meters import Meters
from cafe.serve.service import Search, Service
from cafe.serve.work import ModelCalls

TICK_SECONDS = 0.05
CLOSE_SECONDS = 5
"""How long connections may stay open after their last answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `cafe serve` is told.

    name   what requests call the model
    page   whether there is a web page
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 32
    max_wait_seconds: float = 0.005
    max_queue: int = 256
    allow_remote_images: bool = False
    page: bool = False
    limits: Limits = field(default_factory=Limits)


class Server:
    """A model behind a socket, on threads of its own.

    load   makes the model, on the engine's thread: the server listens already while it loads
    root   where the pictures lie that `search` finds, for the page
    """

    def __init__(
        self,
        load: Callable[[], ModelCalls],
        settings: Settings,
        search: Search | None = None,
        root: Path | None = None,
    ) -> None:
        """Raises CafeError for an open host without a key, an address that cannot be had, or a page
        without gradio.
        """
        check_exposure(settings.host, settings.api_key)
        limits = settings.limits
        meters = Meters()
        self.engine = Engine(
            load,
            max_batch=settings.max_batch,
            max_wait_seconds=settings.max_wait_seconds,
            max_queue=settings.max_queue,
            on_batch=meters.batch,
        )
        meters.watch(self.engine)
        remote = Fetch(limits.image_fetch_bytes, limits.fetch_seconds)
        fetch = remote if settings.allow_remote_images else None
        self.service = Service(settings.name, self.engine, meters, limits, fetch, search)
        self._gate = create_app(
            self.service,
            api_key=settings.api_key,
            hosts=own_names(settings.host) if settings.api_key is None else None,
            page=settings.page,
            root=root,
        )
        self._drain_seconds = limits.request_seconds
        self._socket = listening(settings.host, settings.port)
        self._uvicorn = uvicorn.Server(_config(self._gate))
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([self._socket],), name="http", daemon=True
        )

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def ended(self) -> bool:
        """Whether it stopped by itself: no model, or no event loop any more."""
        return self.engine.failure is not None or not self._thread.is_alive()

    def start(self) -> None:
        self.engine.start()
        self._thread.start()

    def drain(self) -> bool:
        """Refuse new requests from now on (503). Returns whether the accepted ones are answered."""
        self._gate.draining = True
        return self._gate.active == 0

    def stop(self) -> None:
        """End now; whoever still waits is told so."""
        self.engine.close(0)
        self._uvicorn.should_exit = True
        self._thread.join(CLOSE_SECONDS + 2)
        self._socket.close()

    def run(self, ready: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends it at once.

        ready   is told the address when the model is loaded
        Raises what the model raised when it was loaded or when it failed for good.
        """
        with _signals() as came:
            self.start()
            told = False
            while not came and not self.ended:
                if self.engine.loaded and not told:
                    ready(self.url)
                    told = True
                time.sleep(TICK_SECONDS)
            deadline = time.monotonic() + self._drain_seconds
            while not self.drain() and len(came) < 2 and time.monotonic() < deadline:
                if self.ended:
                    break
                time.sleep(TICK_SECONDS)
            self.stop()
        if self.engine.failure is not None:
            raise self.engine.failure


def _config(gate: Gate) -> uvicorn.Config:
    return uvicorn.Config(
        gate,  # pyright: ignore[reportArgumentType]
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that come. A list, for a lock inside a handler could wait for itself."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CafeError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while ")[0]  # the address is named already
        raise CafeError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host or --port"
        ) from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Raises CafeError for a host that others can reach when no key is asked."""
    if api_key == "":
        raise CafeError("the API key is empty")
    if api_key is None and not is_loopback(host):
        raise CafeError(
            f"--host {host} lets others in: give --api-key KEY (or CAFE_API_KEY), or stay on "
            "127.0.0.1"
        )


def own_names(host: str) -> frozenset[str]:
    """What a browser or client on this machine calls a server on loopback."""
    bracketed = f"[{host}]" if ":" in host else host
    return frozenset({"localhost", "127.0.0.1", "[::1]", bracketed})
