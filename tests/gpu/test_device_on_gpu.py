"""The device executor on a CUDA device: `pytest -m gpu`. Never run yet; on a machine without a GPU nothing here is collected
for `make test`.
"""

from __future__ import annotations

import random
import time

import pytest
import torch

from eecompile import eecompile, strategies
from eecompile.runtime.device.executor import Options
from tests.support import executor, random_thresholds
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEAR = 1e-3  # a confidence this close to its threshold may fall on either side in half precision


def on_gpu(value):
    if isinstance(value, dict):
        return {k: on_gpu(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(on_gpu(v) for v in value)
    return value.cuda() if isinstance(value, torch.Tensor) else value


def in_dtype(value, dtype):
    if isinstance(value, dict):
        return {k: in_dtype(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(in_dtype(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compiled(name: str, dtype: torch.dtype = torch.float32, batch: int = 6):
    entry = ZOO[name]
    args, kwargs = in_dtype(on_gpu(entry.inputs(batch)), dtype)
    fast = eecompile(
        entry.model().to("cuda", dtype), strategies.Branchy(exits=entry.exits, criterion="entropy"),
        example_inputs=args, example_kwargs=kwargs, **entry.options,
    )  # fmt: skip
    return entry, fast


def inputs(entry, batch: int, dtype: torch.dtype = torch.float32, seed: int = 1):
    return in_dtype(on_gpu(entry.inputs(batch, seed=seed)), dtype)


def run(fast, name: str, args, kwargs):
    with torch.no_grad(), executor(fast, name):
        return fast.run(*args, **kwargs)


@pytest.mark.parametrize("structure", ["nested", "machine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_device_agrees_with_the_reference(name, dtype, structure):
    entry, fast = compiled(name, dtype)
    fast.device_options = Options(structure=structure)
    for batch in (1, 7):
        args, kwargs = inputs(entry, batch, dtype)
        confidences = [c.cpu() for c in fast.observe(*args, **kwargs).confidences[:-1]]
        thresholds = random_thresholds(confidences, random.Random(batch), closed=0.0)
        fast.set_thresholds(thresholds)
        got, want = run(fast, "device", args, kwargs), run(fast, "reference", args, kwargs)
        near = torch.zeros(batch, dtype=torch.bool)
        for c, t in zip(confidences, thresholds, strict=True):
            near |= (c - t).abs() < NEAR
        assert torch.equal(got.exit_index.cpu()[~near], want.exit_index.cpu()[~near])
        a, b = fast.prediction_of(got.output).float().cpu(), fast.prediction_of(want.output).float().cpu()
        same = got.exit_index.cpu() == want.exit_index.cpu()
        torch.testing.assert_close(a[same], b[same], atol=1e-4 if dtype == torch.float32 else 5e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def bert():
    entry, fast = compiled("bert")
    args, kwargs = inputs(entry, 6)
    fast.set_thresholds(
        random_thresholds([c.cpu() for c in fast.observe(*args, **kwargs).confidences[:-1]], random.Random(0))
    )
    fast.executor = "device"
    with torch.no_grad():
        fast(*args, **kwargs)  # captures
    return entry, fast, args, kwargs


def test_a_call_synchronises_nothing(bert):
    _, fast, args, kwargs = bert
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            fast(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_trace_has_no_copy_to_the_host(bert):
    _, fast, args, kwargs = bert
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as trace, torch.no_grad():
        fast(*args, **kwargs)
    names = [e.name for e in trace.events()]
    assert not [n for n in names if "DtoH" in n or n in ("cudaStreamSynchronize", "cudaEventSynchronize")]


def test_a_call_behind_a_long_kernel_returns_at_once(bert):
    _, fast, args, kwargs = bert
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(5):
            fast(*args, **kwargs)
    assert time.perf_counter() - start < 0.2
    torch.cuda.synchronize()


def test_ten_thousand_calls_drift_and_leak_nothing(bert):
    entry, fast, _, _ = bert
    made = [inputs(entry, 6, seed=s) for s in range(4)]
    rng = random.Random(1)
    thresholds = [[rng.random() for _ in fast.exits] for _ in range(4)]
    want = {}
    for i, (args, kwargs) in enumerate(made):
        for j, t in enumerate(thresholds):
            fast.set_thresholds(t)
            want[i, j] = run(fast, "device", args, kwargs)
    before = torch.cuda.memory_allocated()
    for k in range(10_000):
        i, j = k % 4, k // 2500
        if k % 2500 == 0:
            fast.set_thresholds(thresholds[j])
        with torch.no_grad():
            got = fast(*made[i][0], **made[i][1])
        if k % 997 == 0:
            assert torch.equal(fast.prediction_of(got), fast.prediction_of(want[i, j].output))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_streams_have_programs_of_their_own(bert):
    entry, fast, _, _ = bert
    made = [inputs(entry, 6, seed=s) for s in range(3)]
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
