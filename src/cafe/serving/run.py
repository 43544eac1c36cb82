"""The server as a whole: from a model to a listening socket, and from SIGTERM to a clean end.

It listens before torch is imported, so that probes are answered while the model loads.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from cafe.errors import CafeError
from cafe.memory import trim_memory
from cafe.serving.app import create_app
from cafe.serving.engine import Engine
from cafe.serving.fetch import Fetch
from cafe.serving.limits import Limits
from cafe.serving.messages import EngineModel
from cafe.serving.metrics import Metrics
from cafe.serving.middleware import RequestGuard
from cafe.serving.routes.search import IndexSearch
from cafe.serving.service import SearchFunction, Service

if TYPE_CHECKING:
    from cafe.index import Index

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05
TRIM_SECONDS = 20
"""How often free memory goes back to the kernel: glibc keeps what the largest requests freed."""
CLOSE_SECONDS = 5
"""How long connections may stay open after their last response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    name                  of the model, in requests
    host, port            where to listen; port 0 takes a free one
    api_key               that clients must send; None: no key is required
    max_batch             largest number of inputs computed together
    max_wait_seconds      how long an input waits for others to share its batch
    max_queue             number of waiting inputs from which on requests are refused (429); of one
                          request at most an eighth of it counts
    allow_remote_images   fetch images from public URLs
    page                  serve the web page
    access_log            log one line of JSON for each request, without its contents
    limits                of requests
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
    access_log: bool = False
    limits: Limits = field(default_factory=Limits)


class Server:
    """Serves a model on a socket, on threads of its own."""

    def __init__(
        self,
        load: Callable[[], EngineModel],
        settings: ServerSettings,
        search: SearchFunction | None = None,
        root: Path | None = None,
    ) -> None:
        """Create a server that is bound to its address; `start` or `run` starts it.

        Args:
            load: Loads the model, on the engine's thread while the server already listens.
            settings: Everything else about the server.
            search: Searches an index; None: there is no search.
            root: Folder of the images that `search` finds, for the page.

        Raises:
            CafeError: The host is reachable from other machines and there is no key, the address
                cannot be bound, or there is a page and gradio is not installed.
        """
        check_exposure(settings.host, settings.api_key)
        limits = settings.limits
        metrics = Metrics()
        self.engine = Engine(
            load,
            max_batch=settings.max_batch,
            max_wait_seconds=settings.max_wait_seconds,
            max_queue=settings.max_queue,
            on_batch=metrics.batch,
        )
        metrics.watch(self.engine)
        remote = Fetch(limits.image_fetch_bytes, limits.fetch_seconds)
        fetch = remote if settings.allow_remote_images else None
        self.service = Service(settings.name, self.engine, metrics, limits, fetch, search)
        self._guard = create_app(
            self.service,
            api_key=settings.api_key,
            hosts=loopback_hosts(settings.host) if settings.api_key is None else None,
            page=settings.page,
            access_log=settings.access_log,
            root=root,
        )
        self._drain_seconds = limits.request_seconds
        self._socket = open_socket(settings.host, settings.port)
        self._uvicorn = uvicorn.Server(_config(self._guard))
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([self._socket],), name="http", daemon=True
        )

    @property
    def url(self) -> str:
        """The address that the server listens on."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def ended(self) -> bool:
        """Whether it stopped without being asked to: the model or the HTTP thread failed."""
        return self.engine.failure is not None or not self._thread.is_alive()

    def start(self) -> None:
        """Start listening and loading the model; returns immediately."""
        self.engine.start()
        self._thread.start()

    def drain(self) -> bool:
        """Refuse new requests from now on (503). Returns whether all accepted ones are finished."""
        self._guard.draining = True
        return self._guard.active == 0

    def stop(self) -> None:
        """Stop now; requests that still wait receive an error."""
        self.engine.close(0)
        self._uvicorn.should_exit = True
        self._thread.join(CLOSE_SECONDS + 2)
        self._socket.close()

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal stops immediately.

        Signals can be handled on the main thread only.

        Args:
            on_ready: Called with the address when the model is loaded.

        Raises:
            BaseException: Whatever the model raised while loading or when it failed for good.
        """
        with _signals() as received:
            self.start()
            reported = False
            trimmed = time.monotonic()
            while not received and not self.ended:
                if time.monotonic() - trimmed > TRIM_SECONDS:
                    trim_memory()
                    trimmed = time.monotonic()
                if self.engine.loaded and not reported:
                    on_ready(self.url)
                    reported = True
                time.sleep(TICK_SECONDS)
            deadline = time.monotonic() + self._drain_seconds
            while not self.drain() and len(received) < 2 and time.monotonic() < deadline:
                if self.ended:
                    break
                time.sleep(TICK_SECONDS)
            self.stop()
        if self.engine.failure is not None:
            raise self.engine.failure


