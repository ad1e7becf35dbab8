"""p-values for "the mean loss is above alpha", and testing many such hypotheses at once. float64 throughout.

H: E[L] > alpha, from n independent losses in [0, 1] with sum s.

- Binary losses: `P(Bin(n, alpha) <= s)`, exact. It is a p-value because the binomial distribution grows with
  alpha.
- Losses in [0, 1]: Hoeffding-Bentkus (Bates et al. 2021, used by Learn then Test, Angelopoulos et al. 2021),
  `min(exp(-n h(min(m, alpha), alpha)), e P(Bin(n, alpha) <= ceil(s)))` with `m = s / n` and
  `h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))`.

Both are `(1 - alpha)^n` for s = 0, so fewer than `log(delta) / log(1 - alpha)` rows can never show anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

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


def hoeffding_bentkus(total: Tensor, n: int, alpha: float) -> Tensor:
    """p-values for losses in [0, 1] with sums `total`, float64 of the same shape."""
    total = total.double()
    m = (total / n).clamp(max=alpha)
    divergence = torch.xlogy(m, m / alpha) + torch.xlogy(1 - m, (1 - m) / (1 - alpha)) if alpha > 0 else 0 * m
    hoeffding = (-n * divergence).exp()
    bentkus = (1 + log_binomial_tail(torch.ceil(total - _ROUNDING), n, alpha)).exp()
    return torch.minimum(hoeffding, bentkus).clamp(max=1)


def p_values(total: Tensor, n: int, alpha: float, *, binary: bool) -> Tensor:
    """The sharper of the two where losses are binary, else Hoeffding-Bentkus. 1 where `n` is 0."""
    if n == 0 or alpha <= 0:
        return torch.ones_like(total, dtype=torch.float64)
    return (exact_binomial if binary else hoeffding_bentkus)(total, n, alpha)


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
