"""What `advise` projects on a sample, against `fit` on the training rows and `calibrate` on all validation rows.

The models are trained on 800 digits of scikit-learn; the other 997 are for advice and calibration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eecompile import advise, eecompile
from eecompile.cli.data import digit_images
from eecompile.cli.digits_net import DigitsNet, train
from tests.bench.groups import Context
from tests.bench.record import Figure, Target

DROPS = (0.01, 0.02)
EPOCHS, FIT_EPOCHS = 12, 5


def plain() -> nn.Module:
    """Five convolutions in a line."""
    layers = [m for c in (1, 24, 24, 24, 24) for m in (nn.Conv2d(c, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def perceptron() -> nn.Module:
    """Six hidden layers of 128."""
    sizes = (64, *(128 for _ in range(6)))
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"residual": DigitsNet, "convolutions": plain, "perceptron": perceptron}


def run(context: Context) -> list[Figure]:
    images, labels = digit_images()
    figures = []
    for name, make in list(MODELS.items())[: 1 if context.small else None]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        x, y = images[order], labels[order]
        torch.manual_seed(0)
        model = make()
        train(model, x[:800], y[:800], epochs=1 if context.small else EPOCHS)
        fitted, val = (DataLoader(TensorDataset(x[p], y[p]), 32) for p in (slice(0, 800), slice(800, None)))
        advice = advise(model, val, minutes=0.2 if context.small else 2, only=["branchy"])
        fast = eecompile(model, "branchy", example_inputs=(x[:4],))
        fast.fit(fitted, epochs=FIT_EPOCHS, trunk=False, progress=False)
        for drop in DROPS:
            projected = next(o for o in advice.options if o.kind == "strategy" and o.max_drop == drop)
            full = fast.calibrate(val, max_drop=drop, delta=None).expected_cost
            careful = fast.calibrate(val, max_drop=drop, delta=0.05)
            figure = Figure(
                f"digits, {name}, {drop:.0%}",
                projected.cost / full,
                "x the cost after fit and calibrate",
                target=Target(1.15),
                detail={
                    "projected": projected.cost,
                    "interval": [projected.low, projected.high],
                    "fit and calibrate": full,
                    "with a guarantee": careful.expected_cost if careful.qualified else 1.0,
                    "accuracy of the model": advice.accuracy,
                    "rows": advice.rows,
                },
            )
            if not 1 / 1.15 <= figure.value <= 1.15:
                figure.cause = "Heads of the sample have fewer rows, and rows that the model was not trained on."
            figures.append(figure)
    return figures
