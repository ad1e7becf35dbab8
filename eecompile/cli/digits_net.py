"""The network of `demo` and its training: plain PyTorch, nothing of early exit in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network of 8 blocks: float32 [B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        first = [Block(width, width, 1) for _ in range(4)]
        second = [Block(2 * width, 2 * width, 1) for _ in range(3)]
        self.blocks = nn.Sequential(*first, Block(width, 2 * width, 2), *second)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        y: Tensor = self.classifier(x.mean((2, 3)))
        return y


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """AdamW with one cycle of the learning rate; the images move by up to a pixel.

    Args:
        progress: Called after each epoch with its number and its last loss.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * steps)
    model.train()
    loss = torch.zeros(())
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for i in range(steps):
            rows = order[i * batch : (i + 1) * batch]
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(torch.roll(images[rows], (down, right), (2, 3))), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, float(loss.detach()))
    model.eval()
