"""What is reached without looking at the rows: choices that are the same for all of them, or drawn by chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from eecompile.calibration.baselines import Point, constant, mixed
from eecompile.ir.settings import CLOSED
from eecompile.training.batches import batches

Constant = tuple[str, float, float]  # name, cost, accuracy


def alternatives(points: Iterable[Constant], cost: float) -> dict[str, Any]:
    """For a row of a record: ``points``, the best at this cost or less, and the best mixture of two at this mean cost.

    Args:
        points: Constant choices, on the rows that the example is measured on.
        cost: Mean cost of the example.
    """
    points = list(points)
    drops = [Point(name, cost, -accuracy) for name, cost, accuracy in points]
    found = {"constant": constant(drops, cost), "random": mixed(drops, cost)}
    best = {
        how: None if point is None else {"what": point.what, "cost": point.cost, "accuracy": -point.drop}
        for how, point in found.items()
    }
    return {**best, "constants": points}


def by_exit(fast: Any, accuracies: Sequence[float]) -> list[Constant]:
    """All rows leaving at one exit, for each and, last, the model; ``accuracies`` if they do."""
    names, count = [*(e.name for e in fast.exits), "model"], len(fast.exits)
    costs = [float(fast.costs(tuple(j == k for j in range(count)))[k]) for k in range(count + 1)]
    return list(zip(names, costs, accuracies, strict=True))


def by_gates(fast: Any, val: Iterable[Any], test: Iterable[Any]) -> list[Constant]:
    """The same gates closed for all rows, from none to all: each time the one more that loses least on ``val``.

    Cost and accuracy are those of ``test``, with every exit closed; thresholds are as before afterwards.
    """
    exits, gates = fast.thresholds.tolist(), fast.gate_thresholds.tolist()
    fast.set_thresholds([CLOSED] * len(exits))

    def measured(closed: Sequence[int], loader: Iterable[Any]) -> tuple[float, float]:
        fast.set_gate_thresholds([CLOSED if k in closed else 0.0 for k in range(len(gates))])
        right, costs = [], []
        with torch.no_grad():
            for batch in batches(loader, torch.device("cpu")):
                result = fast.run(*batch.args, **batch.kwargs)
                right.append(fast.prediction_of(result.output).argmax(-1) == batch.labels)
                costs.append(result.cost)
        return float(torch.cat(costs).mean()), float(torch.cat(right).float().mean())

    closed: list[int] = []
    points = [("all gates open", *measured(closed, test))]
    while len(closed) < len(gates):
        left = [k for k in range(len(gates)) if k not in closed]
        closed.append(max(left, key=lambda k: measured([*closed, k], val)[1]))
        points.append((f"closed: {', '.join(fast.gates[k].region for k in closed)}", *measured(closed, test)))
    fast.set_thresholds(exits)
    fast.set_gate_thresholds(gates)
    return points
