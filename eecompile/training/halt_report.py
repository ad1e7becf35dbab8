"""How many steps rows took while halting was trained, and how far where they stop is from its prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.result import Result
from eecompile.training.objectives import Objective, PonderNet, Sum
from eecompile.training.objectives.pondernet import stopping


@dataclass
class HaltRow:
    """What halting did over an epoch.

    Attributes:
        steps: Mean steps of a row, over its positions where each halts by itself. While probabilities of stopping are
            trained, and no row stops, the mean of their distribution.
        divergence: Mean KL divergence of that distribution from the objective's prior; None where there is none.
    """

    steps: float
    divergence: float | None = None

    @classmethod
    def of(cls, sums: list[float] | None, rows: int) -> HaltRow | None:
        """From what `halted` gives, summed over so many rows; None where nothing halts."""
        if not sums or not rows:
            return None
        return cls(*(s / rows for s in sums))


def halted(result: Result, objective: Objective, halts: bool) -> Tensor:
    """Float64, empty where nothing `halts`: sums over the rows of their steps and, where probabilities of stopping are
    trained, of their distribution's divergence from the prior."""
    if not halts or result.steps is None:
        return torch.empty(0, dtype=torch.float64)
    if result.trace.step_scores is None:
        steps = result.steps.double()
        return _sum(steps if steps.ndim == 1 else steps.mean(1))
    log_p = stopping(result.trace.step_scores.detach())
    sums = [(log_p.exp() * torch.arange(1, log_p.shape[1] + 1, device=log_p.device)).sum(1)]
    parts = objective.parts if isinstance(objective, Sum) else (objective,)
    sums += [part.divergence(log_p) for part in parts if isinstance(part, PonderNet)][:1]
    return torch.cat([_sum(t) for t in sums])


def _sum(values: Tensor) -> Tensor:
    return values.double().sum().reshape(1).cpu()
