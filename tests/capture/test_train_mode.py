"""A train-mode graph trains what the model trains, or training is refused by name before its first step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import CaptureError, eecompile, strategies

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return -g


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Net(nn.Module):
    """[B, 8] to [B, 4]; `way` is what its forward does in train mode."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.calls, self.dropout = way, 0, nn.Dropout(0.3)
        self.a, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.b = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Any:
        return self.b(self.way(self, self.norm(self.a(x))))


def counted(net: Net, h: Tensor) -> Tensor:
    if net.training:
        net.calls += 1
    return h * min(1.0, net.calls / 10) if net.training else h


def warm_up(net: Net, h: Tensor) -> Tensor:
    """Changes after a thousand calls only."""
    if net.training:
        net.calls += 1
    return h.relu() if net.calls > 1000 else h


def depth(net: Net, h: Tensor) -> Tensor:
    return h if not net.training or random.random() < 0.9 else h.relu()


def numpy_depth(net: Net, h: Tensor) -> Tensor:
    return h if not net.training or numpy.random.rand() < 0.9 else h.relu()  # noqa: NPY002


REFUSED = {
    "reversed gradient": (lambda net, h: Reverse.apply(h), "Reverse"),
    "straight through": (lambda net, h: Straight.apply(h), "Straight"),
    "counter": (counted, "calls is counted in Python"),
    "warm-up": (warm_up, "calls is counted in Python"),
    "random": (depth, "Python's random"),
    "numpy": (numpy_depth, "NumPy's random"),
}
KEPT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda net, h: h,
    "dropout": lambda net, h: net.dropout(h),
    "checkpoint": lambda net, h: torch.utils.checkpoint.checkpoint(net.dropout, h, use_reentrant=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_training(name: str) -> None:
    way, said = REFUSED[name]
    model = Net(way).eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=X)
    before, states = {k: v.clone() for k, v in model.state_dict().items()}, (random.getstate(), torch.get_rng_state())
    with pytest.raises(CaptureError, match=said):
        fast.fit([(X, Y)], epochs=1, trunk=True, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.calls == 0
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    fast.fit([(X, Y)], epochs=1, progress=False)  # the heads alone


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    model = Net(KEPT[name]).eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=X)
    fast.train_trunk = True
    fast.train()
    torch.manual_seed(7)
    result = fast.run(X)
    assert result.outputs is not None
    F.cross_entropy(result.outputs[-1], Y).backward()
    mine = model.a.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    model.train()
    if name == "plain":
        F.cross_entropy(model(X), Y).backward()
        torch.testing.assert_close(mine, model.a.weight.grad)


def test_other_outputs_in_train_mode_are_refused() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return (out, out * 2) if self.training else out

    fast = eecompile(Auxiliary(KEPT["plain"]).eval(), strategies.Branchy(exits=1), example_inputs=X)
    with pytest.raises(CaptureError, match="something else in train mode"):
        fast.fit([(X, Y)], epochs=1, trunk=True, progress=False)
    fast.fit([(X, Y)], epochs=1, progress=False)
