"""Small residual networks whose forward does one thing that capture has to cope with."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from eecompile import CompiledModule
from tests.support import compiled as eecompile

WIDTH, CLASSES = 16, 3
Answer = namedtuple("Answer", ["scores", "features"])


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """[B, 16] -> [B, 3] in four blocks."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(WIDTH, CLASSES)

    def trunk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.out(self.trunk(x))


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def rows(count: int, *sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *(sizes or (WIDTH,)), generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, *args: Any, closed: bool = True, **options: Any) -> CompiledModule:
    """The model with two exits; closed unless said otherwise, so that it gives the model's own numbers."""
    options.setdefault("strategy", "branchy")
    fast = eecompile(model, example_inputs=args or None, **options)
    if closed:
        fast.set_thresholds(2.0)
    return fast
