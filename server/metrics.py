"""What the server counts, in a registry of its own, for Prometheus."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from coreinfer.runtime import Token
from coreinfer.runtime.scheduling import Scheduler
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["CountRequests", "Metrics", "ModelMetrics", "Outcome"]

Outcome = Literal["stop", "length", "cancelled", "error"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_WEIGHT_BYTES = tuple(1e6 * 2**step for step in range(4, 15))
_DISTANCES = tuple(round(0.05 * step, 2) for step in range(1, 21))

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Metrics:
    """All counters of one server."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("http_requests", "Requests answered.", "route", "status")
        self.request_seconds = self._histogram("request_seconds", "Whole time of requests.", _SECONDS, "route")
        self.generations = self._counter("generations", "Generations, by how they ended.", "model", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.", "model")
        self.cached_tokens = self._counter("cached_tokens", "Tokens of prompts that need not be read.", "model")
        self.prefix_hits = self._counter(
            "prefix_hits", "Generations whose prompt began with tokens that need not be read.", "model"
        )
        self.new_tokens = self._counter("completion_tokens", "Tokens decoded.", "model")
        self.cluster_hits = self._counter("cluster_hits", "Generations by nearest cluster.", "model", "cluster")
        self.swaps = self._counter("swaps", "Changes from one cluster pack to another.", "model")
        self.modes = self._counter("modes", "Generations by mode.", "model", "mode")
        self.distance = self._histogram("distance", "Distance of prompts to their cluster.", _DISTANCES, "model")
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "From a request's arrival to its first token.", _SECONDS, "model"
        )
        self.decode_seconds = self._histogram("decode_seconds", "Decoding of one answer.", _SECONDS, "model")
        self.weight_bytes = self._histogram(
            "token_weight_bytes",
            "Weights that a token reads of a share below 1, the mean of a generation.",
            _WEIGHT_BYTES,
            "model",
        )
        self.batch_size = self._histogram("batch_size", "Generations that share a pass.", _BATCH_SIZES, "model")
        self.queue = self._gauge("queue_length", "Requests that wait.")
        self.active = self._gauge("active", "Requests that are read or decoded.")
        self.pages = self._gauge("kv_pages", "Pages of the KV cache.")
        self.free_pages = self._gauge("kv_free_pages", "Pages of the KV cache that hold nothing.")
        self.replicas = self._gauge("replicas", "Engines on Ray that answer.")
        self.asked_again = self._counter("asked_again", "Requests asked again where a replica was lost.", "model")
        self.pack_uses = self._counter("pack_uses", "Generations by whether their pack was warm.", "model", "warm")
        self.exchanges = self._counter("exchanges", "Exchanges of a bundle, by how they ended.", "model", "outcome")

    def page(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"coreinfer_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"coreinfer_{name}", text, ["model"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"coreinfer_{name}", text, labels, buckets=buckets, registry=self.registry)


@dataclass(kw_only=True)
class ModelMetrics:
    """The counters of one model; a worker's thread calls it."""

    metrics: Metrics
    model: str
    _packs: dict[str, int] = field(default_factory=dict, init=False)

    def watch(self, scheduler: Scheduler) -> None:
        """Show what a scheduler does and holds."""
        decoder = scheduler.decoder
        self.metrics.active.labels(self.model).set_function(lambda: scheduler.num_active)
        self.metrics.pages.labels(self.model).set_function(lambda: decoder.num_pages)
        self.metrics.free_pages.labels(self.model).set_function(lambda: decoder.num_free_pages)
        scheduler.on_pass = self.metrics.batch_size.labels(self.model).observe

    def watch_replicas(
        self,
        *,
        num_replicas: Callable[[], int],
        num_active: Callable[[], int],
        num_pages: Callable[[], int],
        num_free_pages: Callable[[], int],
    ) -> None:
        """Show what replicas do and hold, by functions that return it."""
        self.metrics.replicas.labels(self.model).set_function(num_replicas)
        self.metrics.active.labels(self.model).set_function(num_active)
        self.metrics.pages.labels(self.model).set_function(num_pages)
        self.metrics.free_pages.labels(self.model).set_function(num_free_pages)
        # Both are there from the beginning.
        self.metrics.asked_again.labels(self.model)
        for warm in ("yes", "no"):
            self.metrics.pack_uses.labels(self.model, warm)

    def asked_again(self) -> None:
        """Note that a request is asked again."""
        self.metrics.asked_again.labels(self.model).inc()

    def pack_used(self, *, was_warm: bool) -> None:
        """Note a generation with a pack."""
        self.metrics.pack_uses.labels(self.model, "yes" if was_warm else "no").inc()

    def exchanged(self, outcome: Literal["done", "failed"]) -> None:
        """Note an exchange of the bundle."""
        self.metrics.exchanges.labels(self.model, outcome).inc()

    def queue_length(self, length: int) -> None:
        """Note how many requests wait."""
        self.metrics.queue.labels(self.model).set(length)

    def first_token(self, seconds: float) -> None:
        """Note how long a client waited for its first token."""
        self.metrics.first_token_seconds.labels(self.model).observe(seconds)

    def finished(self, outcome: Outcome, last: Token | None, *, engine: str = "") -> None:
        """Note a generation that ended, with its last token, if it had any.

        Args:
            engine: which of several it ran on.
        """
        metrics, model = self.metrics, self.model
        metrics.generations.labels(model, outcome).inc()
        if last is None:
            return
        metrics.prompt_tokens.labels(model).inc(last.num_prompt_tokens)
        metrics.cached_tokens.labels(model).inc(last.num_cached_tokens)
        metrics.prefix_hits.labels(model).inc(last.num_cached_tokens > 0)
        metrics.new_tokens.labels(model).inc(last.num_tokens)
        metrics.cluster_hits.labels(model, str(last.cluster)).inc()
        metrics.modes.labels(model, last.mode).inc()
        metrics.distance.labels(model).observe(last.distance)
        metrics.decode_seconds.labels(model).observe(last.decode_seconds)
        if last.bytes_read is not None:
            metrics.weight_bytes.labels(model).observe(last.bytes_read.mean)
        if last.mode == "similarity":
            self._count_swaps(last, engine)

    def _count_swaps(self, last: Token, engine: str) -> None:
        for step in last.path:
            if self._packs.get(engine, step.cluster) != step.cluster:
                self.metrics.swaps.labels(self.model).inc()
            self._packs[engine] = step.cluster


class CountRequests:
    """ASGI middleware: counts every response by route and status, and times it to its last byte."""

    def __init__(self, app: AsgiApp, *, metrics: Metrics) -> None:
        """Wrap an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            # A path that matches no route could be anything: it must not become a label.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(time.monotonic() - start)
