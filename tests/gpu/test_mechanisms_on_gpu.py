"""The mechanisms that the device executor stands on, one by one, in order of risk: `pytest -m gpu`. Never run yet.

Those about graphs run on the CPU too, with the stand-in of the benchmark, which is how they are tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.kernels._lists import ALIVE, control_size
from tests.bench.gpu.platform import Call, Cuda, Platform

DEPTH = 48

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def platform() -> Platform:
    return Cuda()


def test_conditional_nodes_are_there(platform: Platform) -> None:
    """What the package itself thinks."""
    from eecompile.runtime.device.support import support

    found = support(platform.device)
    assert found.way == "graph", found.reason


def numbers_of(platform: Platform, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=platform.device)


def captured(platform: Platform, fill: Callable[[Any], None], warm: Call | None = None) -> Any:
    """A graph. What it will launch is loaded before, by the same few kernels and by `warm`, on the stream of the capture."""
    platform.set_condition(numbers_of(platform, 1), 0, 0)
    platform.set_condition(numbers_of(platform, 1), 0, 0, below=1)
    torch.zeros(4, device=platform.device).add_(1).mul_(2).zero_()
    graph = platform.conditional()
    if warm is not None and platform.device.type == "cuda":
        with torch.cuda.stream(graph.stream):
            warm()
        torch.cuda.synchronize()
    with graph.capture():
        fill(graph)
    return graph


def branch(platform: Platform, graph: Any, numbers: Tensor, element: int, body: Call) -> None:
    handle = graph.handle()
    platform.add(graph, lambda: platform.set_condition(numbers, element, handle))
    graph.if_(handle, body)


def test_if_node(platform: Platform) -> None:
    """A body runs where its condition says, and what comes after it runs always."""
    numbers, y = numbers_of(platform, 0), torch.zeros(4, device=platform.device)

    def fill(graph: Any) -> None:
        platform.add(graph, lambda: y.zero_())
        branch(platform, graph, numbers, 0, lambda: platform.add(graph, lambda: y.add_(10)))
        platform.add(graph, lambda: y.add_(1))

    graph, found = captured(platform, fill), []
    for value in (0, 1, 0, 1, 1):
        numbers.fill_(value)
        graph.replay()
        found.append(float(y[0]))
    assert found == [1, 11, 1, 11, 11], found


def test_nested_ifs(platform: Platform) -> None:
    """As deep as a model has exits, and deeper."""
    numbers, y = numbers_of(platform, *[0] * DEPTH), torch.zeros(1, device=platform.device)

    def level(graph: Any, i: int) -> None:
        platform.add(graph, lambda: y.add_(1))
        if i < DEPTH:
            branch(platform, graph, numbers, i, lambda: level(graph, i + 1))
            platform.add(graph, lambda: y.add_(100))

    graph = captured(platform, lambda graph: level(graph, 0))
    for depth in (0, 1, DEPTH // 2, DEPTH):
        y.zero_()
        numbers.copy_((torch.arange(DEPTH) < depth).int())
        graph.replay()
        want = depth + 1 + 100 * min(depth + 1, DEPTH)
        assert float(y) == want, (depth, float(y), want)


def test_switch_node(platform: Platform) -> None:
    """One body of several; none past the end."""
    numbers, y = numbers_of(platform, 0), torch.zeros(4, device=platform.device)

    def fill(graph: Any) -> None:
        handle = graph.handle()
        platform.add(graph, lambda: y.zero_())
        platform.add(graph, lambda: platform.set_condition(numbers, 0, handle))
        graph.switch(handle, [lambda k=k: platform.add(graph, lambda: y.add_(k + 1)) for k in range(4)])

    graph, found = captured(platform, fill), []
    for value in (0, 1, 2, 3, 4, 1000, 2):
        numbers.fill_(value)
        graph.replay()
        found.append(float(y[0]))
    assert found == [1, 2, 3, 4, 0, 0, 3], found


def test_while_node(platform: Platform) -> None:
    """A loop whose body says when it ends, with a switch inside: the state machine's shape."""
    state, y = numbers_of(platform, 0), torch.zeros(1, device=platform.device)

    def fill(graph: Any) -> None:
        handle = graph.handle(default=1)
        platform.add(graph, lambda: state.zero_())
        platform.add(graph, lambda: y.zero_())

        def body() -> None:
            inner = graph.handle()
            platform.add(graph, lambda: platform.set_condition(state, 0, inner))
            graph.switch(inner, [lambda k=k: platform.add(graph, lambda: y.add_(10**k)) for k in range(3)])
            platform.add(graph, lambda: state.add_(1))
            platform.add(graph, lambda: platform.set_condition(state, 0, handle, below=5))

        graph.while_(handle, body)

    graph, found = captured(platform, fill), []
    for _ in range(3):
        graph.replay()
        found.append(float(y))
    assert found == [111, 111, 111], found


