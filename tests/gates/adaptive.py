"""A residual network and a task whose difficulty is known, for depth-adaptive and self-adaptive training.

A row is 8 signs, and a flag. Easy rows (flag -1) have their label written in the first sign; hard rows (flag 1) have a 0
there, and their label is the product of three other signs, which no linear layer can read: only blocks can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 32


class Residual(nn.Module):
    """Layer norm and two layers with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


class Tower(nn.Module):
    """Residual blocks between an embedding and a classifier: [B, 9] to logits [B, 2]."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(9, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.classifier(self.norm(h))
        return y


def tower(blocks: int = 3, seed: int = 0) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tower(blocks).eval()


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N, 9], labels [N], and which rows are hard [N] bool."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, 8), generator=generator).float() * 2 - 1
    hard = torch.rand(count, generator=generator) < 0.5
    answer = torch.where(hard, signs[:, 1] * signs[:, 2] * signs[:, 3], signs[:, 0])
    signs[:, 0] = torch.where(hard, 0.0, signs[:, 0])
    flag = torch.where(hard, 1.0, -1.0).unsqueeze(1)
    return torch.cat((signs, flag), 1), (answer > 0).long(), hard


class Loader:
    """Batches of 64 rows, again and again in the same order."""

    def __init__(self, count: int = 1024, seed: int = 0) -> None:
        self.x, self.y, _ = rows(count, seed)

    def __len__(self) -> int:
        return len(self.x) // 64

    def __iter__(self):
        yield from zip(self.x.split(64), self.y.split(64), strict=True)
