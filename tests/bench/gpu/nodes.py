"""What a conditional node costs: chains of nodes in one graph, against the chain of kernels that they hold.

A node's condition is set by a kernel before it, as in a device program; "set" is that kernel alone. `k` adds one to a
number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eecompile.measuring import summary
from tests.bench.gpu.cases import Found, Setting
from tests.bench.gpu.platform import Call
from tests.bench.record import Figure

CHAIN = 64
BODIES = 8  # of a SWITCH


def run(setting: Setting, found: Found, chain: int = CHAIN) -> None:
    """Microseconds per node, and that each chain did what its conditions say."""
    platform = setting.platform
    y = torch.zeros(1, device=platform.device)
    numbers = torch.tensor([0, 1, 3, chain], dtype=torch.int32, device=platform.device)
    rounds = torch.zeros(1, dtype=torch.int32, device=platform.device)
    k: Call = lambda: y.add_(1)  # noqa: E731

    def conditional(graph: Any, element: int, kind: str, body: Call) -> None:
        handle = graph.handle()
        platform.add(graph, lambda: platform.set_condition(numbers, element, handle))
        if kind == "if":
            graph.if_(handle, body)
        else:
            graph.switch(handle, [body] * BODIES)

    def nested(graph: Any, depth: int, element: int) -> None:
        platform.add(graph, k)
        if depth:
            conditional(graph, element, "if", lambda: nested(graph, depth - 1, element))

    def loop(graph: Any) -> None:
        handle = graph.handle(default=1)
        platform.add(graph, lambda: rounds.zero_())

        def body() -> None:
            platform.add(graph, k)
            platform.add(graph, lambda: rounds.add_(1))
            platform.add(graph, lambda: platform.set_condition(rounds, 0, handle, below=chain))

        graph.while_(handle, body)

    def each(what: Callable[[Any], None]) -> Callable[[Any], None]:
        def fill(graph: Any) -> None:
            for _ in range(chain):
                what(graph)

        return fill

    def added(graph: Any) -> None:
        platform.add(graph, k)

    def after_k(element: int, kind: str) -> Callable[[Any], None]:
        return lambda graph: conditional(graph, element, kind, lambda: added(graph))

    def set_only(graph: Any) -> None:
        # A handle needs a node that it belongs to: the condition of one IF is set again and again.
        handle = graph.handle()
        for _ in range(chain):
            platform.add(graph, lambda: platform.set_condition(numbers, 1, handle))
        graph.if_(handle, lambda: added(graph))

    # name: what to capture, and what a replay adds to y
    chains: dict[str, tuple[Callable[[Any], None], int]] = {
        "k": (each(added), chain),
        "set": (set_only, 1),
        "set, IF taken, k": (each(after_k(1, "if")), chain),
        "set, IF not taken": (each(after_k(0, "if")), 0),
        "set, SWITCH of 8, k": (each(after_k(2, "switch")), chain),
        "nested IFs, all taken": (lambda graph: nested(graph, chain, 1), chain + 1),
        "nested IFs, first not taken": (lambda graph: nested(graph, chain, 0), 1),
        "WHILE: round of k, count, set": (loop, chain),
    }
    for _ in range(2):  # loads the kernels
        k()
        platform.set_condition(numbers, 1, 0)
        platform.set_condition(rounds, 0, 0, below=chain)
    replays: dict[str, Call] = {}
    for name, (fill, wanted) in chains.items():
        with found.trying(f"nodes: {name}"):
            graph = platform.conditional()
            with graph.capture():
                fill(graph)
            y.zero_()
            graph.replay()
            assert float(y) == wanted, f"a replay added {float(y):g}, wanted {wanted}"
            replays[name] = lambda graph=graph: graph.replay()
    times = platform.measure(replays, setting.rounds).times
    for name, seconds in times.items():
        value, spread = summary([1e6 * s / chain for s in seconds])
        found.add(Figure(f"per node: {name}", value, "us", spread, len(seconds), detail={"nodes in a chain": chain}))
