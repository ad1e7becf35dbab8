"""What a call may spend: a deadline, a budget, and an interrupt from another thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eecompile.errors import StrategyError, shown
from eecompile.plain import plain

NAMES = ("deadline_ms", "budget")
ROUNDING = 1e-6  # by which costs in float32 may differ: a budget equal to the cost of an exit reaches it


@dataclass(frozen=True)
class Limits:
    """What the caller asked for.

    Args:
        deadline_ms: Milliseconds from the start of the call; 0 or less has passed already.
        budget: Most that any row may cost, as a fraction of the full model's FLOPs.
    """

    deadline_ms: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            value = plain(getattr(self, name))
            if value is None:
                continue
            object.__setattr__(self, name, value)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise StrategyError(f"{name}= is a number", got=shown(value))
        if self.budget is not None and self.budget <= 0:
            raise StrategyError("a budget is a positive fraction of the full model's cost", got=self.budget)

    def __bool__(self) -> bool:
        return self.deadline_ms is not None or self.budget is not None


@dataclass(frozen=True)
class Allowance:
    """Limits as an executor reads them.

    Attributes:
        deadline: On the clock of the executor's `StageTimes`, in seconds.
        deepest: The last exit that the budget pays for; None for no such limit.
        over: Whether even the first open exit is beyond the budget.
    """

    deadline: float | None = None
    deepest: int | None = None
    over: bool = False


def deepest(budget: float, costs: Sequence[float], open_exits: Sequence[int]) -> tuple[int | None, bool]:
    """The last place that a row may go to, None for the model's own end; and whether even the first is too much.

    Args:
        costs: Of a row that leaves at each exit and, last, at the model's own end.

    Raises:
        StrategyError: A budget that nothing could use up: a percentage, most likely.
    """
    most = max(1.0, costs[-1])
    if budget > most + ROUNDING:
        raise StrategyError(
            "a budget is a fraction of the full model's cost",
            got=budget,
            wanted=f"above 0, at most {most:.4g}",
            hint="give 0.5 for half of it, and leave it out for no limit",
        )
    if costs[-1] <= budget + ROUNDING:
        return None, False
    if not open_exits:
        raise no_exit("budget")
    fits = [k for k in open_exits if costs[k] <= budget + ROUNDING]
    return (fits[-1], False) if fits else (open_exits[0], True)


def no_exit(what: str) -> StrategyError:
    return StrategyError(
        f"a {what} cannot be kept: every exit is closed, so there is nothing to stop at",
        hint="open exits with fast.set_thresholds(1.0): hardly any row exits there by itself, every row may be stopped",
    )


def own_names(parameters: Sequence[Any], inputs: Sequence[Any]) -> frozenset[str]:
    """Names of the model's own arguments."""
    return frozenset(p.name for p in parameters) | frozenset(i.path for i in inputs)
