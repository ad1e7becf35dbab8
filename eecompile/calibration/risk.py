"""p-values for "the mean drop is above alpha", and testing many such hypotheses at once. float64 throughout.

H: E[D] > alpha, from n independent drops D = full score - early score in [-1, 1].

- Scores of 0 or 1: an exact test of the losses and the gains, see `paired`.
- Other scores, betting (Waudby-Smith and Ramdas 2023): `1 / max over t of prod over i <= t of (1 + bet (alpha - D_i))`.
  Under H the product is a nonnegative supermartingale, so by Ville's inequality this is a p-value, at whatever t one looks.
  Gains count, and so does a small variance. The bet is fixed before the tested rows are seen: it is the one for n rows and
  the variance of other rows, `sqrt(2 log(1 / level) / (n variance))`, at most 0.9 of `1 / (1 - alpha)`, with which no factor
  is negative.

Where no row has a drop neither is below `(1 - alpha)^n`: fewer than `log(delta) / log(1 - alpha)` rows can never show
anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.binomial import log_binomial_tail
from eecompile.calibration import paired


def betting(drops: Tensor, alpha: float, bet: float) -> float:
    """p-value of drops float64 `[n]` in their order, for a bet that does not depend on them."""
    wealth = torch.log1p(bet * (alpha - drops.double())).cumsum(0)
    return math.exp(-max(0.0, float(wealth.max()))) if len(drops) else 1.0


@dataclass(frozen=True)
class PlannedTest:
    """Which test is used, with what is fixed by other rows than those that are tested.

    Attributes:
        bet: Its size; None for the exact test of scores of 0 or 1.
        expected: Logarithm of the p-value that the other rows let expect.
        slack: See `paired`.
    """

    bet: float | None
    expected: float
    slack: float = 1e-4

    def p_value(self, drops: Tensor, alpha: float) -> float:
        """Of drops float64 `[n]` of the rows of the test, in their order."""
        if alpha <= 0 or not len(drops):
            return 1.0
        if self.bet is None:
            return paired.p_value(int((drops > 0).sum()), int((drops < 0).sum()), len(drops), alpha, self.slack)
        return betting(drops, alpha, self.bet)


def planned(drops: Tensor, n: int, alpha: float, level: float, *, binary: bool, doubt: float = 0.0) -> PlannedTest:
    """The test of n rows that are drawn like these, of which none is tested.

    Args:
        drops: float64 `[m]`.
        binary: Whether scores are 0 or 1.
        doubt: So many more lost rows than were seen are expected: few rows without a drop say little. Of the gains a
            standard deviation less is expected, since settings were chosen for them.
    """
    m, drops, slack = len(drops), drops.double(), SLACK * level
    bet = None if binary else 0.0
    if alpha <= 0 or n <= 0 or not m:
        return PlannedTest(bet, 0.0, slack)
    won = float((drops < 0).sum())
    fewer = max(0.0, 1 - 1 / math.sqrt(max(won, 1.0)))
    if binary:
        lost = float((drops > 0).sum()) + doubt
        if won < LEAST_GAINS:
            return PlannedTest(None, _log_tail(lost * n / m, n, alpha), slack)
        rates = torch.tensor([[lost], [won * fewer]], dtype=torch.float64) * (n / (m + doubt))
        return PlannedTest(None, float(torch.special.log_ndtr(paired.score(rates[0], rates[1], n, alpha))), slack)
    variance = max((float(drops.square().sum()) + 1) / (m + 1) - float(drops.mean()) ** 2, 1e-9)
    bet = min(math.sqrt(2 * math.log(1 / level) / (n * variance)), MOST / (1 - alpha))
    expected = torch.where(drops < 0, drops * fewer, drops)
    growth = float(torch.log1p(bet * (alpha - expected)).sum()) + doubt * math.log1p(bet * (alpha - 1))
    return PlannedTest(bet, min(0.0, -n * growth / (m + doubt) - LOOKS), slack)


def _log_tail(k: float, n: int, p: float) -> float:
    """`log P(Bin(n, p) <= k)`, linear between whole numbers."""
    below, above = log_binomial_tail(torch.tensor([math.floor(k), math.floor(k) + 1]), n, p).tolist()
    found: float = below + (k - math.floor(k)) * (above - below)
    return found


LEAST_GAINS = 10  # seen, before any are expected
SLACK = 1 / 500  # of delta; the smallest level of a start is a twentieth of it
MOST = 0.9  # of the largest bet that there is, at which a single lost row would take all
LOOKS = 0.5  # what the maximum over all t adds to the logarithm of the last wealth, about


def rows_needed(alpha: float, level: float) -> int | None:
    """Fewest test rows that can show `E[L] <= alpha` at this level, if none of them has a loss.

    None where no number of rows can: alpha is 0.
    """
    if alpha <= 0:
        return None
    n = max(1, math.ceil(math.log(level) / math.log1p(-alpha)))
    while n * math.log1p(-alpha) > math.log(level):  # rounding of the quotient
        n += 1
    return n


def fallback(p_value: Callable[[int], float], count: int, levels: Mapping[int, float]) -> list[tuple[int, float]]:
    """Tests hypotheses 0 to count - 1 in order; which are rejected, and the level that each was tested at.

    The fallback procedure of Wiens (2003), of which fixed-sequence testing is the case of a single start.
    Each start has a level of its own, the others 0; hypothesis i is tested at its own level plus, if i - 1
    was rejected, the level that i - 1 was tested at. The probability of any false rejection is at most the
    sum of the levels, whatever the dependence between the p-values.

    Args:
        p_value: Called for those hypotheses only that have a level above 0.
        levels: Index to level, for the starts.
    """
    rejected = []
    carried = 0.0
    for i in range(count):
        level = carried + levels.get(i, 0.0)
        if level > 0 and p_value(i) <= level:
            rejected.append((i, level))
            carried = level
        else:
            carried = 0.0
    return rejected
