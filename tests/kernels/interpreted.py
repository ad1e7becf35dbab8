"""The kernels in Triton's interpreter against float64 definitions. Run by `test_interpreter.py`, in a process of
its own, because Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from eecompile.kernels import choose, confidence, gather, halt, head_confidence, open_rows
from eecompile.kernels._lists import COUNTER, control_size
from tests.kernels.interpreting import BUCKETS, DTYPES, INF, NAN, NIGHTLY, close, in_dtypes, launched, logits, seeded

# --- confidence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "C"), [(1, 1), (1, 63), (63, 5), (6, 1023), pytest.param(5, 2100, marks=NIGHTLY)])
def test_confidence(n: int, C: int, dtype: torch.dtype) -> None:
    x = logits(n, C, dtype, strided=True)
    for criterion in ("max_probability", "entropy", "margin", "energy"):
        with launched("confidence"):
            value, state = confidence.launch_confidence(x, None, criterion, torch.tensor(1.7))
        close(value, confidence.confidence(x, None, criterion, torch.tensor(1.7), dtype=torch.float64)[0])
        assert value.dtype == torch.float32
        assert state.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confidence_learned(dtype: torch.dtype) -> None:
    score = torch.tensor([-80.0, -1.0, 0.0, 3.0, 80.0, NAN, INF, -INF], dtype=dtype)[:, None]
    with launched("confidence"):
        value, _ = confidence.launch_confidence(score, None, "learned", torch.tensor(0.5))
    close(value, confidence.confidence(score, None, "learned", torch.tensor(0.5), dtype=torch.float64)[0])
    assert value[5:].isnan().all()


@pytest.mark.parametrize("threshold", [None, 0.5, 2.0])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("dtype", "n", "C"), [(DTYPES[0], 9, 2100), (DTYPES[1], 63, 5), (DTYPES[2], 63, 5)])
def test_confidence_patience(dtype: torch.dtype, n: int, C: int, first: bool, threshold: float | None) -> None:
    x = logits(n, C, dtype)  # the last row ties across column blocks where there are several
    limit = None if threshold is None else torch.tensor(threshold)
    state = None if first else torch.stack((torch.arange(n) % 5, torch.arange(n) % 3), -1)
    with launched("confidence"):
        got = confidence.launch_confidence(x, state, "patience", torch.tensor(3.0), patience=2, threshold=limit)
    wanted = confidence.confidence(x, state, "patience", torch.tensor(1.0), patience=2, threshold=limit, dtype=torch.float64)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("reduce", ["min", "mean", "last"])
def test_confidence_over_positions(reduce: str) -> None:
    x = torch.randn(4, 3, 65)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    for m in (mask, None):
        with launched("confidence"):
            got, _ = confidence.launch_confidence(x, None, "entropy", torch.tensor(1.0), reduce=reduce, mask=m)
        close(
            got,
            confidence.confidence(x, None, "entropy", torch.tensor(1.0), reduce=reduce, mask=m, dtype=torch.float64)[0],
        )


# --- gather and scatter ---------------------------------------------------------------------------


def tensors(n: int) -> tuple[list[torch.Tensor], list[int]]:
    """Seven dtypes, four layouts, three batch axes; widths of one word, odd bytes and past one block."""
    g = seeded(n)
    return [
        torch.randn(n, 5, generator=g),
        torch.randn(3, n, 4, generator=g).half(),
        torch.randint(0, 9, (n,), generator=g),
        torch.rand(2, n, generator=g) > 0.5,
        torch.randn(n, 4102, generator=g).bfloat16(),
        torch.randn(n, 16, generator=g)[:, ::2],
        torch.randn(6, n, generator=g).t(),
        torch.randn(n, 3, generator=g, dtype=torch.complex128),
        torch.randint(0, 99, (2, 3, n), generator=g).to(torch.uint8),
    ], [0, 1, 0, 1, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(("n", "b", "live"), [(1, 1, 1), (63, 8, 5), pytest.param(20, 32, 17, marks=NIGHTLY), (4, 4, 0)])
def test_gather(n: int, b: int, live: int) -> None:
    sources, axes = tensors(n)
    sources[0][0, 0] = -0.0
    sources[0][0, 1] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    positions = torch.full((n,), -1)
    positions[:live] = torch.randperm(n)[:live].sort().values
    shapes = [[b if i == axis else k for i, k in enumerate(s.shape)] for s, axis in zip(sources, axes, strict=True)]
    got = [torch.full(shape, 1, dtype=s.dtype) for s, shape in zip(sources, shapes, strict=True)]
    wanted = [x.clone() for x in got]
    count = torch.tensor([live], dtype=torch.int32)
    with launched("gather"):
        gather.launch_gather(sources, got, positions, count, axes)
    gather.gather(sources, wanted, positions, count, axes)
    for a, w in zip(got, wanted, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("n", "b", "live"), [(1, 1, 1), (8, 63, 5), pytest.param(32, 20, 17, marks=NIGHTLY), (4, 4, 0)])
def test_scatter(n: int, b: int, live: int) -> None:
    sources, axes = tensors(n)
    rows = torch.full((n,), -1)
    rows[:live] = torch.randperm(b)[:live]
    shapes = [[b if i == axis else k for i, k in enumerate(s.shape)] for s, axis in zip(sources, axes, strict=True)]
    got = [torch.full(shape, 1, dtype=s.dtype) for s, shape in zip(sources, shapes, strict=True)]
    wanted = [x.clone() for x in got]
    count = torch.tensor([live], dtype=torch.int32)
    with launched("scatter"):
        gather.launch_scatter(sources, got, rows, count, axes)
    gather.scatter(sources, wanted, rows, count, axes)
    for a, w in zip(got, wanted, strict=True):
        assert torch.equal(a, w)


# --- choose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    in_dtypes([((1, 1), 0), ((2, 7, 1023), 1)], [((63,), 0), ((3, 4100), 0)], dtypes=[*DTYPES, torch.int64, torch.bool]),
)
def test_choose(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    values = [torch.randn(*shape[:-1], shape[-1] * 2).mul(9).to(dtype)[..., ::2] for _ in range(3)]
    n = shape[axis]
    gate, weights = torch.rand(n), torch.rand(n, 3).round()
    gate[-1], gate[0], weights[0, 1] = 0.5, NAN, NAN
    for index in (gate, gate > 0.5, gate.half(), torch.arange(n) % 5 - 1, weights):
        own = values[:2] if index.ndim == 1 and index.dtype != torch.int64 else values
        with launched("choose"):
            got = torch.ops.eecompile.choose(index, own, axis)
        assert torch.equal(got, choose.choose(index, own, axis))


# --- open_rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "capacity"), [(0, 1), (1, 1), (1, 63), (63, 63), (1000, 1023), pytest.param(1400, 1500, marks=NIGHTLY)]
)
def test_open_rows(n: int, capacity: int, kind: str) -> None:
    g = seeded(n)
    decision = torch.rand(2 * capacity, generator=g)[::2].round()
    decision[:: max(capacity // 3, 1)] = NAN
    decision = decision > 0.5 if kind == "bool" else decision.to(getattr(torch, kind))
    count = torch.tensor([n], dtype=torch.int32)
    found = []
    for function in (open_rows.launch_open_rows, open_rows.open_rows):
        positions = torch.full((capacity,), -9)
        control = torch.full((control_size(capacity),), -9, dtype=torch.int32)
        with launched("open_rows") if function is open_rows.launch_open_rows else contextlib.nullcontext():
            function(decision, count, BUCKETS, positions, control)
        found.append((positions, control[:COUNTER]))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    opened = [i for i in range(n) if not (kind != "bool" and float(decision[i]) < 0.5) and (kind != "bool" or decision[i])]
    assert found[0][0][: len(opened)].tolist() == opened


# --- halt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "D", "dtype"), in_dtypes([((1,), ()), ((2, 3), (1023,)), ((4,), (3, 400))], [((63,), (7,))])
)
def test_halt(shape: tuple[int, ...], D: tuple[int, ...], dtype: torch.dtype) -> None:
    g = seeded(3)
    weighted = ledger = exact = book = None
    for step in range(4):
        score = torch.rand(shape, generator=g) * 0.6
        score.view(-1)[0] = NAN
        state = torch.randn(*shape, *D, generator=g).to(dtype)
        if ledger is not None:
            state[ledger[..., 0] >= 1] = NAN  # what has halted must not be read into anything
        with launched("halt"):
            weighted, ledger, running = halt.launch_halt(score, state, weighted, ledger, 0.01, step == 3)
        exact, book, still = halt.halt(score.double(), state.double(), exact, book, 0.01, step == 3)
        torch.testing.assert_close(weighted.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ledger.double(), book, rtol=1e-4, atol=1e-5)
        assert torch.equal(running, still)
    assert not running.any()
    assert weighted.isfinite().all()


# --- head_confidence ------------------------------------------------------------------------------


def eighths(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 8).round() / 8


@pytest.mark.parametrize(
    ("n", "D", "V", "splits", "dtype"),
    in_dtypes([(1, 7, 1, None), (5, 33, 63, 2)], [(20, 65, 300, None), (1, 16, 1023, 3)]),
)
def test_head_confidence(n: int, D: int, V: int, splits: int | None, dtype: torch.dtype) -> None:
    g = seeded(V)
    # Eighths: every sum is exact in float32, in whatever order it is added, so that a tie is a tie on every processor.
    hidden = eighths(n, 2 * D, generator=g).to(dtype)[:, ::2]
    weight = eighths(V, D, generator=g).to(dtype)
    bias = eighths(V, generator=g).to(dtype)
    if V > 60:
        weight[-1], bias[-1] = weight[3], bias[3]
        hidden[0] = weight[3] * 2  # a tie across tiles: the lower class wins
        bias[5] = -INF
    if n > 3:
        hidden[1, 0], hidden[2, 0] = NAN, INF
    for criterion in head_confidence.CRITERIA:
        for b in (None, bias):
            with launched("head_confidence"):
                got = head_confidence.launch_head_confidence(hidden, weight, b, torch.tensor(2.0), criterion, splits)
            wanted = head_confidence.head_confidence(hidden, weight, b, torch.tensor(2.0), criterion, dtype=torch.float64)
            for x, y in zip(got, wanted, strict=True):
                torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    if V > 60:
        assert got[1][0] == 3
