"""p-values for "the mean drop is above alpha", and testing many such hypotheses at once. float64 throughout.

H: E[D] > alpha, from n independent drops D = full score - early score in [-1, 1].

- Binary scores: `P(Bin(n, alpha) <= s)`, exact, with s the rows where the full model is right and the early answer wrong.
  Gains are not counted, so it bounds more than the drop.
- Betting (Waudby-Smith and Ramdas 2023): `1 / max over t of prod over i <= t of (1 + bet (alpha - D_i))`. Under H the
  product is a nonnegative supermartingale, so by Ville's inequality this is a p-value, at whatever t one looks. Gains count,
  and so does a small variance. The bet is fixed before the tested rows are seen: it is the one for n rows and the variance
  of other rows, `sqrt(2 log(1 / level) / (n variance))`, at most 0.9 of `1 / (1 - alpha)`, with which no factor is negative.

Where no row has a drop the first is `(1 - alpha)^n`, the second a little more: fewer than `log(delta) / log(1 - alpha)` rows
can never show anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def log_binomial_tail(k: Tensor, n: int, p: float) -> Tensor:
    """`log P(Bin(n, p) <= k)`, float64, for whole numbers `k` of any shape; -inf below 0, 0 from n on."""
    if not 0 <= p <= 1:
        raise ValueError(f"p = {p} is no probability")
    k = k.double()
    if p == 0 or n == 0:
        return torch.where(k >= 0, 0.0, -math.inf).double()
    if p == 1:
        return torch.where(k >= n, 0.0, -math.inf).double()
    most = int(k.max().clamp(0, n)) if k.numel() else 0
    i = torch.arange(most + 1, dtype=torch.float64)
    choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    cumulative = torch.logcumsumexp(choose + i * math.log(p) + (n - i) * math.log1p(-p), 0).clamp(max=0)
    found = cumulative[k.clamp(0, most).long()]
    return torch.where(k < 0, -math.inf, torch.where(k >= n, 0.0, found))


def exact_binomial(total: Tensor, n: int, alpha: float) -> Tensor:
    """p-values for binary losses with sums `total`, float64 of the same shape."""
    return log_binomial_tail(torch.floor(total.double() + _ROUNDING), n, alpha).exp()


def betting(drops: Tensor, alpha: float, bet: float) -> float:
    """p-value of drops float64 `[n]` in their order, for a bet that does not depend on them."""
    wealth = torch.log1p(bet * (alpha - drops.double())).cumsum(0)
    return math.exp(-max(0.0, float(wealth.max()))) if len(drops) else 1.0


@dataclass(frozen=True)
class Bet:
    """Which test is used, and with which bet: chosen by other rows than those that are tested.

    Attributes:
        size: Of the bet; None for the exact binomial test.
        expected: Logarithm of the p-value that the other rows let expect.
    """

    size: float | None
    expected: float

    def p_value(self, drops: Tensor, alpha: float) -> float:
        """Of drops float64 `[n]` of the rows of the test, in their order."""
        if alpha <= 0 or not len(drops):
            return 1.0
        if self.size is None:
            return float(exact_binomial((drops > 0).sum(), len(drops), alpha))
        return betting(drops, alpha, self.size)


def best_bet(drops: Tensor, n: int, alpha: float, level: float, *, binary: bool, doubt: float = 0.0) -> Bet:
    """The sharper test for n rows that are drawn like these, of which none is tested.

    Args:
        drops: float64 `[m]`.
        binary: Whether scores are 0 or 1.
        doubt: So many more lost rows than were seen are expected: few rows without a drop say little. Of the gains a
            standard deviation less is expected, since settings were chosen for them.
    """
    if alpha <= 0 or n <= 0:
        return Bet(None if binary else 0.0, 0.0)
    m, drops = len(drops), drops.double()
    mean = float(drops.sum()) / max(m, 1)
    variance = max((float(drops.square().sum()) + 1) / (m + 1) - mean**2, 1e-9)
    size = min(math.sqrt(2 * math.log(1 / level) / (n * variance)), MOST / (1 - alpha))
    gains = float((drops < 0).sum())
    fewer = torch.where(drops < 0, drops * max(0.0, 1 - 1 / math.sqrt(max(gains, 1.0))), drops)
    growth = float(torch.log1p(size * (alpha - fewer)).sum()) + doubt * math.log1p(size * (alpha - 1))
    expected = min(0.0, -n * growth / (m + doubt) - LOOKS) if m else 0.0
    if binary:
        lost = (float((drops > 0).sum()) + doubt) * n / max(m, 1)
        low, high = log_binomial_tail(torch.tensor([math.floor(lost), math.floor(lost) + 1]), n, alpha).tolist()
        exact = low + (lost - math.floor(lost)) * (high - low)
        if exact <= expected or gains < LEAST_GAINS:
            return Bet(None, exact)
    return Bet(size, expected)


LEAST_GAINS = 10  # seen, before a bet counts on them
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


_ROUNDING = 1e-9  # sums of up to 1e6 fractions carry less than this
