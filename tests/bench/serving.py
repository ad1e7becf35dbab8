"""A server of rows under a forced mix of 50/25/25, against the same server that answers a batch when all of it is done.

Bursts of 32 rows arrive at the same moments for both, so both answer equally many; what differs is when each row's answer is
there. Half of the rows leave at a quarter of the cost, a quarter at a half, a quarter at the model's own end.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from statistics import median
from typing import Any

import torch

from eecompile.measuring import Bystanders, summary
from eecompile.serving import RowServer
from eecompile.strategies import Branchy
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, Target
from tests.serving.whole import WholeBatches, burst, paced

LEAVING, ROWS = (16, 8), 32
EXITS = (0.25, 0.5)  # of the cost
BURSTS, LOAD = 12, 0.75  # bursts of a round, and the share of the time that the server is busy
CLIENTS = 4  # bursts that are under way at once where throughput is measured


def throughput(server: RowServer, rows: list[dict[str, torch.Tensor]], bursts: int) -> float:
    """Rows a second with some bursts always under way."""
    latencies: list[float] = []
    begun = time.perf_counter()
    waiting: list[list[Future[Any]]] = []
    for _ in range(bursts):
        if len(waiting) == CLIENTS:
            for future in waiting.pop(0):
                future.result()
        waiting.append(burst(server, rows, latencies))
    for futures in waiting:
        for future in futures:
            future.result()
    return bursts * len(rows) / (time.perf_counter() - begun)


def run(context: Context) -> list[Figure]:
    made = models.resnet(ROWS, Branchy(exits=EXITS), context.device)
    models.spread_out(made, 2.0)
    models.force_mix(made, LEAVING)
    rows = [{name: t[i : i + 1] for name, t in made.inputs.items()} for i in range(ROWS)]
    bursts = 2 if context.small else BURSTS
    options: dict[str, Any] = {"max_batch": ROWS, "max_wait_ms": 50.0}
    with RowServer(made.fast, **options) as by_row, WholeBatches(made.fast, **options) as whole:
        servers = {"each row at its exit": by_row, "whole batches": whole}
        for server in servers.values():
            paced(server, rows, 1, 0.0)
        once = median(max(paced(whole, rows, 1, 0.0)) for _ in range(3))
        ratios, speeds, shares = [], [], []
        p50s: dict[str, list[float]] = {name: [] for name in servers}
        for i in range(context.rounds):
            bystanders = Bystanders()
            order = list(servers) if i % 2 else list(reversed(servers))
            now = {name: median(paced(servers[name], rows, bursts, once / LOAD)) for name in order}
            rate = {name: throughput(servers[name], rows, bursts) for name in order}
            for name, value in now.items():
                p50s[name].append(value)
            ratios.append(now["each row at its exit"] / now["whole batches"])
            speeds.append(rate["each row at its exit"] / rate["whole batches"])
            shares.append(bystanders.share())
    value, spread = summary(ratios)
    known = [share for share in shares if share is not None]
    shared: dict[str, Any] = {"rounds": context.rounds, "others": median(known) if known else None}
    latency = Figure("p50 of a row", value, "x the p50 of whole batches", spread, target=Target(0.7), **shared)
    latency.medians_ms = {name: 1e3 * median(found) for name, found in p50s.items()}
    latency.spreads_ms = {name: 1e3 * summary(found)[1] for name, found in p50s.items()}
    latency.detail = {"exits": EXITS, "leaving": LEAVING, "rows of a burst": ROWS, "load": LOAD}
    if not latency.met:
        latency.cause = "Heads and decisions before the second exit, or a machine that others use."
    value, spread = summary(speeds)
    equal = Figure("throughput", value, "x that of whole batches", spread, target=Target(0.95, "at least"), **shared)
    if not equal.met:
        equal.cause = "Answers are made row by row, and callers are woken while the batch goes on."
    return [latency, equal]
