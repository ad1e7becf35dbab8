"""The models of the cascades, trained one by one as usual: each is better and dearer than the one before it.

Images: a tiny CNN that reads CIFAR-10 at 16 x 16, ResNet-8, and MobileNetV2 with its ImageNet weights, which reads it at
96 x 96. Reviews: a bag of words, MiniLM cut to 3 layers, MiniLM with all 6. ``python -m examples._stages`` trains them.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import datasets, models
from examples._common import Inputs, Recipe, Trunk, image_data, minilm_trunk, parse, trunk
from examples._registry import DatasetError, cache_root, fetch


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
    """A model behind its preparation, for training alone; in a cascade the two are given apart."""

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


def image_stages(*, quick: bool = False, seed: int = 0) -> list[tuple[str, nn.Module | None, Trunk]]:
    """(name, preparation, trunk) of each, the cheapest first; the trunk's model is behind its preparation."""
    data = image_data("cifar10", quick)
    small = Recipe("tinyconv-cifar10", 6, 128, 4e-3, augmented=True, seed=seed)
    middle = Recipe("resnet8-cifar10", 6, 128, 0.3, "sgd", 5e-4, True, True, seed=seed)
    large = Recipe("mobilenetv2-cifar10", 1, 48, 1e-3, augmented=True, channels_last=True, seed=seed, rows=24_000)
    if quick:
        small = Recipe("tinyconv-cifar10-quick", 2, 64, 4e-3, seed=seed, standin=True)
        middle = Recipe("resnet8-cascade-quick", 3, 32, 0.2, "sgd", 5e-4, seed=seed, standin=True)
        large = Recipe("mobilenet-cascade-quick", 4, 32, 4e-3, seed=seed, standin=True)
    shrink, grow = Resize(16), Resize(48 if quick else 96)
    tiny = models.MobileNetV2.SETTINGS[:4]
    return [
        ("tinyconv", shrink, trunk(small, lambda: Prepared(shrink, models.TinyConv(width=8 if quick else 24)), data)),
        ("resnet8", None, trunk(middle, lambda: models.ResNet(1, width=8 if quick else 16), data)),
        (
            "mobilenetv2",
            grow,
            trunk(large, lambda: Prepared(grow, models.MobileNetV2(10, tiny) if quick else mobilenetv2(seed)), data),
        ),
    ]


def text_stages(*, quick: bool = False, seed: int = 0) -> list[tuple[str, Trunk]]:
    """(name, trunk) of each, the cheapest first."""
    folder = datasets.minilm(standin=quick)

    def data(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        columns = dict(datasets.tokens(part, limit or (256 if quick else 2_000), standin=quick))
        labels = columns.pop("labels")
        return columns, labels

    def every(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        columns = dict(datasets.tokens(part, limit or (None if part == "train" else 2_000), standin=quick))
        labels = columns.pop("labels")
        return columns, labels

    bag = Recipe("bagofwords-imdb", 6, 64, 3e-3, weight_decay=0.05, seed=seed)
    half = Recipe("minilm3-imdb", 2, 32, 1e-4, bf16=True, seed=seed, rows=4_000)
    if quick:
        bag = Recipe("bagofwords-imdb-quick", 6, 32, 1e-2, seed=seed, standin=True)
        half = Recipe("minilm3-imdb-quick", 4, 32, 5e-3, seed=seed, rows=256, standin=True)
    words = 30_522
    if quick:
        from transformers import AutoConfig

        words = AutoConfig.from_pretrained(folder).vocab_size
    return [
        ("bagofwords", trunk(bag, lambda: models.BagOfWords(words), every)),
        ("minilm3", trunk(half, lambda: models.minilm_classifier(folder, seed=seed, layers=3), data)),
        ("minilm6", minilm_trunk(quick=quick, seed=seed)),
    ]


def main() -> None:
    """Train every stage that is not kept yet and print what it reaches."""
    options = parse(__doc__)
    found = [(name, got) for name, _, got in image_stages(quick=options.quick, seed=options.seed)]
    for name, got in [*found, *text_stages(quick=options.quick, seed=options.seed)]:
        print(f"{name}: test {got.accuracy:.4f}, validation {got.val_accuracy:.4f}, trained in {got.seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except DatasetError as problem:
        sys.exit(f"error: {problem}")
