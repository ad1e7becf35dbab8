"""The models of the cascades, trained one by one as usual: each is better and dearer than the one before it.

Images: a tiny CNN that reads CIFAR-10 at 16 x 16, ResNet-8 and ResNet-20. Reviews: a bag of words, MiniLM cut to 3 layers,
MiniLM with all 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eecompile.benchmark import as_call
from examples import datasets, models
from examples.trunks import (
    Inputs,
    Recipe,
    Trunk,
    minilm_trunk,
    resnet8_trunk,
    resnet_trunk,
    reviews,
    tinyconv_trunk,
    trunk,
)


@dataclass(frozen=True)
class Stage:
    """One model of a cascade: its name, what prepares its input, the model alone, and how it was trained."""

    name: str
    prepare: nn.Module | None
    model: nn.Module
    trunk: Trunk


def alone(stages: Sequence[Stage], inputs: Inputs) -> list[tuple[str, float, float]]:
    """Each model by itself: its name, its share of the last one's FLOPs on ``inputs``, its accuracy on the test part."""
    args, kwargs = as_call(inputs)
    flops = []
    for stage in stages:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            stage.trunk.model(*args, **kwargs)
        flops.append(counter.get_total_flops())
    return [(stage.name, n / flops[-1], stage.trunk.accuracy) for stage, n in zip(stages, flops, strict=True)]


def _stage(name: str, prepare: nn.Module | None, got: Trunk) -> Stage:
    return Stage(name, prepare, got.model.model if isinstance(got.model, models.Prepared) else got.model, got)


def image_stages(*, quick: bool = False, seed: int = 0) -> list[Stage]:
    """Three models for CIFAR-10, the cheapest first."""
    return [
        _stage("tinyconv", models.Resize(16), tinyconv_trunk(quick=quick, seed=seed)),
        _stage("resnet8", None, resnet8_trunk(quick=quick, seed=seed)),
        _stage("resnet20", None, resnet_trunk(quick=quick, seed=seed)),
    ]


def text_stages(*, quick: bool = False, seed: int = 0) -> list[Stage]:
    """Three models for reviews, the cheapest first. The bag of words, which costs nothing, learns from all of them."""
    folder = datasets.minilm(standin=quick)
    data = reviews(quick)
    bag = Recipe("bagofwords-imdb", 6, 64, 3e-3, weight_decay=0.05, seed=seed)
    half = Recipe("minilm3-imdb", 1, 32, 1e-4, bf16=True, seed=seed, rows=16_000)
    if quick:
        bag = Recipe("bagofwords-imdb-quick", 6, 32, 1e-2, seed=seed, standin=True)
        half = Recipe("minilm3-imdb-quick", 3, 32, 5e-3, seed=seed, rows=256, standin=True)

    def words() -> nn.Module:
        from transformers import AutoConfig

        return models.BagOfWords(AutoConfig.from_pretrained(folder).vocab_size)

    return [
        _stage("bagofwords", None, trunk(bag, words, data)),
        _stage("minilm3", None, trunk(half, lambda: models.minilm_classifier(folder, seed=seed, layers=3), data)),
        _stage("minilm6", None, minilm_trunk(quick=quick, seed=seed)),
    ]
