"""What `advise` projects on a sample, against `fit` on training rows and `calibrate` on all validation rows.

Six pairs of a trained model and its data: three of images, digits, readings of a process, and words of generated code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eecompile import advise, eecompile
from eecompile.cli.data import digit_images
from eecompile.cli.digits_net import DigitsNet, train
from examples import datasets, generated, trunks
from tests.bench.groups import Context
from tests.bench.record import Figure, Target

DROPS = (0.01, 0.02)
EPOCHS, FIT_EPOCHS = 12, 3
ROWS, FIT_ROWS = 8000, 10_000  # for advice and calibration, and to fit heads on


@dataclass(frozen=True)
class Pair:
    """A model and its data: batches to fit heads on, and others for advice and calibration."""

    model: nn.Module
    fitted: Any
    held_out: Any
    strategy: str = "branchy"


def digits(small: bool) -> Pair:
    """A network trained here on 800 digits of scikit-learn; the other 997 are held out."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    x, y = images[order], labels[order]
    torch.manual_seed(0)
    model = DigitsNet()
    train(model, x[:800], y[:800], epochs=1 if small else EPOCHS)
    fitted, held_out = (DataLoader(TensorDataset(x[p], y[p]), 32) for p in (slice(0, 800), slice(800, None)))
    return Pair(model, fitted, held_out)


def images(name: str, trunk: Callable[[], trunks.Trunk], small: bool) -> Pair:
    fitted, held_out = (DataLoader(datasets.load(name, *part), 32) for part in (("train", FIT_ROWS), ("test", ROWS)))
    return Pair(trunk().model, fitted, held_out)


def charts(small: bool) -> Pair:
    drawn = (generated.control_charts(FIT_ROWS, 0), generated.control_charts(ROWS, 2))
    fitted, held_out = (DataLoader(TensorDataset(*rows), 32) for rows in drawn)
    return Pair(trunks.charts_trunk().model, fitted, held_out)


def code(small: bool) -> Pair:
    """A tenth of the rows: each has some 35 labels."""
    parts = []
    for count, seed in ((FIT_ROWS // 10, 0), (ROWS // 10, 2)):
        words, tags = generated.code(count, seed)
        rows = zip(words.split(32), tags.split(32), strict=True)
        parts.append([({"input_ids": w, "attention_mask": (t != generated.IGNORE).long()}, t) for w, t in rows])
    return Pair(trunks.code_trunk().model, *parts, strategy="mebert")


PAIRS: dict[str, Callable[[bool], Pair]] = {
    "digits, a CNN": digits,
    "MNIST, LeNet": partial(images, "mnist", trunks.lenet_trunk),
    "Fashion-MNIST, ResNet-8": partial(images, "fashion_mnist", trunks.fashion_trunk),
    "CIFAR-10, ResNet-20": partial(images, "cifar10", trunks.resnet_trunk),
    "control charts, a CNN": charts,
    "generated code, BERT with 4 layers": code,
}


def run(context: Context) -> list[Figure]:
    figures = []
    for name, make in list(PAIRS.items())[: 1 if context.small else None]:
        pair = make(context.small)
        advice = advise(pair.model, pair.held_out, minutes=0.2 if context.small else 5, only=[pair.strategy])
        inputs = next(iter(pair.held_out))[0]
        example = {"example_kwargs": inputs} if isinstance(inputs, dict) else {"example_inputs": (inputs,)}
        fast = eecompile(pair.model, pair.strategy, **example)
        fast.fit(pair.fitted, epochs=FIT_EPOCHS, trunk=False, progress=False)
        for drop in DROPS:
            projected = next(o for o in advice.options if o.kind == "strategy" and o.max_drop == drop)
            full = fast.calibrate(pair.held_out, max_drop=drop, delta=None).expected_cost
            careful = fast.calibrate(pair.held_out, max_drop=drop, delta=0.05)
            figure = Figure(
                f"{name}, {drop:.0%}",
                max(projected.cost / full, full / projected.cost),
                "times apart",
                target=Target(1.15),
                detail={
                    "strategy": pair.strategy,
                    "projected": projected.cost,
                    "interval": [projected.low, projected.high],
                    "fit and calibrate": full,
                    "with a guarantee": careful.expected_cost if careful.qualified else 1.0,
                    "accuracy of the model": advice.accuracy,
                    "rows": advice.rows,
                },
            )
            figures.append(figure)
    return figures
