"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phimlx.generation.request import Request

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters and histograms of one server.

    Args:
        gauges: what is read when it is asked for: its name, what it means, and how.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "phimlx_requests", "HTTP requests answered.", ("path", "status"), registry=own
        )
        self._seconds = Histogram(
            "phimlx_request_seconds", "From the request to its last byte.", ("path",),
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._first = Histogram(
            "phimlx_first_token_seconds", "From the start of a prompt to its reply's first token.",
            ("model",), buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._tokens = Counter(
            "phimlx_tokens",
            "Tokens: of prompts, those of them that were cached, and of replies.",
            ("model", "kind"),
            registry=own,
        )
        self._ended = Counter(
            "phimlx_replies", "Replies by how they ended.", ("model", "finish_reason"),
            registry=own,
        )  # fmt: skip
        for name, (text, read) in gauges.items():
            Gauge(f"phimlx_{name}", text, registry=own).set_function(read)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `path` is that of a route, never a client's words."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_reply(self, model: str, request: Request) -> None:
        """Count a request of the engine that has ended; `model` as the server calls it."""
        stats = request.reply.stats
        self._tokens.labels(model, "prompt").inc(stats.prompt_tokens)
        self._tokens.labels(model, "cached").inc(stats.cached_tokens)
        self._tokens.labels(model, "generated").inc(stats.generated_tokens)
        reason = request.reply.finish_reason if request.error is None else "error"
        self._ended.labels(model, reason).inc()
        if stats.generated_tokens:
            self._first.labels(model).observe(stats.prefill_seconds)

    def text(self) -> bytes:
        """Write everything as Prometheus reads it."""
        return generate_latest(self._registry)
