"""Tails of binomial numbers, exact, in float64."""

from __future__ import annotations

import math

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
    cumulative = torch.logcumsumexp(log_choose(torch.tensor(n), i) + i * math.log(p) + (n - i) * math.log1p(-p), 0)
    found = cumulative.clamp(max=0)[k.clamp(0, most).long()]
    return torch.where(k < 0, -math.inf, torch.where(k >= n, 0.0, found))


def log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Logarithms of binomial coefficients; the arguments broadcast."""
    found: Tensor = torch.lgamma(n.double() + 1) - torch.lgamma(k + 1) - torch.lgamma(n.double() - k + 1)
    return found
