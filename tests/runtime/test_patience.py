"""Patience with any set of exits open: the compact executor against the reference."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from eecompile.criteria import Patience
from eecompile.strategies import Branchy
from tests.support import compiled as eecompile


class Tower(nn.Module):
    """Four residual layers of 12 and a classifier: [B, 12] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)))
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.classifier(x)
        return logits


def test_every_set_of_open_exits_agrees_with_the_reference() -> None:
    torch.manual_seed(0)
    x = torch.randn(41, 12)
    strategy = Branchy(exits=3, criterion=Patience(exits_in_agreement=2))
    fast = eecompile(Tower().eval(), strategy, example_inputs=(x[:4],))
    assert len(fast.exits) == 3
    seen = set()
    for pattern, level in product(product((True, False), repeat=3), (0.5, 1.0)):
        fast.set_thresholds([level if is_open else 2.0 for is_open in pattern])
        wanted = fast.observe(x)
        found = fast.run(x)
        assert torch.equal(found.exit_index, wanted.exit_index), (pattern, level)
        torch.testing.assert_close(found.output, wanted.output)
        seen |= set(found.exit_index.tolist())
    assert seen == {0, 1, 2, 3}
