"""Each row runs through the arm that it takes, and comes out as `choose` over all arms has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile.kernels.choose import choose
from eecompile.passes.partition import Partition, opened


class Body(nn.Module):
    """Two values, the second with rows on axis 1; counts the rows that it sees."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, (y + self.factor).transpose(0, 1)


class Scaled(nn.Module):
    """Reads a value without rows too."""

    def forward(self, table: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (x * table.sum(),)


def body(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(module)


ROWS = 6
X, Y = torch.arange(ROWS * 2.0).view(ROWS, 2), torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
PAST = (torch.full((ROWS, 2), -1.0), torch.full((3, ROWS), -1.0))


def gate(*factors: float, first: int = 1) -> Partition:
    arms = {first + k: body(Body(f)) for k, f in enumerate(factors)}
    return Partition(arms, dict.fromkeys(arms, (0, 1)), (0, 0), (0, 1))


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([True, False, True, True, False, False]),
        torch.tensor([1.0, 0.0, 1.0, float("nan"), 0.4, 0.5]),
        torch.ones(ROWS, dtype=torch.bool),
        torch.zeros(ROWS),
    ],
    ids=["bool", "score", "all", "none"],
)
def test_a_gate_is_a_choice_of_two(index: Tensor) -> None:
    part, every = gate(3.0), Body(3.0)(X, Y)
    found = part(index, PAST, X, Y)
    for value, past, computed, axis in zip(found, PAST, every, (0, 1), strict=True):
        assert torch.equal(value, choose(index, [past, computed], axis))
    assert torch.equal(PAST[0], torch.full((ROWS, 2), -1.0)), "what goes past is not written over"


def test_no_copy_where_one_arm_has_all_rows() -> None:
    seen: list[Tensor] = []

    def watch(graph: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: (seen.extend(given), graph(*given))[1]

    part = gate(3.0)
    part.prepare(watch)
    part(torch.ones(ROWS), PAST, X, Y)
    assert seen[0] is X and seen[1] is Y
    assert part(torch.zeros(ROWS), PAST, X, Y) is PAST and len(seen) == 2
    part(torch.arange(ROWS) < 2, PAST, X, Y)
    assert seen[2].shape[0] == 2


def test_over_writes_into_what_goes_past() -> None:
    past, index = tuple(p.clone() for p in PAST), torch.tensor([0, 1, 2, 1, 0, 2])
    part = gate(3.0, 5.0)
    want = part(index, PAST, X, Y)
    found = part(index, past, X, Y, over=True)
    for a, b, c in zip(found, want, past, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() == c.data_ptr()


@pytest.mark.parametrize("index", [[2, 0, 1, 1, 0, 2], [2, 2, 2, 2, 2, 2], [0, 0, 2, 2, 0, 0]])
def test_branches_have_no_past(index: list[int]) -> None:
    """Every arm has a body, with inputs of its own; one without rows is not run."""
    table = torch.tensor([1.0, 2.0])
    bodies = {0: body(Scaled()), 1: body(Scaled()), 2: body(Scaled())}
    part = Partition(bodies, {0: (0, 1), 1: (2, 1), 2: (0, 1)}, (None, 0, None), (0,))
    chosen = torch.tensor(index)
    (found,) = part(chosen, None, table, X, 2 * table)
    assert torch.equal(found, choose(chosen, [X * 3, X * 6, X * 3], 0))


def test_two_arms_with_bodies_read_a_decision() -> None:
    """The two widths that are left of several: closed takes the narrower one."""
    part, decision = gate(3.0, 5.0, first=0), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    found = part(decision, None, X, Y)
    for value, narrow, wide, axis in zip(found, Body(3.0)(X, Y), Body(5.0)(X, Y), (0, 1), strict=True):
        assert torch.equal(value, choose(decision, [narrow, wide], axis))


def test_open_gates_count_the_width() -> None:
    assert opened(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, False])).tolist() == [2, 1, 0]
