"""Operators and gated regions that write over dying values: which ones, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.passes.regions import EITHER
from eecompile.runtime.reuse import overwriting, reusable
from eecompile.runtime.runnable import EagerSegment
from tests.support import CLOSED, both, equal_bits, watch
from tests.support import compiled as eecompile

aten = torch.ops.aten


class Block(nn.Module):
    """Every way in which an operand may die or must not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))  # in place: the norm's result dies
        z = torch.tanh(y)  # not: y lives on
        y = x + z * y  # both in place, the sum on its second operand: x is the block's input and lives
        flat = y.flatten(2)
        return F.relu(flat).view(y.shape) * self.scale  # not: a view, and a product that is laid out by another operator


class Net(nn.Module):
    """[B, 3, 8, 8] to [B, 4], with the input itself and a broadcast among the operands."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.end = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)  # not: the user's own tensor
        means = self.stem(x).mean((2, 3), keepdim=True)
        y = means + self.stem(x)  # in place on the second operand: the first one is smaller
        out: Tensor = self.end(self.blocks(y).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def compiled() -> tuple[nn.Module, CompiledModule, Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(5, 3, 8, 8)
    return model, eecompile(model, strategies.Branchy(exits=2), example_inputs=(x,)), x


def in_place(fast: CompiledModule) -> list[str]:
    segment = fast.engine.chosen.plan((), False)[0].segment  # type: ignore[attr-defined]
    return [op.overloadpacket.__name__ for op, _ in reusable(segment.module).values()]


def test_just_the_operands_that_die_are_written_over(compiled):
    _, fast, _ = compiled
    assert in_place(fast) == ["add_", *["relu_", "mul_", "add_"] * 3]


def test_numbers_and_inputs_stay(compiled):
    model, fast, x = compiled
    before = x.clone()
    parameters = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(x)
        for thresholds in (CLOSED, 1.0, 0.3, 0.0):
            fast.set_thresholds(thresholds)
            with_reuse = fast(x)
            with torch.enable_grad():
                without = fast(x)
            equal_bits(with_reuse, without.detach())
            if thresholds >= 1.0:
                equal_bits(with_reuse, want)
    assert torch.equal(x, before)
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())


def test_gradients_switch_it_off(compiled):
    """`tanh` keeps its result for the backward pass; writing over it would be an error there."""
    model, fast, x = compiled
    fast.set_thresholds(CLOSED)
    leaf = x.clone().requires_grad_()
    fast(leaf).sum().backward()
    mine = leaf.grad
    leaf.grad = None
    model(leaf).sum().backward()
    assert mine is not None and torch.equal(mine, leaf.grad)
    ran = watch(lambda: fast(x)).ops
    assert (ran["relu_"], ran["mul_"], ran["add_"]) == (3, 3, 4)


class Before(nn.Module):
    """A block that applies its activation first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(F.relu(x))
        return y


def test_a_value_that_crosses_an_exit_is_kept():
    """Head and next segment read it; the activation that comes next would be in place if the exit were closed."""
    torch.manual_seed(1)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), *(Before() for _ in range(3)))
    model = nn.Sequential(trunk, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(4, 3, 8, 8)
    chosen = strategies.Branchy(exits=["0.1", "0.3"], head="linear")
    fast = eecompile(model, chosen, example_inputs=(x,))
    found = {}
    with torch.no_grad():
        for thresholds in (CLOSED, 1.0):
            fast.set_thresholds(thresholds)
            equal_bits(fast(x), model(x))
            plan = fast.engine.chosen.plan(() if thresholds > 1 else (0, 1), False)  # type: ignore[attr-defined]
            assert all(isinstance(step.call, EagerSegment) for step in plan)
            modules = [step.segment.module for step in plan]
            found[thresholds] = [[n.name for n in reusable(m)] for m in modules]
    assert found[CLOSED] == [["add", "add_1", "add_2", "relu_3"]]
    assert found[1.0] == [["add"], ["add_1", "add_2"], []]


class Kept(nn.Module):
    """Three blocks; what the second one is given may live on, by itself or as a view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.end = how, nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Before() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x if self.how == "input" else F.relu(self.stem(x)))
        view = first.flatten(2)
        last = self.blocks[2](self.blocks[1](first))
        if self.how == "value":
            last = last + first
        mean = last.flatten(2).sub(view) if self.how == "view" else last.flatten(2)
        out: Tensor = self.end(mean.mean(2))
        return out


POLICY = strategies.SelfAdaptive(exits=None, parts="every-block", open_bias=0.0)


@pytest.mark.parametrize(
    ("how", "strategy", "over"),
    [
        ("dies", strategies.SkipNet(), [0, 1, 2]),
        ("dies", POLICY, [0, 1, 2]),  # scores that are read later are no views of what the policy read
        ("value", strategies.SkipNet(), [0]),
        ("view", strategies.SkipNet(), [0]),
        ("input", strategies.SkipNet(), []),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_gated_regions_write_over_what_nobody_reads_later(how, strategy, over):
    torch.manual_seed(2)
    model, x = Kept(how).eval(), torch.randn(6, 4 if how == "input" else 3, 8, 8)
    fast = eecompile(model, strategy, example_inputs=(x,))
    before = x.clone()
    for unit in dict.fromkeys(gate.head for gate in fast.gates):
        with torch.no_grad():
            unit.score.weight.mul_(100)
    for i, gate in enumerate(fast.gates):  # in turn: the scores of a gate depend on those before it
        fast.set_thresholds({gate.name: float(fast.observe(x).trace.gate_scores[:, i].median())})
    compact, reference = both(fast, x)
    assert compact.gates.sum(0).tolist() == [4, 4, 4]
    equal_bits(compact.output, reference.output)
    with torch.no_grad():
        equal_bits(fast(x), reference.output)
    assert torch.equal(x, before)
    module = fast.engine.chosen.plan((), False, (EITHER,) * 3)[0].segment.module  # type: ignore[attr-defined]
    assert sorted(n.name for n in overwriting(module)) == [f"gate_{i}_region" for i in over]