def serve(
    model: str | Path,
    *,
    index: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_batch: int = 32,
    max_wait_seconds: float = 0.005,
    max_queue: int = 256,
    prefix_cache_mb: int = 256,
    allow_remote_images: bool = False,
    ui: bool = False,
    access_log: bool = False,
    limits: Limits | None = None,
    report: Callable[[str], None] = log.info,
) -> None:
    """Serve a model over HTTP until SIGTERM or SIGINT; running requests are finished first.

    It blocks, and must be called on the main thread, which receives the signals.

    Args:
        model: "tiny", a checkpoint directory, or a hub id.
        index: Folder or URI of an index to search with `/search` and on the web page.
        host: Address to listen on; one that other machines can reach requires a key.
        port: 0 takes a free one.
        api_key: Key that clients must send; None: no key is required.
        max_batch: Largest number of inputs computed together.
        max_wait_seconds: How long an input waits for others to share its batch.
        max_queue: Number of waiting inputs from which on requests are refused (429); of one
            request at most an eighth of it counts.
        prefix_cache_mb: Memory, in MiB, for what was read of images, so that further questions
            about one need not read it again; 0: none.
        allow_remote_images: Whether to fetch images from public URLs.
        ui: Whether to serve the web page too, at `/ui`.
        access_log: Whether to log one line of JSON for each request, without its contents, on the
            logger `cafe.serving.access`.
        limits: Limits of requests; None: the defaults.
        report: Receives one line when loading starts, and one with the address when the model is
            loaded.

    Raises:
        CafeError: The host is reachable from other machines and there is no key, the address
            cannot be bound, gradio is not installed, or the model or the index cannot be loaded.
    """
    opened = None if index is None else _open_index(index)
    search = None if opened is None else IndexSearch(opened)
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    settings = ServerSettings(
        name=name,
        host=host,
        port=port,
        api_key=api_key,
        max_batch=max_batch,
        max_wait_seconds=max_wait_seconds,
        max_queue=max_queue,
        allow_remote_images=allow_remote_images,
        page=ui,
        access_log=access_log,
        limits=limits or Limits(),
    )
    root = None if search is None else search.root
    server = Server(
        lambda: _load_model(model, opened, prefix_cache_mb * 2**20), settings, search, root
    )
    report(f"loading {model}")
    server.run(lambda url: report(f"serving {name} on {url}{'/ui' * ui}"))


def _open_index(uri: str | Path) -> Index:
    from cafe.index import Index

    return Index.open(uri)


def _load_model(model: str | Path, index: Index | None, prefix_bytes: int) -> EngineModel:
    """Load the model; raises DataError if another model made `index`."""
    from cafe.model.vlm import CAFe
    from cafe.retrieval.indexing import open_model
    from cafe.serving.model_calls import CafeCalls

    vlm = CAFe.from_pretrained(model) if index is None else open_model(str(model), index)[0]
    return CafeCalls(vlm, prefix_bytes)


def _config(guard: RequestGuard) -> uvicorn.Config:
    return uvicorn.Config(
        guard,  # pyright: ignore[reportArgumentType]
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
    """The signals received so far: a list, because a lock in a handler could deadlock."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {s: signal.signal(s, record) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CafeError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while ")[0]  # the message names the address already
        raise CafeError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host or --port"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Raises CafeError for a host that other machines can reach if there is no key."""
    if api_key == "":
        raise CafeError("the API key is empty")
    if api_key is None and not is_loopback(host):
        raise CafeError(
            f"--host {host} is reachable from other machines: set --api-key KEY (or CAFE_API_KEY), "
            "or use 127.0.0.1"
        )


def loopback_hosts(host: str) -> frozenset[str]:
    """Host header values that clients on this machine use for a server on loopback."""
    bracketed = f"[{host}]" if ":" in host else host
    return frozenset({"localhost", "127.0.0.1", "[::1]", bracketed})
