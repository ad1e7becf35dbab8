"""Tests that may be looked at after every row: a betting confidence sequence for a mean, an e-process for a mix of exits.

**Mean.** For losses in [low, 1] and the hypothesis "the mean is at most m" the wealth `mean over bets b of prod (1 + b (L -
m))` is a nonnegative supermartingale for bets b in [0, 1 / (m - low)), so it ever reaches 1 / alpha with probability at most
alpha (Ville; Waudby-Smith and Ramdas 2023). All m whose wealth has reached it are ruled out: the largest is a lower bound of
the mean that holds at all times at once.

**Mix.** Counts of exits on the calibration rows and since are drawn from one distribution, or from two: the ratio of the two
marginal likelihoods under uniform (Dirichlet) priors. It is an e-process for a distribution drawn from that prior, and for
no fixed one, so it warns and promises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIMITS: tuple[float, ...] = (*(k / 400 for k in range(1, 40)), *(k / 100 for k in range(10, 100)))
"""Means that the lower bound can take."""
BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Shares of the largest bet that there is; losses of a few percent want small ones against a rise of a few."""


@dataclass
class MeanAbove:
    """The test of "the mean is at most `limit`".

    Attributes:
        limit: The largest mean that is no cause for an alarm.
        low: Smallest value that a loss can have: 0, or -1 for signed ones.
        rows: How many losses were seen; `total` is their sum.
        wealth: Logarithm for each bet; `largest` of the mean of all there ever was.
        history: Pairs (rows, logarithm of the wealth), thinned out as they grow.
    """

    limit: float
    low: float = 0.0
    rows: int = 0
    total: float = 0.0
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(BETS))
    largest: float = 0.0
    history: list[list[float]] = field(default_factory=lambda: [[0, 0.0]])

    def add(self, losses: Sequence[float]) -> None:
        for loss in losses:
            self.rows += 1
            self.total += loss
            most = 1 / max(self.limit - self.low, 1e-9)
            self.wealth = [w + math.log1p(b * most * (loss - self.limit)) for w, b in zip(self.wealth, BETS, strict=True)]
            self.largest = max(self.largest, self.now)
            self.history.append([self.rows, self.now])
        if len(self.history) > MOST_POINTS:
            self.history = [*self.history[:-1:2], self.history[-1]]

    @property
    def now(self) -> float:
        """Logarithm of the wealth."""
        top = max(self.wealth)
        return top + math.log(sum(math.exp(w - top) for w in self.wealth) / len(self.wealth))

    def alarm(self, alpha: float) -> bool:
        """Whether the wealth has ever reached 1 / alpha."""
        return self.largest >= -math.log(alpha)

    @property
    def mean(self) -> float | None:
        return self.total / self.rows if self.rows else None


@dataclass
class LowerBound:
    """The largest mean that losses in [0, 1] rule out, at all times at once: `MeanAbove` for many limits."""

    wealth: list[list[float]] = field(default_factory=lambda: [[0.0] * len(BETS) for _ in LIMITS])
    ruled_out: float = 0.0

    def add(self, losses: Sequence[float], alpha: float) -> float:
        """The bound, with these losses too."""
        if not losses:
            return self.ruled_out
        m = torch.tensor(LIMITS, dtype=torch.float64)[:, None]
        factors: Tensor = torch.tensor(BETS, dtype=torch.float64) / m
        wealth = torch.tensor(self.wealth, dtype=torch.float64)
        for loss in losses:
            wealth = wealth + torch.log1p(factors * (loss - m))
            reached = torch.logsumexp(wealth, 1) - math.log(len(BETS)) >= -math.log(alpha)
            if bool(reached.any()):
                self.ruled_out = max(self.ruled_out, LIMITS[int(reached.nonzero()[-1])])
        self.wealth = wealth.tolist()
        return self.ruled_out


MOST_POINTS = 512


def mix_evidence(before: Sequence[float], now: Sequence[float]) -> float:
    """Logarithm of the evidence that counts of exits come from two distributions in place of one."""

    def marginal(counts: Sequence[float]) -> float:
        k = len(counts)
        return math.lgamma(k) - math.lgamma(sum(counts) + k) + sum(math.lgamma(c + 1) for c in counts)

    return marginal(before) + marginal(now) - marginal([a + b for a, b in zip(before, now, strict=True)])


def sparkline(points: Sequence[Sequence[Any]], width: int = 60) -> str:
    """The second numbers of the points, as a line of blocks from their least to their largest."""
    values = [float(p[1]) for p in points]
    step = max(1, math.ceil(len(values) / width))
    shown = [max(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(shown), max(shown)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low))] if high > low else "▁" for v in shown)
