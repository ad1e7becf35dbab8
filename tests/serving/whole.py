"""A server that answers whole batches, to compare with, and bursts of rows that arrive at fixed moments."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import torch

from eecompile.serving import RowServer


class WholeBatches(RowServer):
    """The same server, whose answers wait until the last row of their batch is done."""

    def _stream(self, batch: list[Any]) -> None:
        real = [request.future for request in batch]
        for request in batch:
            request.future = Future()
        kept = [request.future for request in batch]
        try:
            super()._stream(batch)
        finally:
            for request, future in zip(batch, real, strict=True):
                request.future = future
        for mine, future in zip(kept, real, strict=True):
            future.set_result(mine.result())


def burst(server: RowServer, rows: list[dict[str, torch.Tensor]], latencies: list[float]) -> list[Future[Any]]:
    """Submits rows together; each latency is kept when the answer comes."""
    start = time.perf_counter()

    def done(_: Future[Any]) -> None:
        latencies.append(time.perf_counter() - start)

    futures = [server.submit(**row) for row in rows]
    for future in futures:
        future.add_done_callback(done)
    return futures


def paced(server: RowServer, rows: list[dict[str, torch.Tensor]], bursts: int, every: float) -> list[float]:
    """Latencies of all rows, bursts arriving at fixed moments."""
    latencies: list[float] = []
    futures, begun = [], time.perf_counter()
    for k in range(bursts):
        time.sleep(max(0.0, begun + k * every - time.perf_counter()))
        futures += burst(server, rows, latencies)
    for future in futures:
        future.result()
    return latencies
