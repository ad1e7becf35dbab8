"""The price of a FLOP while gates are trained: a controller that steers the mean cost towards a target.

With cost c as a fraction of the full model's FLOPs and target t, after every batch

    m     = memory * m + (1 - memory) * mean(c)
    e     = m - t
    i     = clamp(i + rate * e, 0, ceiling)
    price = clamp(i + gain * e, 0, ceiling)

which is dual ascent on the constraint E[c] <= t, with a proportional part against overshoot: a plain integral would go
on rising until the gates close at last, and then close too many of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from eecompile.errors import EecompileError


@dataclass(frozen=True)
class Steering:
    """How a price follows the cost.

    Args:
        target: Cost that training steers towards, a fraction of the full model's; None keeps the price as it is.
        price: Price to begin with: loss per full model's FLOPs.
        rate: Of the integral part, per batch.
        gain: Of the proportional part.
        ceiling: The price never exceeds it.
        memory: Share of the old mean in a new one.
    """

    target: float | None = 0.6
    price: float = 0.0
    rate: float = 0.05
    gain: float = 2.0
    ceiling: float = 20.0
    memory: float = 0.9

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target <= 1:
            raise EecompileError("target cost is out of range", got=self.target, wanted="a fraction above 0, at most 1")
        for name in ("price", "rate", "gain", "ceiling"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise EecompileError(f"{name} of the steering must be 0 or more", got=value)
        if not 0 <= self.memory < 1:
            raise EecompileError("memory of the mean cost is out of range", got=self.memory, wanted="0 to below 1")


@dataclass
class Price:
    """The price now. Numbers only: they are part of a checkpoint."""

    steering: Steering
    now: float = field(default=math.nan)
    integral: float = field(default=math.nan)
    cost: float | None = None

    def __post_init__(self) -> None:
        self.load_state({})

    def follow(self, cost: float) -> None:
        """Moves on after a batch of mean cost `cost`; one that is not finite is not followed."""
        s = self.steering
        if not math.isfinite(cost):
            return
        self.cost = cost if self.cost is None else s.memory * self.cost + (1 - s.memory) * cost
        if s.target is None:
            return
        error = self.cost - s.target
        self.integral = min(max(self.integral + s.rate * error, 0.0), s.ceiling)
        self.now = min(max(self.integral + s.gain * error, 0.0), s.ceiling)

    def state(self) -> dict[str, Any]:
        return {"now": self.now, "integral": self.integral, "cost": self.cost}

    def load_state(self, state: dict[str, Any]) -> None:
        self.now = state.get("now", self.steering.price)
        self.integral = state.get("integral", self.steering.price)
        self.cost = state.get("cost")
