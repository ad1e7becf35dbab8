"""`select`, `blank`, `choose` and `halt`: meaning, bits, gradients, and use as operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import ops
from eecompile.errors import StrategyError

NAN = math.nan
OPS = torch.ops.eecompile


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


# --- select ---------------------------------------------------------------------------------------


def test_select_takes_the_first_exit_that_is_sure() -> None:
    outputs = [torch.full((5, 2), float(k)) for k in range(3)]
    confidences = [
        torch.tensor([0.9, 0.1, 0.1, NAN, NAN]),
        torch.tensor([0.9, 0.5, 0.1, 0.9, NAN]),
        torch.tensor([0.3, 0.3, 0.3, 0.3, NAN]),
    ]
    thresholds = torch.tensor([0.9, 0.5])
    for function in (ops.select, OPS.select):
        output, index, value = function(outputs, confidences, thresholds)
        assert output[:, 0].tolist() == [0, 1, 2, 1, 2]
        assert index.tolist() == [0, 1, 2, 1, 2]
        assert value.tolist() == pytest.approx([0.9, 0.5, 0.3, 0.9, 0.0])
        assert (index.dtype, value.dtype) == (torch.int64, torch.float32)


def test_select_nan_never_wins_at_threshold_zero_and_above_one_is_closed() -> None:
    outputs = [torch.zeros(2, 1), torch.ones(2, 1)]
    confidences = [torch.tensor([NAN, 0.0]), torch.zeros(2)]
    assert ops.select(outputs, confidences, torch.zeros(1))[1].tolist() == [1, 0]
    confidences = [torch.ones(2), torch.zeros(2)]
    assert ops.select(outputs, confidences, torch.tensor([1.0]))[1].tolist() == [0, 0]
    assert ops.select(outputs, confidences, torch.tensor([1.01]))[1].tolist() == [1, 1]


def test_select_copies_bits() -> None:
    odd = torch.tensor([[0x7FC12345], [-0x80000000]], dtype=torch.int32).view(torch.float32)
    noise = torch.full((2, 1), NAN)
    for sure in (0.0, 1.0):
        outputs = [odd, noise] if sure else [noise, odd]
        output, _, _ = ops.select(outputs, [torch.full((2,), sure)] * 2, torch.tensor([0.5]))
        assert torch.equal(bits(output), bits(odd))


def test_select_without_exits() -> None:
    x, c = torch.randn(3, 2), torch.tensor([0.5, NAN, 1.0])
    output, index, value = ops.select([x], [c], torch.zeros(0))
    assert output is x  # the definition copies nothing
    assert (index.tolist(), value.tolist()) == ([0, 0, 0], [0.5, 0.0, 1.0])
    assert OPS.select([x], [c], torch.zeros(0))[0].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool])
def test_select_any_dtype_and_rank(dtype: torch.dtype) -> None:
    outputs = [torch.full((2, 1, 3), k, dtype=dtype) for k in (0, 1)]
    output, _, _ = ops.select(outputs, [torch.tensor([1.0, 0.0]), torch.zeros(2)], torch.tensor([0.5]))
    assert output.dtype == dtype
    assert output[:, 0, 0].tolist() == [0, 1]


def test_select_gradient() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, requires_grad=True)

    outputs, confidences = [leaf(4, 2) for _ in range(3)], [leaf(4) for _ in range(3)]
    thresholds = torch.tensor([0.5, 0.5], dtype=torch.float64)
    inputs = (*outputs, *confidences)
    assert torch.autograd.gradcheck(lambda *x: ops.select(x[:3], x[3:], thresholds)[0], inputs)
    value = ops.select(outputs, confidences, thresholds)[2]
    grads = torch.autograd.grad(value.sum(), confidences)
    assert torch.equal(sum(grads), torch.ones(4, dtype=torch.float64))  # to the exit that was taken, all of it
    for function in (OPS.select, ops.select):
        o, _, v = function(outputs, confidences, thresholds.float())
        found = torch.autograd.grad(o.sum() * 2 + v.sum(), inputs)
        if function is OPS.select:
            first = found
    torch.testing.assert_close(first, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], torch.zeros(0)), "one confidence per output"),
        (([torch.zeros(2)], [torch.zeros(2)], torch.zeros(1)), "one threshold per exit"),
        (([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2)] * 2, torch.zeros(1)), "exit 0"),
    ],
)
def test_select_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        ops.select(*arguments)


# --- blank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("axis", [0, 1])
def test_blank_rows(dtype: torch.dtype, axis: int) -> None:
    leaf = torch.ones(3, 3, dtype=dtype)
    if dtype.is_floating_point:
        leaf[0, 2], leaf[2, 2] = -0.0, -0.0
    for function in (ops.blank, OPS.blank):
        rows = function(leaf, torch.tensor([0, 1, 2]), 2, axis).movedim(axis, 0)
        assert torch.equal(bits(rows[2]), bits(leaf.movedim(axis, 0)[2]))
        blanked = rows[:2]
        assert blanked.isnan().all() if dtype.is_floating_point or dtype.is_complex else not blanked.any()
        assert rows.dtype == dtype


def test_blank_without_a_batch() -> None:
    leaf = torch.ones(2)
    assert torch.equal(ops.blank(leaf, torch.tensor([0, 2]), 2, -1), leaf)
    assert ops.blank(leaf, torch.tensor([0, 1]), 2, -1).isnan().all()
    with pytest.raises(StrategyError, match="batch where it should"):
        ops.blank(torch.ones(3, 2), torch.tensor([0, 1]), 1, 0)


# --- choose ---------------------------------------------------------------------------------------

WEIGHTS = [[1, 1, 0], [0, 2, 2], [NAN, 0, 1], [NAN, NAN, NAN], [-3, -2, -1.0]]


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (torch.tensor([0, 1, 2, -4, 9]), [0, 1, 2, 0, 2]),
        (torch.tensor(WEIGHTS), [0, 1, 2, 0, 2]),
        (torch.tensor([0.49, 0.5, 1.0, NAN, 0.0]), [0, 1, 1, 1, 0]),
        (torch.tensor([True, False, True, False, True]), [1, 0, 1, 0, 1]),
    ],
    ids=["index", "weights", "scores", "bool"],
)
def test_choose(index: Tensor, wanted: list[int]) -> None:
    values = [torch.full((2, 5), float(k)) for k in range(max(wanted) + 1)]
    values[0][1] = NAN  # a value that is not taken goes nowhere
    for function in (ops.choose, OPS.choose):
        picked = function(index, values, 1)
        assert picked[0].tolist() == wanted
        assert picked[1].isnan().tolist() == [k == 0 for k in wanted]


def test_choose_from_one_value() -> None:
    value = torch.ones(2, 3)
    assert ops.choose(torch.zeros(2).long(), [value]) is value
    assert OPS.choose(torch.zeros(2).long(), [value], 0).data_ptr() != value.data_ptr()


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (torch.zeros(4).long(), [torch.ones(5)] * 3, "index does not fit"),
        (torch.zeros(5), [torch.ones(5)] * 3, "index does not fit"),
        (torch.zeros(5) > 0, [torch.ones(5)], "index does not fit"),
        (torch.zeros(5, 2), [torch.ones(5)] * 3, "index does not fit"),
        (torch.zeros(5), [torch.ones(5), torch.ones(5).half()], "value 1"),
        (torch.zeros(5).long(), [], "nothing to choose"),
    ],
)
def test_choose_refusals(index: Tensor, values: list[Tensor], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        ops.choose(index, values)


def test_choose_gradient_is_straight_through() -> None:
    gate = torch.tensor([0.2, 0.7], requires_grad=True)
    y, x = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    upstream = torch.randn(3, 2)
    to_gate, to_y, to_x = torch.autograd.grad(OPS.choose(gate, [x, y], 1), (gate, y, x), upstream)
    blend = torch.autograd.grad(gate * y + (1 - gate) * x, gate, upstream)[0]
    torch.testing.assert_close(to_gate, blend)
    opened = torch.tensor([0.0, 1.0])
    assert torch.equal(to_y, upstream * opened)
    assert torch.equal(to_x, upstream * (1 - opened))
    weights = torch.tensor([[0.2, 0.8], [0.9, 0.1]], requires_grad=True)
    branches = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    upstream = torch.randn(2, 3)
    to_w, *to_b = torch.autograd.grad(OPS.choose(weights, branches, 0), (weights, *branches), upstream)
    blend = weights[:, :1] * branches[0] + weights[:, 1:] * branches[1]
    torch.testing.assert_close(to_w, torch.autograd.grad(blend, weights, upstream)[0])
    assert torch.equal(to_b[0], upstream * torch.tensor([[0.0], [1.0]]))
    assert torch.equal(to_b[0] + to_b[1], upstream)


# --- halt -----------------------------------------------------------------------------------------


def test_halt_by_hand() -> None:
    """Graves' N, R and weighted state for scores that halt at the second, the third (forced) and the first step."""
    scores = [torch.tensor([0.6, 0.1, 0.995]), torch.tensor([0.6, NAN, 0.5]), torch.tensor([0.1, 0.2, 0.5])]
    weighted = ledger = None
    for step, score in enumerate(scores):
        state = torch.full((3, 2), 10.0**step)
        if step == 2:
            state[0] = state[2] = NAN  # what has halted is not read
        weighted, ledger, running = ops.halt(score, state, weighted, ledger, 0.01, step == 2)
    assert weighted[:, 0].tolist() == pytest.approx([0.6 + 4, 0.1 + 0 + 90, 1.0])
    assert ledger[:, 0].tolist() == [1, 1, 1]
    assert ledger[:, 1].tolist() == [2, 3, 1]
    assert ledger[:, 2].tolist() == pytest.approx([2.4, 3.9, 2.0])
    assert not running.any()


