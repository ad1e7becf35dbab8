"""The model and the data of `doctor`'s self-test."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Four convolutions: float32 [B, 3, 8, 8] to logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        y: Tensor = self.classifier(x.mean((2, 3)))
        return y


class TinyLoader:
    """Four batches of eight rows, the same in every pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            labels = torch.randint(0, 3, (8,), generator=generator)
            yield torch.randn(8, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels

    def __len__(self) -> int:
        return 4
