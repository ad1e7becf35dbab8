"""The models of the examples: plain PyTorch with nothing of early exit in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, BertForTokenClassification


class DigitsNet(nn.Module):
    """A small network for 8 x 8 digits: float32 [B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 2 * 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        x = F.max_pool2d(F.relu(self.conv4(x)), 2)
        y: Tensor = self.fc(x.flatten(1))
        return y


class LeNet(nn.Module):
    """LeNet-5 as BranchyNet uses it (Teerapittayanon et al., 2016): [B, 1, 28, 28] to logits [B, classes].

    Three 5 x 5 convolutions of 5, 10 and 20 channels, each pooled by 2, then layers of 84 and ``classes``.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 5, padding=3)
        self.conv2 = nn.Conv2d(5, 10, 5, padding=3)
        self.conv3 = nn.Conv2d(10, 20, 5, padding=3)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.fc1 = nn.Linear(20 * 6 * 6, 84)
        self.fc2 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.pool(self.conv3(x)))
        y: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return y


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is projected where the shape changes.

    [B, channels, H, W] to [B, out, H / stride, W / stride].
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 (He et al., 2016): [B, 3, 32, 32] to logits [B, classes].

    Three stages of ``n`` blocks, ``width``, 2 ``width`` and 4 ``width`` channels at 32, 16 and 8 pixels.
    """

    def __init__(self, n: int = 3, width: int = 16, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = self._stage(n, width, width, 1)
        self.stage2 = self._stage(n, width, 2 * width, 2)
        self.stage3 = self._stage(n, 2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(n: int, channels: int, out: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(out, out, 1) for _ in range(n - 1))
        return nn.Sequential(BasicBlock(channels, out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def resnet20(classes: int = 10) -> ResNet:
    """ResNet-20 for 32 x 32 colour images."""
    return ResNet(3, classes=classes)


def resnet8(classes: int = 10) -> ResNet:
    """ResNet-8, half as wide: the small one for ``--quick``."""
    return ResNet(1, width=8, classes=classes)


class TinyConv(nn.Module):
    """Three strided convolutions for 16 x 16 colour images: [B, 3, 16, 16] to logits [B, classes]."""

    def __init__(self, classes: int = 10, width: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Resize(nn.Module):
    """Images [B, C, H, W] averaged to ``side`` x ``side`` pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.side)


class Prepared(nn.Module):
    """A model after its preparation, for training alone; in a cascade the two are given apart."""

    def __init__(self, prepare: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.prepare = prepare
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(self.prepare(images))


class BagOfWords(nn.Module):
    """Mean of word vectors, one linear layer: int64 ``input_ids``, ``attention_mask`` [B, S] to logits [B, labels]."""

    def __init__(self, vocabulary: int, width: int = 32, labels: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(width, labels)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(self.words.weight.dtype)
        mean = (self.words(input_ids) * weight).sum(1) / weight.sum(1).clamp(min=1)
        y: Tensor = self.classifier(self.dropout(mean))
        return y


def minilm_classifier(
    folder: Path | str, labels: int = 2, seed: int = 0, layers: int | None = None
) -> BertForSequenceClassification:
    """BERT classifier on the encoder in ``folder``, with a fresh pooler and classifier drawn from ``seed``.

    ``input_ids``, ``attention_mask`` int64 [B, S] to an output with ``logits`` [B, labels]. ``layers`` keeps only
    that many of the first layers.
    """
    from transformers import BertForSequenceClassification
    from transformers.utils import logging

    options = {} if layers is None else {"num_hidden_layers": layers}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the fresh layers as missing
    logging.disable_progress_bar()
    try:
        model: Any = BertForSequenceClassification.from_pretrained(folder, num_labels=labels, **options)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.bert.pooler.dense, model.classifier):
        nn.init.normal_(layer.weight, std=model.config.initializer_range, generator=generator)
        nn.init.zeros_(layer.bias)
    return model


def code_tagger(layers: int, vocabulary: int, tags: int, positions: int) -> BertForTokenClassification:
    """A small BERT, 48 wide, that tags each of [B, S] words."""
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=positions,
        num_labels=tags,
    )
    return BertForTokenClassification(config)


class ChartNet(nn.Module):
    """Four convolutions over time (as Wang et al., 2017, has three): [B, 1, T] to logits [B, classes]."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        shapes = ((1, 32, 7, 1), (32, 64, 5, 2), (64, 64, 3, 1), (64, 128, 3, 2))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm1d(out), nn.ReLU()
                )
                for channels, out, kernel, stride in shapes
            )
        )
        self.fc = nn.Linear(128, classes)

    def forward(self, readings: Tensor) -> Tensor:
        y: Tensor = self.fc(self.layers(readings).mean(2))
        return y


class Thinker(nn.Module):
    """A GRU cell that reads one vector [B, D] again at each of ``steps`` steps; then logits [B, classes]."""

    def __init__(self, width: int, classes: int, steps: int, hidden: int = 96) -> None:
        super().__init__()
        self.steps = steps
        self.first = nn.Linear(width, hidden)
        self.cell = nn.GRUCell(width, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(self.steps):
            h = self.cell(x, h)
        logits: Tensor = self.classifier(h)
        return logits
