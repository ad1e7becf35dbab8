"""What early exit is compared with: no choice at all, a random choice, a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Point(NamedTuple):
    """A choice that does not look at the row: its name, mean cost and mean drop."""

    what: str
    cost: float
    drop: float


def constant(points: Sequence[Point], cost: float) -> Point | None:
    """The best one for all rows at this cost or less."""
    return min((p for p in points if p.cost <= cost + 1e-9), key=lambda p: p.drop, default=None)


def mixed(points: Sequence[Point], cost: float) -> Point | None:
    """The best of two, drawn at random for each row, at this mean cost."""
    found = [
        Point(f"{p.what} or {q.what}", cost, p.drop + (q.drop - p.drop) * (cost - p.cost) / (q.cost - p.cost))
        for p in points for q in points if p.cost <= cost < q.cost
    ]  # fmt: skip
    return min(found, key=lambda p: (p.drop, p.what), default=None)


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
    points = [Point(names[k], float(drops.costs(alone[k])[k]), float(drops.loss[:, k].mean())) for k in range(drops.exits)]
    points.append(Point(names[-1], float(drops.costs((False,) * drops.exits)[-1]), 0.0))
    simpler = {"one exit for all rows": constant(points, cost), "random exits": mixed(points, cost)}
    found = [Baseline(name, *point, beaten=drop < point.drop) for name, point in simpler.items() if point is not None]
    if static is not None and lost is not None:
        mean = float(lost.mean())
        found.append(Baseline("static model", "as given", static[1], mean, beaten=static[1] > cost or drop < mean))
    return found


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
