"""Cascades for the tests: images (LeNet, a residual net, VGG) and text (a bag of words and two BERTs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from eecompile import CompiledModule, strategies
from tests import zoo_plain as plain
from tests.support import compiled as eecompile
from tests.zoo import TEXT, text

BATCHES = (1, 2, 5, 9)
ROWS = 6


class Grey(nn.Module):
    """The preparation of LeNet: grey, at 28 x 28, with a parameter-free module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x.mean(1, keepdim=True), (28, 28), mode="bilinear", align_corners=False)


class Words(nn.Module):
    """A bag of words over ids of another tokenizer."""

    def __init__(self, vocabulary: int = 300, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, width)
        self.head = nn.Linear(width, classes)

    def forward(self, word_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(word_ids))
        return out


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """In eval mode, with weights far enough from their initial ones that rows differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.08)
    return model


def bert(layers: int, width: int) -> nn.Module:
    config = hf.BertConfig(**{**TEXT, "hidden_size": width, "num_hidden_layers": layers}, num_labels=2)
    return hf.BertForSequenceClassification(config)


@dataclass(frozen=True)
class Herd:
    """Models, how they are put together, and inputs of any batch."""

    models: dict[str, nn.Module]
    strategy: strategies.Cascade
    inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]
    by_hand: Callable[..., list[Any]]  # the outputs of all models on those inputs
    options: dict[str, Any] = field(default_factory=dict)

    def compiled(self) -> CompiledModule:
        args, kwargs = self.inputs(ROWS, 0)
        return eecompile(self.models, self.strategy, example_inputs=args, example_kwargs=kwargs, **self.options)


def images() -> Herd:
    grey = Grey()
    models = {
        "lenet": seeded(plain.LeNet, 1),
        "resnet": seeded(lambda: plain.CifarResNet(1, 4), 2),
        "vgg": seeded(plain.VGG, 3),
    }

    def inputs(batch: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        g = Generator().manual_seed(100 * seed + batch)
        return (2 * torch.randn(batch, 3, 32, 32, generator=g),), {}

    def by_hand(x: Tensor) -> list[Any]:
        return [models["lenet"](grey(x)), models["resnet"](x), models["vgg"](x)]

    return Herd(models, strategies.Cascade(prepare=[grey, None, None]), inputs, by_hand)


def reviews() -> Herd:
    models = {"words": seeded(Words, 1), "small": seeded(lambda: bert(2, 16), 2), "large": seeded(lambda: bert(4, 64), 3)}

    def inputs(batch: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        g = Generator().manual_seed(100 * seed + batch)
        made = text(batch, g)
        assert isinstance(made, dict)
        return (), {**made, "word_ids": torch.randint(0, 300, (batch, 20), generator=g)}

    def by_hand(**kwargs: Any) -> list[Any]:
        words = kwargs.pop("word_ids")
        return [models["words"](words), models["small"](**kwargs), models["large"](**kwargs)]

    return Herd(models, strategies.Cascade(criterion="margin"), inputs, by_hand)
