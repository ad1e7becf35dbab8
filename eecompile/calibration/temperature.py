"""Temperature scaling (Guo et al. 2017): one number per exit, which makes its probabilities honest.

Minimises the mean negative log likelihood of `softmax(logits / T)`. In `b = 1 / T` it is convex, with
derivative `E[sum_c p_c z_c - z_label]`, which grows with b; its root is bracketed in log b and found by
safeguarded Newton steps in float64. T stays in [0.05, 20]: on separable data the optimum is T = 0, on
useless scores T = inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [0.05, 20] of least negative log likelihood.

    Args:
        logits: `[n, C]`, any float dtype. -inf marks a class that is masked.
        labels: int64 `[n]`; -100 is left out, and so are rows whose own label is masked.

    Returns:
        1.0 where no row is left, or where no temperature within the bounds changes the likelihood.
    """
    real = labels != -100
    z, y = logits[real].double(), labels[real]
    own = z.gather(1, y[:, None])[:, 0]
    usable = own.isfinite() & (z < math.inf).all(1)
    z, own = z[usable], own[usable]
    if not len(z):
        return 1.0
    finite = torch.where(z.isfinite(), z, 0.0)

    def slope(b: float) -> tuple[float, float]:
        p = torch.softmax(z * b, 1)
        mean = (p * finite).sum(1)
        variance = (p * finite.square()).sum(1) - mean.square()
        return float((mean - own).mean()), float(variance.mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    at_low, at_high = slope(low)[0], slope(high)[0]
    if at_low == 0 and at_high == 0:
        return 1.0
    if at_low >= 0:
        return HIGHEST
    if at_high <= 0:
        return LOWEST
    b = 1.0
    for _ in range(100):
        value, curvature = slope(b)
        if value > 0:
            high = b
        else:
            low = b
        step = b - value / curvature if curvature > 0 else math.nan
        new = step if low < step < high else math.sqrt(low * high)
        if abs(new - b) <= 1e-10 * b or value == 0:
            break
        b = new
    return min(max(1 / b, LOWEST), HIGHEST)


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float | None:
    """Mean over the labels that are not -100, in nats; None where there is none."""
    real = labels != -100
    if not bool(real.any()):
        return None
    log_p = torch.log_softmax(logits[real].double() / temperature, 1)
    return float(-log_p.gather(1, labels[real][:, None]).mean())
