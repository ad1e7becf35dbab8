"""Load, accuracy and cost of every route of a router, and whether its choice still depends on the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

STUCK = 0.01
SAME = 0.005  # standard deviation over the rows of a probability that no longer depends on the input
ADVICE = "Lower price= or raise target_cost=, give balance= a weight, train longer, or lower lr=."


@dataclass
class RouteRow:
    """What the router did over an epoch.

    Attributes:
        cost: Mean fraction of the full model's FLOPs, with all exits closed where rows go to branches.
        share: Share of the rows that took each route, as decisions were taken in this run.
        accuracy: Mean score of the rows on each route; None where there is none.
        decided: Share of the rows that each route is decided for by the router's probabilities.
        spread: Standard deviation over the rows of each route's probability; None in records from before it was kept.
    """

    cost: float
    share: list[float]
    accuracy: list[float | None]
    decided: list[float]
    spread: list[float] | None = None

    @classmethod
    def of(cls, sums: list[float] | None, rows: int) -> RouteRow | None:
        """From sums `[1 + 6 K]` in the order of `step.routed`; None where there are none."""
        if not sums or not rows:
            return None
        k = (len(sums) - 1) // 6
        took, labelled, score, decided, p, squares = (sums[1 + i * k : 1 + (i + 1) * k] for i in range(6))
        spread = [max(s / rows - (m / rows) ** 2, 0.0) ** 0.5 for m, s in zip(p, squares, strict=True)]
        accuracy = [s / n if n else None for s, n in zip(score, labelled, strict=True)]
        return cls(sums[0] / rows, [t / rows for t in took], accuracy, [d / rows for d in decided], spread)

    @property
    def score(self) -> float | None:
        """Mean score of all rows that took a route; None where there is none."""
        known = [(s, a) for s, a in zip(self.share, self.accuracy, strict=True) if a is not None]
        total = sum(s for s, _ in known)
        return sum(s * a for s, a in known) / total if total else None

    def collapse(self, names: Sequence[str]) -> str | None:
        """How the router has collapsed: one route for all rows but one in a hundred, or the same probabilities for all rows.

        None where it has not.
        """
        there = sum(self.decided)  # rows that had left before have no route
        if there <= 0:
            return None
        for name, share in zip(names, self.decided, strict=True):
            if share >= (1 - STUCK) * there:
                return f"all rows go to {name} whatever the input is"
        if self.spread is not None and max(self.spread) < SAME:
            return f"every row has the same probabilities (their spread is {max(self.spread):.2g} at most)"
        return None


def collapsed(row: Any, names: Sequence[str]) -> str | None:
    """Of the last epoch, on validation data where there is some; None without a router."""
    last = None if row is None else row.val_routes or row.routes
    return None if last is None else last.collapse(names)


@dataclass
class RouteShare:
    """One route on evaluated rows.

    Attributes:
        to: "exit" or "branch".
        share: The load: share of all rows that took it.
        cost: Mean fraction of the full model's FLOPs spent on those.
        accuracy: Their mean score; None where no row took it, or without labels.
        full_accuracy: What the full model would have reached on them.
    """

    name: str
    to: str
    share: float
    cost: float | None
    accuracy: float | None
    full_accuracy: float | None


def route_shares(
    fast: CompiledModule, route: Tensor, cost: Tensor, score: Tensor | None, full: Tensor | None, valid: Tensor
) -> list[RouteShare]:
    """One entry per route, and "left before" for rows that an exit took before the branches, where there are such.

    Args:
        route: [n] int64.
        cost: float64 [n].
        score: float64 [n] of the answers that were given; None without labels.
        full: float64 [n] of the full model.
        valid: bool [n], rows with a label.
    """
    records = [(r.name, r.to) for r in fast.routes]
    kinds = [*enumerate(records), *([(-1, ("left before", "exit"))] if bool((route < 0).any()) else [])]
    found = []
    for k, (name, to) in kinds:
        mine = route == k
        labelled = mine & valid
        mean = [None if s is None or not bool(labelled.any()) else float(s[labelled].mean()) for s in (score, full)]
        spent = float(cost[mine].mean()) if bool(mine.any()) else None
        found.append(RouteShare(name, to, float(mine.double().mean()), spent, mean[0], mean[1]))
    return found
