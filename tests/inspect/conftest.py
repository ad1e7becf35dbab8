"""Real models, compiled once: a small ResNet of convolutions and a small BERT of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from tests.support import compiled as eecompile


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Six blocks: [B, 3, 16, 16] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.layer3 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.conv(x)))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def resnet() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet().eval()


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tokens(rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(0, 90, (rows, 10), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="session")
def conv() -> CompiledModule:
    """Three exits, the middle one closed."""
    fast = eecompile(resnet(), "branchy", example_inputs=(images(),))
    fast.set_thresholds([0.4, 2.0, 0.2])
    return fast


@pytest.fixture(scope="session")
def bert() -> CompiledModule:
    """Eight layers with two exits, so that a long run of layers lies after the last."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=90,
        hidden_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    names = [f"bert.encoder.layer.{i}" for i in (0, 2)]
    return eecompile(model, strategies.MeBert(exits=names), example_kwargs=tokens())


@pytest.fixture(params=["conv", "bert"])
def fast(request: pytest.FixtureRequest) -> CompiledModule:
    found: CompiledModule = request.getfixturevalue(request.param)
    return found
