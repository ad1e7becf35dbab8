"""Models that overwrite a part of what an exit, a gate or a halting unit has read: they train, and executors agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eecompile import strategies
from tests.support import agree, compiled, equal_bits

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


def masked(x: Tensor, layer: nn.Module) -> Tensor:
    x = x + layer(x).relu()
    x[:, 0] = 0
    return x


def scaled(x: Tensor, layer: nn.Module) -> Tensor:
    x = x + layer(x)
    x[:, :4].mul_(0.5)
    return x


def indexed(x: Tensor, layer: nn.Module) -> Tensor:
    x = x + layer(x)
    x[torch.arange(x.shape[0]), 3] = 1.0
    return x


class Net(nn.Module):
    """[B, 8] to [B, 4]."""

    def __init__(self, way: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.fc = way, nn.Linear(8, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.way(x, layer)
        out: Tensor = self.fc(x)
        return out


STRATEGIES: dict[str, Callable[[], strategies.Strategy]] = {
    "exits": lambda: strategies.Branchy(exits=1, head="linear"),
    "gates": lambda: strategies.SkipNet(unit="linear", open_bias=0.0),
    "halting": lambda: strategies.Act(halting_bias=-0.5),
}


@pytest.mark.parametrize("way", [masked, scaled, indexed])
@pytest.mark.parametrize("name", STRATEGIES)
def test_it_trains(name: str, way: Callable[[Tensor, nn.Module], Tensor]) -> None:
    model = Net(way).eval()
    fast = compiled(model, STRATEGIES[name](), example_inputs=X)
    before = [p.clone() for p in fast.head_parameters()]
    for trunk in (False, True):
        fast.fit([(X, Y)], trunk=trunk, progress=False)
        agree(fast, (X,), {})
    assert not all(torch.equal(a, b) for a, b in zip(before, fast.head_parameters(), strict=True))
    equal_bits(fast.full(X), model(X).detach())
