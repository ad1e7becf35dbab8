"""What early exit is compared with: no choice at all, a random choice, a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.evidence import Evidence


@dataclass
class Baseline:
    """Something simpler than a decision for each row, at the cost of the calibrated program or less.

    Attributes:
        name: "one exit for all rows", "random exits" or "static model".
        what: Which exits or which model.
        cost: Mean fraction of the full model's FLOPs.
        drop: Mean score of the full model less its own, on all calibration rows.
        beaten: Whether the calibrated program loses less.
    """

    name: str
    what: str
    cost: float
    drop: float
    beaten: bool


def baselines(drops: Evidence, report: Any, lost: Tensor | None, static: tuple[Any, float] | None) -> list[Baseline]:
    """On all calibration rows, at the cost of the report; none where nothing qualified.

    Args:
        drops: With the signed drop as loss.
        lost: Drop [n] of the smaller model that `static` holds with its cost.
    """
    if not report.qualified:
        return []
    cost, drop = report.expected_cost, report.drop
    names = [part.name for part in report.parts]
    alone = [tuple(j == k for j in range(drops.exits)) for k in range(drops.exits)]
    points = [(float(drops.costs(alone[k])[k]), float(drops.loss[:, k].mean()), names[k]) for k in range(drops.exits)]
    points.append((float(drops.costs((False,) * drops.exits)[-1]), 0.0, names[-1]))
    found = []
    constant = min((p for p in points if p[0] <= cost + 1e-9), key=lambda p: p[1], default=None)
    if constant is not None:
        found.append(Baseline("one exit for all rows", constant[2], *constant[:2], beaten=drop < constant[1]))
    if mixed := mixtures(points, cost):
        least, which = min(mixed)
        found.append(Baseline("random exits", which, cost, least, beaten=drop < least))
    if static is not None and lost is not None:
        mean = float(lost.mean())
        found.append(Baseline("static model", "as given", static[1], mean, beaten=static[1] > cost or drop < mean))
    return found


def mixtures(points: Sequence[tuple[float, float, str]], cost: float) -> list[tuple[float, str]]:
    """Values at a mean cost of a random choice between two points (cost, value, name), for every pair around that cost."""
    return [
        (v + (w - v) * (cost - c) / (d - c), f"{one} or {other}")
        for c, v, one in points
        for d, w, other in points
        if c <= cost < d
    ]


def auroc(confidence: Tensor, harm: Tensor) -> float | None:
    """Probability that a row without harm is surer than one with, ties counting half; None without both.

    Args:
        confidence: float32 `[n]`.
        harm: bool `[n]`: full model right, early answer wrong.
    """
    bad, good = confidence[harm].double().sort().values, confidence[~harm].double()
    if not len(bad) or not len(good):
        return None
    below, upto = torch.searchsorted(bad, good), torch.searchsorted(bad, good, right=True)
    return float((below + upto).double().mean() / (2 * len(bad)))
