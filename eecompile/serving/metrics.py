"""Prometheus metrics of a row server."""

from __future__ import annotations

from typing import Any

from eecompile.errors import MissingDependencyError

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        registry: A `prometheus_client.CollectorRegistry`.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as client
        except ImportError as e:
            raise MissingDependencyError("metrics need prometheus-client", hint="pip install 'eecompile[serve]'") from e
        self._client = client
        self.registry: Any = client.CollectorRegistry()

        def made(kind: Any, name: str, about: str, *labels: str, **more: Any) -> Any:
            return kind(f"eecompile_{name}", about, labels, registry=self.registry, **more)

        self.rows = made(client.Counter, "rows", "Rows answered, by exit", "exit")
        self.seconds = made(client.Histogram, "row_seconds", "Time from arrival to answer, by exit", "exit", buckets=SECONDS)
        self.batch_rows = made(client.Histogram, "batch_rows", "Rows of a batch", buckets=ROWS)
        self.waiting = made(client.Gauge, "waiting_rows", "Rows in the queue")
        self.rejected = made(client.Counter, "rejected_rows", "Rows refused because the queue was full")
        self.failed = made(client.Counter, "failed_rows", "Rows whose batch raised")

    def answered(self, exit: str, seconds: float) -> None:
        self.rows.labels(exit).inc()
        self.seconds.labels(exit).observe(seconds)

    def text(self) -> bytes:
        """What a scrape gets."""
        found: bytes = self._client.generate_latest(self.registry)
        return found
