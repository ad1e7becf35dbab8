"""A program with two exits, at each of which a half of the rows that reach it leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile, strategies
from eecompile.errors import UntrainedWarning


class Slow(nn.Module):
    """A layer that can be made to wait or to raise, as an operator that export keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture(scope="package")
def fast(rows: Tensor) -> CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*[Slow() for _ in range(4)], nn.Linear(8, 3)).eval()
        made = eecompile(
            model, strategies.Branchy(exits=("0", "2"), criterion="max_probability"), example_inputs=(torch.randn(4, 8),)
        )
    with pytest.warns(UntrainedWarning):
        made.set_thresholds([1.0, 1.0])
    sure = made.observe(rows).confidences
    assert sure is not None
    first = float(sure[0].median())
    made.set_thresholds([first, float(sure[1][sure[0] < first].median())])  # a half leaves at each
    return made


@pytest.fixture(scope="package")
def rows() -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 3
