"""The models of the cascades, trained one by one as usual: each is better and dearer than the one before it.

Images: a tiny CNN that reads CIFAR-10 at 16 x 16, ResNet-8, and MobileNetV2 with its ImageNet weights, which reads it at
96 x 96. Reviews: a bag of words, MiniLM cut to 3 layers, MiniLM with all 6.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import datasets, models
from examples._registry import cache_root, fetch
from examples.trunks import Inputs, Recipe, Trunk, image_data, minilm_trunk, trunk


class Resize(nn.Module):
    """Images [B, C, H, W] at ``side`` x ``side`` pixels: averaged where they shrink, bilinear where they grow."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > self.side:
            return F.adaptive_avg_pool2d(images, self.side)
        return F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)


class Prepared(nn.Module):
    """A model after its preparation, for training alone; in a cascade the two are given apart."""

    def __init__(self, prepare: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.prepare = prepare
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(self.prepare(images))


def mobilenetv2(seed: int = 0) -> models.MobileNetV2:
    """MobileNetV2 with its ImageNet weights and a fresh classifier for 10 classes."""
    kept = cache_root() / "mobilenetv2.pth"
    if not kept.exists():
        kept.write_bytes(fetch("mobilenetv2")["mobilenet_v2-b0353104.pth"])
    weights = torch.load(io.BytesIO(kept.read_bytes()), weights_only=True)
    model = models.MobileNetV2()
    model.load_state_dict(weights)
    head = nn.Linear(1280, 10)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    model.classifier[1] = head
    return model


@dataclass(frozen=True)
class Stage:
    """One model of a cascade: its name, what prepares its input, the model alone, and how it was trained."""

    name: str
    prepare: nn.Module | None
    model: nn.Module
    trunk: Trunk


def _stage(name: str, prepare: nn.Module | None, got: Trunk) -> Stage:
    return Stage(name, prepare, got.model.model if isinstance(got.model, Prepared) else got.model, got)


def image_stages(*, quick: bool = False, seed: int = 0) -> list[Stage]:
    """Three models for CIFAR-10, the cheapest first."""
    data = image_data("cifar10", quick)
    small = Recipe("tinyconv-cifar10", 6, 128, 4e-3, moved=4, mirrored=True, seed=seed)
    middle = Recipe("resnet8-cifar10", 6, 128, 0.3, "sgd", 5e-4, moved=4, mirrored=True, channels_last=True, seed=seed)
    large = Recipe("mobilenetv2-cifar10", 1, 48, 1e-3, moved=4, mirrored=True, channels_last=True, seed=seed, rows=24_000)
    if quick:
        small = Recipe("tinyconv-cifar10-quick", 6, 32, 4e-3, seed=seed, standin=True)
        middle = Recipe("resnet8-cascade-quick", 3, 32, 0.2, "sgd", 5e-4, seed=seed, standin=True)
        large = Recipe("mobilenet-cascade-quick", 2, 32, 6e-3, seed=seed, standin=True)
    shrink, grow = Resize(16), Resize(40 if quick else 96)
    short = models.MobileNetV2.SETTINGS[:3]
    return [
        _stage("tinyconv", shrink, trunk(small, lambda: Prepared(shrink, models.TinyConv(width=8 if quick else 24)), data)),
        _stage("resnet8", None, trunk(middle, lambda: models.ResNet(1, width=8 if quick else 16), data)),
        _stage(
            "mobilenetv2",
            grow,
            trunk(large, lambda: Prepared(grow, models.MobileNetV2(10, short) if quick else mobilenetv2(seed)), data),
        ),
    ]


def text_stages(*, quick: bool = False, seed: int = 0) -> list[Stage]:
    """Three models for reviews, the cheapest first. The bag of words, which costs nothing, learns from all of them."""
    folder = datasets.minilm(standin=quick)
    judged = 256 if quick else 1_000

    def data(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        columns = dict(datasets.tokens(part, limit or judged, standin=quick))
        labels = columns.pop("labels")
        return columns, labels

    def every(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        columns = dict(datasets.tokens(part, None if part == "train" else judged, standin=quick))
        labels = columns.pop("labels")
        return columns, labels

    bag = Recipe("bagofwords-imdb", 6, 64, 3e-3, weight_decay=0.05, seed=seed)
    half = Recipe("minilm3-imdb", 2, 32, 1e-4, bf16=True, seed=seed, rows=4_000)
    if quick:
        bag = Recipe("bagofwords-imdb-quick", 6, 32, 1e-2, seed=seed, standin=True)
        half = Recipe("minilm3-imdb-quick", 3, 32, 5e-3, seed=seed, rows=256, standin=True)

    def words() -> nn.Module:
        from transformers import AutoConfig

        return models.BagOfWords(AutoConfig.from_pretrained(folder).vocab_size)

    return [
        _stage("bagofwords", None, trunk(bag, words, every)),
        _stage("minilm3", None, trunk(half, lambda: models.minilm_classifier(folder, seed=seed, layers=3), data)),
        _stage("minilm6", None, minilm_trunk(quick=quick, seed=seed)),
    ]