def test_a_decision_sets_its_own_condition(platform: Platform) -> None:
    """The fused kernel: decision, compaction and the condition in one launch, and Triton inside a body."""
    from eecompile.kernels.decide import launch_decide

    device = platform.device
    logits, y = torch.zeros(5, 3, device=device), torch.zeros(1, device=device)
    rows = [torch.zeros(5, dtype=torch.int64, device=device) for _ in range(3)]
    control, count = torch.zeros(control_size(5), dtype=torch.int32, device=device), numbers_of(platform, 5)
    buckets, output = numbers_of(platform, 1, 2, 4, 8), torch.zeros(5, 3, device=device)
    confidence, ones = torch.zeros(5, device=device), torch.ones(2, device=device)
    thresholds = torch.full((1,), 0.5, device=device)

    def decide(handle: int) -> None:
        launch_decide(
            logits, logits, None, count, thresholds, ones, 0, "max_probability", 1, None, buckets, output, rows[0],
            confidence, rows[1], rows[2], control, False, None, None, alive_handle=handle,
        )  # fmt: skip

    decide(0)

    def fill(graph: Any) -> None:
        y.zero_()
        handle = graph.handle()
        decide(handle)

        def body() -> None:
            y.add_(1)
            decide(0)

        graph.if_(handle, body)

    graph = captured(platform, fill)
    for sure, alive in ((0, 5), (5, 0), (2, 3)):
        logits.zero_()
        logits[:sure, 0] = 9.0
        graph.replay()
        assert int(control[ALIVE]) in (alive, int(alive > 0)), (sure, control[:3].tolist())
        assert float(y) == float(alive > 0), (sure, float(y))


def test_a_model_in_a_body(platform: Platform) -> None:
    """cuBLAS, attention and allocations inside bodies; their memory is the graph's own, whatever runs between replays."""
    device, dtype, width = platform.device, torch.bfloat16, 256
    torch.manual_seed(0)
    w = [torch.randn(width, width, device=device, dtype=dtype) * 0.05 for _ in range(4)]
    x = torch.randn(128, width, device=device, dtype=dtype)
    y, numbers, pointers = torch.empty_like(x), numbers_of(platform, 1), []

    def block(x: Tensor, m: int) -> Tensor:
        q = (F.layer_norm(x, (width,)) @ w[m]).view(16, 8, 4, 64).transpose(1, 2)
        t = F.gelu(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(128, width) @ w[m + 1])
        pointers.append(t.data_ptr())
        return x + t

    with torch.no_grad():
        first = block(x, 0)
        second = block(first, 2)

        def fill(graph: Any) -> None:
            platform.add(graph, lambda: y.copy_(block(x, 0)))
            branch(platform, graph, numbers, 0, lambda: platform.add(graph, lambda: y.copy_(block(y, 2))))

        graph = captured(platform, fill, lambda: block(block(x, 0), 2))
        del pointers[:-2]  # those of the capture are the last
        junk = [torch.full((1 << 18,), float("nan"), device=device) for _ in range(64)]
        for i in range(20):
            numbers.fill_(i % 2)
            w[0] @ w[1]
            graph.replay()
            torch.testing.assert_close(y, second if i % 2 else first, atol=2e-2, rtol=2e-2)
    del junk
    if device.type != "cuda":
        return
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", ())) == tuple(graph.pool)]
    inside = [any(s["address"] <= p < s["address"] + s["total_size"] for s in segments) for p in pointers]
    assert all(inside), inside


def test_replays_queue_without_the_host(platform: Platform) -> None:
    """Ten replays after a long kernel, each of which changes what the next one decides."""
    numbers, y = numbers_of(platform, 1), torch.zeros(1, device=platform.device)

    def fill(graph: Any) -> None:
        branch(platform, graph, numbers, 0, lambda: platform.add(graph, lambda: y.add_(1)))
        platform.add(graph, lambda: numbers.mul_(-1).add_(1))

    graph = captured(platform, fill)
    cuda = platform.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(1_000_000_000)
    began = time.perf_counter()
    for _ in range(10):
        graph.replay()
    each = (time.perf_counter() - began) / 10
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    assert float(y) == 5, float(y)
    assert each < 0.02, f"{each:.3f} s for a launch: something waited"
