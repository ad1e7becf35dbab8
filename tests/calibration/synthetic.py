"""A compiled module whose outputs are drawn from a known distribution, so that true risks can be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.calibrate import calibrate
from eecompile.criteria import Criterion
from eecompile.result import Result
from tests.training.fake import Fake


class Drawn(Fake):
    """The input holds the logits of every exit and of the end: `[B, E + 1, C]`."""

    def __init__(self, exits: int = 3, classes: int = 3, criterion: Criterion | None = None) -> None:
        super().__init__(exits=exits, classes=classes, criterion=criterion)
        self.calls = 0

    def _outputs(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        outputs = tuple(x.unbind(1))
        scores = tuple(o.max(1).values for o in outputs[:-1]) if self.criterion.learned else None
        return outputs, scores

    def observe(self, x: Tensor) -> Result:
        self.calls += 1
        return super().observe(x)


def draw(
    n: int, exits: int = 3, classes: int = 3, seed: int = 0, skill: float = 2.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits `[n, E + 1, C]` that get better with depth, and labels `[n]`. Some rows are harder than others."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    ease = torch.rand(n, 1, 1, generator=g) * 2
    strength = torch.linspace(0.6, 1.4, exits + 1)[None, :, None] * skill * ease
    shared = torch.randn(n, 1, classes, generator=g)
    own = torch.randn(n, exits + 1, classes, generator=g)
    signal = torch.nn.functional.one_hot(y, classes)[:, None, :] * strength
    return (signal + 0.6 * shared + 0.5 * own) * scale, y


def loader(x: Tensor, y: Tensor, size: int = 500) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def calibrated(fast: Any, data: Any, **options: Any) -> Any:
    """The report of `calibrate`, and what it found set."""
    report = calibrate(fast, data, **options)
    fast.settings = report.settings
    return report
