"""The server's metrics, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cafe.serving.engine import Engine
from cafe.serving.messages import RequestKind

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KINDS: tuple[RequestKind, ...] = ("embed", "tokens", "score", "generate")


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cafe_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._latency = self._histogram(
            "cafe_request_seconds", "Request duration", "route", SECONDS
        )
        self._first = self._histogram(
            "cafe_first_token_seconds", "Time to first token", None, SECONDS
        )
        self._sizes = self._histogram("cafe_batch_size", "Items per batch", "kind", SIZES)
        self._seconds = self._histogram("cafe_batch_seconds", "Batch duration", "kind", SECONDS)
        self._tokens = Counter(
            "cafe_tokens",
            "Tokens read (prompt) and generated (new)",
            ["kind"],
            registry=self._registry,
        )

    def _histogram(
        self, name: str, text: str, label: str | None, buckets: tuple[float, ...]
    ) -> Histogram:
        labels = [] if label is None else [label]
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def watch(self, engine: Engine) -> None:
        """Report the state of the engine's queue with every scrape."""
        depth = Gauge("cafe_queue_depth", "Items in the queue", ["kind"], registry=self._registry)
        for kind in KINDS:
            depth.labels(kind).set_function(lambda kind=kind: engine.waiting[kind])
        running = Gauge("cafe_generating", "Answers being generated", registry=self._registry)
        running.set_function(lambda: engine.generating)
        self._watch_prefixes(engine)

    def _watch_prefixes(self, engine: Engine) -> None:
        """Report what is kept of images, and how often it was used."""
        names = {
            "bytes": "Memory of what was read of images",
            "hits": "Prompts whose image had been read before",
            "misses": "Prompts whose image was read",
        }
        for name, text in names.items():
            gauge = Gauge(f"cafe_prefix_cache_{name}", text, registry=self._registry)
            gauge.set_function(lambda name=name: getattr(engine.prefixes, name, 0))

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request and its duration."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the time from a request to its first piece of text."""
        self._first.observe(seconds)

    def batch(self, kind: RequestKind, size: int, seconds: float) -> None:
        """Count a batch, its number of items and its duration."""
        self._sizes.labels(kind).observe(size)
        self._seconds.labels(kind).observe(seconds)

    def tokens(self, prompt: int, new: int = 0) -> None:
        """Count the tokens of a request."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("new").inc(new)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
