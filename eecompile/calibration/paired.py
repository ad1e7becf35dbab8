"""Exact test of "the mean drop is above alpha" for scores of 0 or 1: of n rows, `losses` lost and `gains` won.

The statistic is the score statistic of the difference of two paired proportions (Tango 1998): the mean drop less alpha, over
its standard deviation at the most likely gain probability for which the mean drop is alpha. Its p-value is exact: the
probability of all tables of losses and gains that are at least as extreme, the largest for the gain probabilities of a
confidence interval, plus the probability `slack` that the interval misses (Hsueh, Liu and Chen 2001; Berger and Boos 1994).
For a larger drop no table is more likely to be extreme. The largest is found on a grid and then between its points: the
probability is a polynomial in that of the gains, and changes over their standard deviation. float64 throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eecompile.binomial import log_binomial_tail, log_choose

GAINS = 16  # steps of the grid: the interval has some 8 standard deviations
CLOSER = 4  # times that the stretch around the best of them is cut to two thirds
TAILS = 9.0  # standard deviations on either side of which nothing is summed


def score(losses: Tensor, gains: Tensor, n: float, alpha: float) -> Tensor:
    """Tango's statistic, float64; the arguments broadcast."""
    # the likelihood losses log(g + alpha) + gains log g + rest log(1 - alpha - 2 g) is largest at the root of a quadratic
    b = (2 * n - losses + gains) * alpha - losses - gains
    g = (torch.sqrt(b * b + 8 * n * gains * alpha * (1 - alpha)) - b) / (4 * n)
    return (losses - gains - n * alpha) / torch.sqrt(n * (2 * g + alpha - alpha * alpha))


def p_value(losses: int, gains: int, n: int, alpha: float, slack: float) -> float:
    """Of whole numbers with `losses + gains <= n`; 1 where the mean drop is alpha or more."""
    if alpha <= 0 or losses - gains >= n * alpha:
        return 1.0
    seen = float(score(torch.tensor(losses).double(), torch.tensor(gains).double(), n, alpha))
    high = math.sqrt(min(_upper(gains, n, slack / 2), (1 - alpha) / 2))
    low = min(high, math.sqrt(1 - _upper(n - gains, n, slack / 2)))
    most = torch.arange(_window(n, high**2)[1] + 1, dtype=torch.float64)
    reach = _reach(most, n, alpha, seen)

    def probability(root: float) -> float:
        return _probability(reach, n, alpha, root**2)

    step = (high - low) / GAINS
    found = [probability(low + i * step) for i in range(GAINS + 1)]
    at = max(range(GAINS + 1), key=found.__getitem__)
    left, right = low + max(at - 1, 0) * step, low + min(at + 1, GAINS) * step
    for _ in range(CLOSER):
        a, b = left + (right - left) / 3, right - (right - left) / 3
        pa, pb = probability(a), probability(b)
        found += [pa, pb]
        left, right = (left, b) if pa > pb else (a, right)
    return min(1.0, max(found) + slack)


def _reach(gains: Tensor, n: int, alpha: float, seen: float) -> Tensor:
    """For each number of gains `[k]`, the most losses that are as extreme; -1 where none are. By bisection."""
    low, high = torch.full_like(gains, -1), n - gains
    while bool((low < high).any()):
        middle = ((low + high + 1) / 2).floor()
        extreme = score(middle, gains, n, alpha) <= seen + 1e-9
        low, high = torch.where(extreme, middle, low), torch.where(extreme, high, middle - 1)
    return low


def _probability(reach: Tensor, n: int, alpha: float, g: float) -> float:
    """Of the tables within `reach` `[k]`, where gains have probability g and losses g + alpha."""
    first, last = _window(n, g)
    gains = torch.arange(first, last + 1, dtype=torch.float64)
    rest, reach = n - gains, reach[first : last + 1]
    p = min(1.0, (g + alpha) / (1 - g))  # of a row that is no gain to be a loss
    of_gains = log_choose(torch.tensor(n), gains) + torch.xlogy(gains, g) + rest * math.log1p(-g)
    lowest, highest = _window(n - last, p)[0], int(reach.max())
    if highest < lowest:
        return 0.0
    losses = torch.arange(lowest, highest + 1, dtype=torch.float64)
    stay = rest[:, None] - losses
    of_losses = log_choose(rest[:, None], losses) + losses * math.log(p) + torch.xlogy(stay, 1 - p)
    return float((of_gains[:, None] + of_losses).masked_fill_(losses > reach[:, None], -math.inf).exp().sum())


def _window(n: int, p: float) -> tuple[int, int]:
    """Where a binomial number has all of its probability but some 1e-17."""
    width = TAILS * math.sqrt(n * p * (1 - p)) + 2 * TAILS
    return max(0, math.floor(n * p - width)), min(n, math.ceil(n * p + width))


def _upper(k: int, n: int, slack: float) -> float:
    """The largest p with `P(Bin(n, p) <= k) > slack` (Clopper and Pearson), from above."""
    low, high = k / n, 1.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        above = float(log_binomial_tail(torch.tensor(k), n, middle)) > math.log(slack)
        low, high = (middle, high) if above else (low, middle)
    return high
