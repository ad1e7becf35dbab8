"""Deadlines of the device executor on a CUDA device: `pytest -m gpu`. Never run yet."""

from __future__ import annotations

import time

import pytest
import torch

from eecompile import eecompile, strategies
from eecompile.kernels.clock import DEADLINE, DEVICE, END, START, STOPPED, launch_tick
from eecompile.kernels.decide import launch_decide
from eecompile.runtime.device.deadline import predictions
from tests.support import executor, same_result
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_gpus_clock_counts_nanoseconds():
    clock = torch.zeros(5, dtype=torch.int64, device="cuda")
    for _ in range(2):  # the first loads the kernel
        torch.cuda.synchronize()
        before = time.perf_counter()
        launch_tick(clock, START, DEVICE)
        torch.cuda._sleep(100_000_000)
        launch_tick(clock, END, DEVICE)
        torch.cuda.synchronize()
        passed = time.perf_counter() - before
    values = clock.tolist()
    assert (values[END] - values[START]) / 1e9 == pytest.approx(passed, rel=0.05)
    assert values[STOPPED] == -1


@pytest.mark.parametrize(("until", "stopped"), [(60_000_000_000, False), (5_000_000, True)])
def test_a_decision_stops_by_the_gpus_clock(until, stopped):
    """5,000 rows are decided by several blocks, of which one reads the clock."""
    n = 5000
    clock = torch.zeros(5, dtype=torch.int64, device="cuda")
    launch_tick(clock, START, DEVICE)
    torch.cuda._sleep(100_000_000)
    clock[DEADLINE] = until
    logits = torch.randn(n, 10, device="cuda")
    control = torch.zeros(n + 4, dtype=torch.int32, device="cuda")
    lists = [torch.zeros(n, dtype=torch.int64, device="cuda") for _ in range(3)]
    output, confidence = torch.zeros_like(logits), torch.zeros(n, device="cuda")
    i32 = [torch.tensor(v, dtype=torch.int32, device="cuda") for v in ([n], [64, 8192])]
    launch_decide(
        logits, logits, None, i32[0], torch.ones(1, device="cuda"), torch.ones(2, device="cuda"), 0, "entropy", 1, None,
        i32[1], output, lists[0], confidence, lists[1], lists[2], control, False, clock,
        torch.tensor([1, 1], device="cuda"), DEVICE,
    )  # fmt: skip
    assert control[:3].tolist() == ([0, 2, 0] if stopped else [n, 1, 1])
    assert int(clock[STOPPED]) == (0 if stopped else -1)
    assert torch.equal(output, logits)  # the best so far


@pytest.fixture(scope="module")
def bert():
    entry = ZOO["bert"]
    kwargs = {k: v.cuda() for k, v in entry.inputs(6)[1].items()}
    fast = eecompile(entry.model().cuda(), strategies.Branchy(exits=3, threshold=1.0), example_kwargs=kwargs)
    fast.executor = "device"
    with torch.no_grad():
        fast.measure_stages(**kwargs, rounds=2)
        fast(**kwargs, deadline_ms=1e6)  # captures
    return fast, kwargs


def test_stages_are_timed_in_every_bucket(bert):
    fast, kwargs = bert
    found = fast.engine.chosen
    program, _ = found._program_for(found._current, fast.program.signature.flatten((), kwargs), None, True)
    table = predictions(program, fast.stage_times)
    assert table.shape == (3, 4)
    assert ((table > 1_000) & (table < 100_000_000)).all()


def test_a_deadline_stops_where_the_reference_says(bert):
    fast, kwargs = bert
    with torch.no_grad():
        none, all_of_it = (fast.run(**kwargs, deadline_ms=d) for d in (0, 1e6))
        with executor(fast, "reference"):
            first = fast.run(**kwargs, budget=float(fast.costs([True] * 3)[0]))
            last = fast.run(**kwargs)
    same_result(none, first)
    same_result(all_of_it, last)
    assert (none.stopped, none.late, bool(none.final.any())) == ("deadline", True, False)
    assert (all_of_it.stopped, all_of_it.late) == (None, False)


def test_a_call_with_a_deadline_waits_for_nothing(bert):
    fast, kwargs = bert
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for deadline in (0.1, 5.0, 1e6):
                fast(**kwargs, deadline_ms=deadline)
    finally:
        torch.cuda.set_sync_debug_mode("default")
