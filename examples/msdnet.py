"""A small multi-scale dense network in the manner of MSDNet (Huang et al. 2018): plain PyTorch, without any exit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unit(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """[B, channels, H, W] to [B, out, H / stride, W / stride]: convolution 3 x 3, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Layer(nn.Module):
    """New features at every scale, from the scale itself and from the next finer one; all before them are kept.

    Takes and gives one tensor per scale, coarsest first. With ``drop`` the finest scale ends here.

    Args:
        channels: Of each scale that comes in, coarsest first.
        growth: New channels of the coarsest scale; each finer scale gets half as many.
    """

    def __init__(self, channels: list[int], growth: int, drop: bool = False) -> None:
        super().__init__()
        self.own, self.down, self.out = nn.ModuleList(), nn.ModuleList(), []
        last = len(channels) - 1
        for s, c in enumerate(channels):
            if s == last and drop:
                continue
            new = growth // 2**s
            self.own.append(unit(c, new if s == last else new // 2))
            if s < last:
                self.down.append(unit(channels[s + 1], new // 2, 2))
            self.out.append(c + new)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        given = []
        for s, own in enumerate(self.own):
            new = [own(scales[s])]
            if s < len(self.down):
                new.append(self.down[s](scales[s + 1]))
            given.append(torch.cat([scales[s], *new], 1))
        return given


class MSDNet(nn.Module):
    """Three scales, dense along the depth; the finest ends after a third of the layers, the next after two thirds.

    [B, 3, 32, 32] to logits [B, classes], read from the coarsest scale, which is there from the first layer on.
    """

    def __init__(self, layers: int = 9, width: int = 12, growth: int = 6, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(channels, width), nn.MaxPool2d(2))
        self.middle, self.coarse = unit(width, 2 * width, 2), unit(2 * width, 4 * width, 2)
        self.layers = nn.ModuleList()
        sizes = [4 * width, 2 * width, width]
        for k in range(layers):
            layer = Layer(sizes, 4 * growth, drop=k in (layers // 3, 2 * layers // 3))
            sizes = layer.out
            self.layers.append(layer)
        self.fc = nn.Linear(sizes[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.middle(fine)
        scales = [self.coarse(middle), middle, fine]
        for layer in self.layers:
            scales = layer(scales)
        y: Tensor = self.fc(scales[0].mean((2, 3)))
        return y
