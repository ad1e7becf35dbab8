"""`confidence`: formulas in float64, ties, NaN, masks, patience, gradients, and use under FX, export, compile."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import eecompile.criteria as options
from eecompile.errors import StrategyError
from eecompile.kernels.confidence import CRITERIA, REDUCTIONS, confidence, run_confidence
from eecompile.ops import confidence as exported
from tests.support import nightly

NAN, INF = math.nan, math.inf
OP = torch.ops.eecompile.confidence
STATELESS = ["max_probability", "entropy", "margin", "energy"]
ONE = torch.tensor(1.0)


def formula(criterion: str, row: list[float]) -> float:
    """Straight from the docstring, in Python floats."""
    C, top = len(row), max(row)
    log_sum = top + math.log(sum(math.exp(z - top) for z in row))
    p = sorted((math.exp(z - log_sum) for z in row), reverse=True)
    if criterion == "max_probability":
        return p[0]
    if criterion == "entropy":
        return 1 - (-sum(q * math.log(q) for q in p if q > 0) / math.log(C)) if C > 1 else 1.0
    if criterion == "margin":
        return p[0] - (p[1] if C > 1 else 0)
    u = log_sum - math.log(C)
    return 0.5 + 0.5 * u / (1 + abs(u))


@pytest.mark.parametrize("criterion", STATELESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("C", [1, 2, 63, 1023])
def test_formulas(criterion: str, dtype: torch.dtype, C: int) -> None:
    logits = (torch.randn(5, C) * 4).to(dtype)
    if C > 2:
        logits[0, :2], logits[1, 2:] = 9.0, -INF  # a tie; masked classes
    value, state = confidence(logits, None, criterion, torch.tensor(2.5))
    wanted = [formula(criterion, row) for row in (logits.double() / 2.5).tolist()]
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx(wanted, abs=2e-6)
    assert (state.shape, state.dtype) == ((0,), torch.int64)
    assert value.min() >= 0
    assert value.max() <= 1


@pytest.mark.parametrize("criterion", [*STATELESS, "patience"])
@pytest.mark.parametrize("C", [1, 2, 5])
def test_what_cannot_be_read_is_nan(criterion: str, C: int) -> None:
    rows = torch.zeros(6, C)
    rows[0, C - 1], rows[1, 0], rows[2] = NAN, INF, -INF
    rows[3] = torch.tensor([NAN, INF, -INF, 0, 0])[:C] if C > 1 else NAN
    value, _ = confidence(rows, None, criterion, ONE)
    assert value[:4].isnan().all()
    assert value[4:].isfinite().all()
    huge, _ = confidence(torch.full((1, C), 60000.0).half(), None, criterion, torch.tensor(1e-36))
    assert criterion == "patience" or huge.isnan().all()  # infinite once divided


def test_learned() -> None:
    score = torch.tensor([0.0, 2.0, -90.0, 90.0, NAN, INF, -INF])[:, None]
    value, _ = confidence(score, None, "learned", torch.tensor(2.0))
    assert value[:4].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0, 1], abs=1e-6)
    assert value[4:].isnan().all()


def one_hot(*classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


def test_patience_counts_open_exits_in_a_row() -> None:
    def step(logits: Tensor, state: Tensor | None, threshold: float = 0.9) -> tuple[list[float], Tensor]:
        value, new = confidence(logits, state, "patience", ONE, patience=3, threshold=torch.tensor(threshold))
        return value.tolist(), new

    value, state = step(one_hot(0, 1), None)
    assert (value, state.tolist()) == (pytest.approx([1 / 3, 1 / 3]), [[0, 1], [1, 1]])
    value, state = step(one_hot(0, 2), state)
    assert (value, state.tolist()) == (pytest.approx([2 / 3, 1 / 3]), [[0, 2], [2, 1]])
    _, state = step(one_hot(3, 3), state, threshold=1.5)  # closed: takes no part
    assert state.tolist() == [[0, 2], [2, 1]]
    value, state = step(one_hot(0, 2), state, threshold=1.0)
    assert (value, state.tolist()) == (pytest.approx([1, 2 / 3]), [[0, 3], [2, 2]])
    value, state = step(one_hot(0, 0), state)
    assert (value, state.tolist()) == (pytest.approx([1, 1 / 3]), [[0, 4], [0, 1]])
    _, state = step(one_hot(1, 1), None, threshold=2.0)
    assert state.tolist() == [[-1, 0], [-1, 0]]


def test_patience_ties_take_the_lowest_class_and_nan_agrees_with_nobody() -> None:
    tie = torch.tensor([[1.0, 3.0, 3.0], [NAN, 0.0, 0.0]])
    value, state = confidence(tie, None, "patience", ONE, patience=2)
    assert state.tolist() == [[1, 1], [-1, 0]]
    assert value[0] == 0.5
    assert value[1].isnan()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_positions(criterion: str, reduce: str) -> None:
    logits = torch.randn(4, 3, 1 if criterion == "learned" else 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]])
    logits[0, 2] = NAN  # padding
    each = torch.stack([confidence(logits[:, s], None, criterion, ONE, patience=2)[0] for s in range(3)], 1)
    value, state = confidence(logits, None, criterion, ONE, patience=2, reduce=reduce, mask=mask)
    reducers: dict[str, Any] = {"min": torch.amin, "mean": torch.mean, "last": lambda x, _: x[-1]}
    for row in range(3):
        wanted = reducers[reduce](each[row][mask[row] == 1], 0)
        assert value[row].item() == pytest.approx(wanted.item(), abs=1e-6)
    assert value[3].isnan()
    assert state.shape == ((4, 3, 2) if criterion == "patience" else (0,))
    unmasked, _ = confidence(logits, None, criterion, ONE, patience=2, reduce=reduce)
    assert unmasked[0].isnan()
    assert unmasked[1].item() == pytest.approx(reducers[reduce](each[1], 0).item(), abs=1e-6)
    assert torch.equal(
        confidence(logits, None, criterion, ONE, patience=2, reduce=reduce, mask=mask.bool())[0][:3], value[:3]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), None, "max_prob", ONE), "max_probability"),
        ((torch.zeros(2, 3), None, "learned", ONE), "a learned score is one logit"),
        ((torch.zeros(3), None, "margin", ONE), "wrong rank"),
    ],
)
def test_refusals(arguments: Any, message: str) -> None:
    for function in (confidence, OP):
        with pytest.raises(StrategyError, match=message):
            function(*arguments)
    with pytest.raises(StrategyError, match="last, mean, min"):
        confidence(torch.zeros(2, 3), None, "margin", ONE, reduce="max")
    with pytest.raises(StrategyError, match="mask does not fit"):
        confidence(torch.zeros(2, 4, 3), None, "margin", ONE, mask=torch.ones(2, 3))


def test_names_are_those_of_the_options() -> None:
    assert {*CRITERIA, "routed"} == set(options.CRITERIA)  # a router's word is taken as it is
    assert REDUCTIONS == options.REDUCTIONS
    assert exported is run_confidence


# --- gradients ------------------------------------------------------------------------------------

MASKS = [None, torch.tensor([[1, 1, 0], [1, 0, 1]])]


@pytest.mark.parametrize("criterion", [*STATELESS, "learned"])
def test_gradient_of_the_definition(criterion: str) -> None:
    for mask, reduce in itertools.product(MASKS, REDUCTIONS):
        logits = torch.randn(2, 3, 1 if criterion == "learned" else 4, dtype=torch.float64, requires_grad=True)
        t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

        def value(x: Tensor, t: Tensor, mask: Tensor | None = mask, reduce: str = reduce) -> Tensor:
            return confidence(x, None, criterion, t, reduce=reduce, mask=mask, dtype=torch.float64)[0]

        assert torch.autograd.gradcheck(value, (logits, t))


@pytest.mark.parametrize("criterion", [*STATELESS, "learned"])
def test_gradient_of_the_operator_is_that_of_the_definition(criterion: str) -> None:
    logits = torch.randn(6, 1 if criterion == "learned" else 4)
    if criterion != "learned":
        logits[0, 1] = -INF  # a masked class has gradient 0, not NaN
        logits[1, 0] = 500.0  # saturated
    found = []
    for function in (OP, confidence):
        x, t = logits.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
        (function(x, None, criterion, t)[0] * torch.arange(6)).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert t.grad is not None
        assert t.grad.isfinite()
        found += [x.grad, t.grad]
    torch.testing.assert_close(found[:2], found[2:])


def test_patience_has_no_gradient_and_says_so() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    value, _ = OP(x, None, "patience", ONE)
    (value.sum() + x.sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 3))


# --- as an operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [*STATELESS, "patience"])
@pytest.mark.parametrize("shape", [(4, 10), nightly((2, 3, 10))])
def test_operator(criterion: str, shape: tuple[int, ...]) -> None:
    state = torch.zeros(*shape[:-1], 2, dtype=torch.int64) if criterion == "patience" else None
    keywords = {"patience": 2, "reduce": "last", "threshold": torch.tensor(2.0)}
    arguments = (torch.randn(shape, requires_grad=True), state, criterion, ONE)
    torch.library.opcheck(OP.default, arguments, keywords)


def test_operator_returns_no_input() -> None:
    state = torch.zeros(4, 2, dtype=torch.int64)
    _, new = OP(torch.randn(4, 3), state, "patience", ONE, threshold=torch.tensor(2.0))
    assert new.data_ptr() != state.data_ptr()
    assert torch.equal(new, state)


class Exit(torch.nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        value: Tensor = OP(logits, None, "entropy", torch.ones(()))[0]
        return value


def test_export_keeps_the_operator_with_a_free_batch() -> None:
    program = torch.export.export(Exit(), (torch.randn(4, 10),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert OP.default in [node.target for node in program.graph.nodes]
    x = torch.randn(7, 10)
    assert torch.equal(program.module()(x), confidence(x, None, "entropy", ONE)[0])


def test_compile_forward_and_backward() -> None:
    x = torch.randn(4, 10, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    Exit()(x).sum().backward()
    torch.compile(Exit(), backend="aot_eager", fullgraph=True)(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_everything_but_the_kernels_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, eecompile.ops as ops\n"
        "from eecompile.kernels._triton import HAVE_TRITON, runs_on\n"
        "print(HAVE_TRITON, runs_on(torch.ones(1)), ops.confidence(torch.zeros(1, 2), None, 'margin', torch.ones(()))[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False False tensor([0.])\n", done.stderr