def test_halt_gradient() -> None:
    scores = torch.rand(3, 4, 2, dtype=torch.float64).mul(0.6).requires_grad_()
    states = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(function: Any, scores: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        weighted = ledger = None
        for t in range(3):
            weighted, ledger, _ = function(scores[t], states[t], weighted, ledger, 0.01, t == 2)
        return weighted, ledger[..., 2]

    assert torch.autograd.gradcheck(lambda *x: run(ops.halt, *x), (scores, states))
    pairs = [torch.autograd.grad([v.sum() for v in run(f, scores, states)], (scores, states)) for f in (ops.halt, OPS.halt)]
    torch.testing.assert_close(*pairs)
    with pytest.raises(StrategyError, match="halting score does not fit"):
        ops.halt(torch.zeros(3), torch.zeros(4, 3), None, None)


# --- as operators ---------------------------------------------------------------------------------


def samples() -> dict[str, tuple[Any, ...]]:
    x = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    c = [torch.rand(4, requires_grad=True) for _ in range(3)]
    i32 = torch.tensor([3], dtype=torch.int32)
    rows, buckets = torch.arange(4), torch.tensor([1, 2, 4], dtype=torch.int32)

    def lists() -> tuple[Tensor, ...]:
        return torch.zeros(4).long(), torch.zeros(4).long(), torch.zeros(8, dtype=torch.int32)

    return {
        "select": (x, c, torch.tensor([0.5, 0.5])),
        "blank": (x[0], torch.arange(4) + 2, 2, 0),
        "choose": (torch.rand(4, 3, requires_grad=True), x, 0),
        "halt": (c[0], x[0], None, None),
        "decide": (
            torch.randn(4, 3), torch.randn(4, 3), None, i32, torch.tensor([0.5]), torch.ones(2), 0, "margin", 1,
            None, buckets, torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(4), *lists(), False, torch.arange(5),
            torch.arange(3),
        ),
        "tick": (torch.arange(5), 0),
        "gather": ([torch.randn(4, 3)], [torch.zeros(8, 3)], rows, i32, [0]),
        "scatter": ([torch.randn(4, 3)], [torch.zeros(8, 3)], rows, i32, [0]),
        "open_rows": (c[0], i32, buckets, torch.zeros(4).long(), torch.zeros(8, dtype=torch.int32)),
        "head_confidence": (torch.randn(4, 3), torch.randn(9, 3), None, torch.ones(())),
    }  # fmt: skip


@pytest.mark.parametrize("name", samples())
def test_operator(name: str) -> None:
    """Schema, fake, autograd registration, and the same answer under AOT autograd with free shapes."""
    torch.library.opcheck(getattr(OPS, name).default, samples()[name])


@pytest.mark.parametrize("name", ["decide", "tick", "gather", "scatter", "open_rows", "head_confidence"])
def test_executors_operators_need_no_value_on_the_host(name: str) -> None:
    """Their definitions too: under fake tensors a value that is read on the host raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    with FakeTensorMode() as mode:
        arguments = pytree.tree_map_only(Tensor, lambda x: mode.from_tensor(x.detach()), samples()[name])
        getattr(ops, name)(*arguments)
