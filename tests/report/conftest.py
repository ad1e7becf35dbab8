"""A program with two exits and data for its page."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile, strategies

Data = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="package")
def fast() -> CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [m for c in (1, 6, 6) for m in (nn.Conv2d(c, 6, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
        made = eecompile(
            model, strategies.Branchy(exits=2, criterion="max_probability"), example_inputs=(torch.randn(4, 1, 8, 8),)
        )
    made.set_thresholds([0.36, 0.36])
    return made


@pytest.fixture(scope="package")
def data(fast: CompiledModule) -> Data:
    """Labels are the full model's answers for two rows of three, so that it is right more often than its exits."""
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = fast.full(x).argmax(1)
    y[::3] = (y[::3] + 1) % 3
    return [(x[:25], y[:25]), (x[25:], y[25:])]
