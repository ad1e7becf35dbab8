"""The decision's kernel and the clock's in Triton's interpreter against float64 definitions; see `interpreted.py`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from eecompile.kernels import clock, confidence, decide
from eecompile.kernels._lists import COUNTER, control_size
from tests.kernels.interpreting import BUCKETS, DTYPES, NAN, NIGHTLY, close, launched, logits, seeded

# --- decide ---------------------------------------------------------------------------------------


def decided(run: Any, criterion: str, n: int, capacity: int, C: int, kind: torch.dtype, **options: Any) -> Any:
    """Every buffer after a decision; they start as NaN or as numbers that are never right."""
    final, identity = options.pop("final", False), options.pop("identity", False)
    threshold = options.pop("threshold", 0.5)
    samples = capacity + 3
    g = seeded(capacity)
    x = logits(capacity, C, kind, strided=True)
    if criterion == "given":
        x = torch.rand(capacity, generator=g)
        x[-1] = NAN
    elif criterion == "learned":
        x = x[:, :1]
    result = torch.randn(capacity, 7, generator=g).to(kind)
    rows = None if identity else torch.randperm(samples, generator=g)[:capacity]
    state = torch.stack((torch.arange(samples) % C, torch.arange(samples) % 3), 1)
    buffers = {
        "output": torch.full((samples, 7), NAN, dtype=kind),
        "exit_index": torch.full((samples,), -7),
        "confidence": torch.full((samples,), NAN),
        "survivors": torch.full((capacity,), -9),
        "positions": torch.full((capacity,), -9),
        "control": torch.zeros(control_size(capacity), dtype=torch.int32),
    }
    run(
        x, result, rows, torch.tensor([n], dtype=torch.int32), torch.tensor([9.0, threshold]),
        torch.tensor([9.0, 1.5, 1.5]), 1, criterion, 2, state if criterion == "patience" else None, BUCKETS,
        *buffers.values(), final=final, **options,
    )  # fmt: skip
    buffers["control"] = buffers["control"][:4]  # after that lies scratch of the kernel
    return {**buffers, "state": state}


@pytest.mark.parametrize("criterion", [*confidence.CRITERIA, "given"])
@pytest.mark.parametrize(
    ("n", "capacity", "C"), [(1, 1, 3), (0, 3, 3), (37, 63, 5), (3, 4, 1023), pytest.param(6, 6, 2100, marks=NIGHTLY)]
)
def test_decide(criterion: str, n: int, capacity: int, C: int) -> None:
    kind = DTYPES[(n + C) % 3]
    for final in (False, True):
        identity = bool(n % 2) != final
        options = {"final": final, "identity": identity}
        with launched("decide"):
            got = decided(decide.launch_decide, criterion, n, capacity, C, kind, **options)
        wanted = decided(decide.decide, criterion, n, capacity, C, kind, dtype=torch.float64, **options)
        for name, tensor in got.items():
            close(tensor, wanted[name])
        assert got["control"][COUNTER] == 0  # ready for the next launch
        if final:
            assert (got["exit_index"] == 1).sum() == n


@pytest.mark.nightly
def test_decide_past_one_block_of_rows() -> None:
    for n in (1023, 1100):
        with launched("decide"):
            got = decided(decide.launch_decide, "max_probability", n, 1100, 3, torch.float32)
        wanted = decided(decide.decide, "max_probability", n, 1100, 3, torch.float32, dtype=torch.float64)
        for name, tensor in got.items():
            close(tensor, wanted[name])
        assert 0 < got["control"][0] < n


def test_decide_closed_exit_leaves_patience_alone() -> None:
    with launched("decide"):
        got = decided(decide.launch_decide, "patience", 9, 9, 5, torch.float32, threshold=1.5)
    wanted = decided(decide.decide, "patience", 9, 9, 5, torch.float32, threshold=1.5)
    assert torch.equal(got["state"], wanted["state"])
    assert got["control"].tolist() == [9, 4, 1, 0]
    assert (got["exit_index"] == -7).all()


def test_decide_nan_is_never_sure_at_threshold_zero() -> None:
    with launched("decide"):
        got = decided(decide.launch_decide, "entropy", 9, 9, 5, torch.float32, threshold=0.0, identity=True)
    # rows 1, 2 and 4 of `logits` hold a NaN, a +inf and nothing but -inf
    assert got["survivors"].tolist() == [1, 2, 4] + [-1] * 6
    assert got["control"].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("criterion", ["max_probability", "patience", "given"])
@pytest.mark.parametrize("n", [0, 9, 37])
@pytest.mark.parametrize("spare", [0, -1, None])
def test_decide_by_a_deadline(criterion: str, n: int, spare: int | None) -> None:
    """`spare` nanoseconds are left when the next stage at the survivors' bucket is done; None: no deadline is set."""
    kind, got, wanted = DTYPES[n % 3], {}, {}
    stay = int(decided(decide.decide, criterion, n, 40, 5, kind)["control"][0])
    predicted = 1000 + 10 * torch.arange(len(BUCKETS))
    limit = clock.NEVER if spare is None else 500 + int(predicted[(stay > BUCKETS).sum()]) + spare
    for run, found, options in ((decide.launch_decide, got, {}), (decide.decide, wanted, {"dtype": torch.float64})):
        times = torch.tensor([10_000, limit, -1, 0, 10_500])  # it began 500 ns ago
        with launched("decide") if run is decide.launch_decide else contextlib.nullcontext():
            found |= decided(run, criterion, n, 40, 5, kind, clock=times, predicted=predicted, **options)
        found["clock"] = times
    for name, tensor in got.items():
        close(tensor, wanted[name])
    stopped = stay > 0 and spare == -1
    assert got["clock"][clock.STOPPED] == (1 if stopped else -1)
    assert got["control"].tolist()[:3] == ([0, len(BUCKETS), 0] if stopped or not stay else [stay, got["control"][1], 1])
    assert (got["exit_index"] == 1).sum() == n - stay  # who left by itself
    assert (~got["output"].isnan()).all(1).sum() == n  # the best so far of every row
    assert got["confidence"].isfinite().sum() == n


@pytest.mark.parametrize("element", [clock.START, clock.END])
def test_clock(element: int) -> None:
    got, wanted = (torch.tensor([1, 2, 3, 4, 5 << 40]) for _ in range(2))
    with launched("clock"):
        clock.launch_tick(got, element)
    clock.tick(wanted, element)
    assert torch.equal(got, wanted)
    assert got[element] == 5 << 40
    assert got[clock.STOPPED] == (-1 if element == clock.START else 3)
