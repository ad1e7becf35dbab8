"""The trade-off curve: accuracy and cost when one threshold is used at every open exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.training.protocol import Compiled


def first_exit(confidences: Tensor, thresholds: Tensor) -> Tensor:
    """Exit that each row leaves at: the first with `confidence >= threshold`, else E.

    Args:
        confidences: `[n, E]` float32; NaN never leaves.
        thresholds: `[E]` float32; above 1 an exit is closed.

    Returns:
        int64 `[n]`.
    """
    n, e = confidences.shape
    sure = (confidences >= thresholds) & (thresholds <= 1) & confidences.isfinite()
    # argmax gives the first of equal values; the last column catches those that are never sure
    return torch.cat((sure, sure.new_ones(n, 1)), 1).to(torch.uint8).argmax(1) if e else torch.zeros(n).long()


def sweep(
    fast: Compiled,
    confidences: Tensor,
    scores: Tensor | None,
    valid: Tensor,
    points: bool | int | Sequence[float],
) -> list[dict[str, Any]]:
    """One dict per threshold: threshold, accuracy (None without labels), cost, early (share leaving
    early)."""
    if any(record.criterion.stateful for record in fast.exits):
        raise EecompileError(
            "there is no trade-off curve for a criterion with state",
            got=sorted({record.criterion.name for record in fast.exits}),
            hint="set thresholds one after the other and evaluate each",
        )
    if isinstance(points, bool):
        points = 21
    if isinstance(points, int):
        if points < 2:
            raise EecompileError("a curve needs at least two points", got=points)
        thresholds = torch.linspace(0, 1, points).tolist()
    else:
        thresholds = [float(t) for t in points]
    now_open = fast.thresholds.cpu() <= 1
    if not bool(now_open.any()):
        now_open = torch.ones_like(now_open)  # all closed: show what opening all of them would give
    costs = fast.costs(tuple(now_open.tolist())).double().cpu()
    found = []
    for threshold in thresholds:
        at = torch.where(now_open, torch.tensor(threshold, dtype=torch.float32), torch.tensor(2.0))
        index = first_exit(confidences[:, :-1], at)
        closed = threshold > 1
        cost = torch.ones(len(index), dtype=torch.float64) if closed else costs[index]
        accuracy = None
        if scores is not None and bool(valid.any()):
            accuracy = float(scores.gather(1, index[:, None])[valid, 0].mean())
        early = float((index < len(fast.exits)).double().mean())
        found.append({"threshold": threshold, "accuracy": accuracy, "cost": float(cost.mean()), "early": early})
    return found
