"""Models whose exits say, row by row, what a test wants them to say."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.criteria import Criterion
from tests.support import again
from tests.support import compiled as eecompile


class Given(nn.Module):
    """A head that answers each row with a line of a table: the value at the exit says which."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, h: Tensor) -> Tensor:
        return self.table[h[:, 0].round().long().clamp(0, len(self.table) - 1)]


class Rows(nn.Module):
    """Hands its input on through blocks that change nothing, so that a head can see which row it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(1, 1), nn.Identity()) for _ in range(6))
        for block in self.blocks:
            nn.init.ones_(block[0].weight)
            nn.init.zeros_(block[0].bias)
        self.out = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def answering(kind: Criterion | str, *tables: Tensor) -> CompiledModule:
    """`Rows` with an exit for every table; their heads give the tables' lines."""
    names = tuple(f"blocks.{i}" for i in range(len(tables)))
    strategy = strategies.Branchy(exits=names, criterion=kind, head=nn.Linear(1, 4), max_head_share=math.inf)
    fast = again(bare(), strategy)
    for e, table in zip(fast.exits, tables, strict=True):
        fast.branch(e.name).head = Given(table)
    return fast


@functools.cache
def bare() -> CompiledModule:
    strategy = strategies.Branchy(exits=1, head=nn.Linear(1, 4), max_head_share=math.inf)
    return eecompile(Rows().eval(), strategy, example_inputs=(torch.arange(4.0)[:, None],))
