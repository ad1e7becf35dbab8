"""What a call of the device executor asks of the host, and that it lasts: `pytest -m gpu`. Never run yet."""

from __future__ import annotations

import random
import time

import pytest
import torch

from eecompile.errors import EecompileError
from eecompile.kernels.condition import launch_condition
from eecompile.runtime.device.graphs import CAPTURING, ConditionalGraph
from tests.gpu.test_zoo_on_gpu import compiled, inputs, run
from tests.support import executor, random_thresholds, same_result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def bert():
    fast = compiled("bert")
    args, kwargs = inputs("bert", 6)
    fast.set_thresholds(
        random_thresholds([c.cpu() for c in fast.observe(*args, **kwargs).confidences[:-1]], random.Random(0))
    )
    fast.executor = "device"
    with torch.no_grad():
        fast(*args, **kwargs)  # captures
    return fast, args, kwargs


def test_a_call_synchronises_nothing(bert):
    fast, args, kwargs = bert
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            fast(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_trace_has_no_copy_to_the_host(bert):
    fast, args, kwargs = bert
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as trace, torch.no_grad():
        fast(*args, **kwargs)
    names = [e.name for e in trace.events()]
    assert [n for n in names if "cudaGraphLaunch" in n], "the trace has seen nothing"
    assert not [n for n in names if "DtoH" in n or n in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")]


def test_a_call_behind_a_long_kernel_returns_at_once(bert):
    fast, args, kwargs = bert
    torch.cuda.synchronize()
    slept = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept.record()
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(5):
            fast(*args, **kwargs)
    assert time.perf_counter() - start < 0.2
    assert not slept.query(), "the sleep was over, so nothing was proved"
    torch.cuda.synchronize()


def test_ten_thousand_calls_drift_and_leak_nothing(bert):
    fast, _, _ = bert
    made = [inputs("bert", 6, seed=s) for s in range(4)]
    rng = random.Random(1)
    thresholds = [[rng.random() for _ in fast.exits] for _ in range(4)]
    want = {}
    for i, (args, kwargs) in enumerate(made):
        for j, t in enumerate(thresholds):
            fast.set_thresholds(t)
            want[i, j] = run(fast, "device", args, kwargs)
    before = torch.cuda.memory_allocated()
    for k in range(10_000):
        i, j = k % 4, k // 50 % 4
        if k % 50 == 0:
            fast.set_thresholds(thresholds[j])
        with torch.no_grad():
            got = fast(*made[i][0], **made[i][1])
        if k % 997 == 0:
            assert torch.equal(fast.prediction_of(got), fast.prediction_of(want[i, j].output))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_streams_have_programs_of_their_own(bert):
    fast, _, _ = bert
    made = [inputs("bert", 6, seed=s) for s in range(3)]
    want = [run(fast, "reference", *m) for m in made]
    streams = [torch.cuda.Stream() for _ in made]
    got = []
    for stream, (args, kwargs) in zip(streams, made, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            got.append(fast(*args, **kwargs))
    torch.cuda.synchronize()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(fast.prediction_of(g), fast.prediction_of(w.output), atol=1e-4, rtol=1e-3)


def broken(what):
    if what == "an error of the caller":
        raise ZeroDivisionError
    if what == "a value for the host":
        torch.zeros(1, device="cuda").item()
    # and "nothing at all" puts nothing into the body


@pytest.mark.parametrize("what", ["an error of the caller", "a value for the host", "nothing at all"])
def test_an_error_inside_a_body_leaves_torch_usable(bert, what):
    fast, args, kwargs = bert
    numbers = torch.ones(1, dtype=torch.int32, device="cuda")
    total = torch.zeros(1, device="cuda")
    launch_condition(numbers, 0, 0)
    total.add_(1)

    def captured(body):
        graph = ConditionalGraph(torch.device("cuda", 0))
        with CAPTURING, graph.capture():
            handle = graph.handle()
            launch_condition(numbers, 0, handle)
            graph.if_(handle, body)
        return graph

    with pytest.raises((ZeroDivisionError, RuntimeError, EecompileError)):
        captured(lambda: broken(what))
    total.zero_()
    assert float((total + 1).item()) == 1.0
    again = captured(lambda: total.add_(1))
    for _ in range(3):
        again.replay()
    assert float(total) == 3.0
    same_result(run(fast, "device", args, kwargs), run(fast, "reference", args, kwargs))
    fast.device_options = fast.device_options  # drops what was captured
    same_result(run(fast, "device", args, kwargs), run(fast, "reference", args, kwargs))


def test_results_belong_to_the_caller(bert):
    fast, _, _ = bert
    made = [inputs("bert", 6, seed=s) for s in range(4)]
    with executor(fast, "device"), torch.no_grad():
        got = [fast.run(*a, **k) for a, k in made]
    for g, m in zip(got, made, strict=True):
        same_result(g, run(fast, "reference", *m))
