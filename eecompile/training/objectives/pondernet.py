"""Where to stop as a distribution that is trained (Banino et al. 2021, PonderNet, arXiv:2107.05407).

After step n of N a unit says with probability lambda_n that a row which got there stops,

    p_n = lambda_n * product of (1 - lambda_j) for j < n,      the last step takes what is left
    q_n = prior * (1 - prior)^(n - 1) / (1 - (1 - prior)^N)     the geometric distribution, truncated
    loss = sum over n of p_n * L(labels, prediction at step n) + beta * KL(p || q)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import Objective, losses_of, outputs_of
from eecompile.training.objectives.depth import log_probabilities
from eecompile.training.scores import check_labels


@dataclass(frozen=True)
class PonderNet(Objective):
    """Expected loss over where a row stops, and its divergence from a geometric prior.

    On a result of eval mode, where rows have stopped, the loss of the output that was given.

    Args:
        prior: Probability of stopping at a step, of the geometric prior: about `1 / prior` steps are wanted.
        beta: Weight of the divergence.
    """

    name: ClassVar[str] = "pondernet"

    prior: float = 0.2
    beta: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise EecompileError("prior= is a probability of stopping", got=self.prior, wanted="above 0 and below 1")
        if not self.beta >= 0:
            raise EecompileError("beta= weighs a divergence", got=self.beta, wanted="0 or more")

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = outputs_of(result)
        labels = check_labels(outputs[-1], labels, where)
        if result.trace.step_outputs is None or result.trace.step_scores is None:
            if result.steps is None or result.trace.ponder is None or result.trace.ponder.requires_grad:
                raise EecompileError(
                    "there is no prediction for every step to train",
                    where=where,
                    hint='compile with a strategy whose rows stop by chance, such as Act(halting="pondernet")',
                )
            return losses_of(outputs[-1], labels).mean()
        log_p = stopping(result.trace.step_scores)
        losses = torch.stack([losses_of(output, labels) for output in result.trace.step_outputs], 1)
        return (log_p.exp() * losses).sum(1).mean() + self.beta * self.divergence(log_p).mean()

    def divergence(self, log_p: Tensor) -> Tensor:
        """[B] float32: KL(p || q), from log probabilities [B, N]."""
        n = log_p.shape[1]
        stay = math.log1p(-self.prior)
        whole = math.log(self.prior) - math.log1p(-math.exp(n * stay))
        log_q = whole + stay * torch.arange(n, device=log_p.device)
        return (log_p.exp() * (log_p - log_q)).sum(1)


def stopping(scores: Tensor) -> Tensor:
    """[B, N] float32: log of the probability of stopping at each step; `scores` [B, N] are those of a row that got there."""
    return log_probabilities(1 - scores.float()[:, :-1], "geometric")
