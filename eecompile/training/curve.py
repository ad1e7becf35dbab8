"""Trade-off curves: one threshold at every open exit, one halting threshold, or one budget that no row may exceed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.plain import check_numbers
from eecompile.runtime.limits import deepest

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


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


def thresholds_of(points: bool | int | Sequence[float]) -> list[float]:
    """From 0 to 1, 21 of them or so many, or those that are given."""
    if isinstance(points, bool):
        points = 21
    if not isinstance(points, int):
        check_numbers("curve=, thresholds or how many,", points, least=0)
        return [float(t) for t in points]
    if points < 2:
        raise EecompileError("a curve needs at least two points", got=points)
    found: list[float] = torch.linspace(0, 1, points).tolist()
    return found


def sweep(
    fast: CompiledModule,
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
    thresholds = thresholds_of(points)
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


def degradation(
    fast: CompiledModule, index: Tensor, scores: Tensor | None, valid: Tensor, budgets: bool | Sequence[float]
) -> list[dict[str, Any]]:
    """One dict per budget: budget, accuracy (None without labels), mean cost, share of the rows that it stopped.

    A budget below the first open exit gives that exit's answers: nothing less can be had.

    Args:
        index: int64 `[n]`, the exit that each row takes by itself.
        scores: float64 `[n, E + 1]`.
    """
    is_open = [t <= 1 for t in fast.thresholds.tolist()]
    costs = fast.costs(tuple(is_open)).double().cpu()
    exits = [k for k, o in enumerate(is_open) if o]
    wanted = [float(costs[k]) for k in (*exits, len(is_open))] if isinstance(budgets, bool) else list(budgets)
    found = []
    for budget in wanted:
        last, _ = deepest(budget, costs.tolist(), exits)
        at = index if last is None else index.clamp(max=last)
        accuracy = None
        if scores is not None and bool(valid.any()):
            accuracy = float(scores.gather(1, at[:, None])[valid, 0].mean())
        stopped = float((index > at).double().mean())
        found.append({"budget": budget, "accuracy": accuracy, "cost": float(costs[at].mean()), "stopped": stopped})
    return found
