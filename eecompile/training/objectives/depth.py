"""Which depth a row should have run to: targets made from what the model says at every depth (Elbayad et al. 2020).

A result of gate mode "open" holds the prediction at depth n, with the first n of G gated blocks run and the others
skipped, for n = 0 to G, and the gates' scores. From the scores comes a distribution over depths,

    multinomial (one choice up front):   s_i = P(depth > i),             P(n) = s_(n-1) - s_n
    geometric (one choice per block):    s_i = P(depth > i | depth >= i), P(n) = (1 - s_n) * product of s_i for i < n

with s_(-1) = 1 and s_G = 0. With l_n the task's loss at depth n and a price per block, it is trained towards

    oracle:       the depth with the least l_n + price * n / G, by likelihood
    correctness:  the first depth whose prediction is right, 0 where none is, by likelihood
    expected:     no single depth: the sum over n of P(n) * (l_n + price * n / G) is the loss itself
    regret:       likelihood of every depth, weighted by what it saves against the worst (`choices.py`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError, near
from eecompile.result import Result
from eecompile.training.objectives.base import Weights, check_weights, losses_of, outputs_of, weighted
from eecompile.training.objectives.choices import Priced, regret
from eecompile.training.scores import check_labels, right

TARGETS = ("oracle", "correctness", "expected", "regret")
DISTRIBUTIONS = ("multinomial", "geometric")
EPSILON = 1e-6


@dataclass(frozen=True)
class DepthTargets(Priced):
    """The task's loss at every depth, and that of the choice of depth.

    On a result of eval mode, where gates have decided, it is what training aims for: the loss of the output that was
    given plus the price of the blocks that ran.

    Args:
        targets: "oracle", "correctness", "expected" or "regret".
        distribution: "multinomial" or "geometric": what the scores mean.
        weights: Of the task's loss at every depth, as in `WeightedCrossEntropy`.
        depth_weight: Weight of the choice's loss, added to the task's.
        target: Mean share of the gated blocks that the targets are to have: the price is steered towards it. None keeps
            the price as it is. Correctness knows no price.
        price: Loss that running all gated blocks must be worth, to begin with.
        rate, gain, ceiling: See `Steering`.
    """

    name: ClassVar[str] = "depth_targets"

    target: float | None = None
    price: float = 0.1
    targets: str = "oracle"
    distribution: str = "multinomial"
    weights: Weights = "uniform"
    depth_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", check_weights(self.weights))
        for what, value, valid in (
            ("kind of depth targets", self.targets, TARGETS),
            ("distribution over depths", self.distribution, DISTRIBUTIONS),
        ):
            if value not in valid:
                raise EecompileError(f"unknown {what}", got=repr(value), wanted=near(value, valid))
        if self.targets == "correctness" and self.target is not None:
            raise EecompileError(
                "correctness targets have no price that could be steered",
                got=f"target={self.target}",
                wanted='target=None, or targets="oracle"',
            )
        if not self.depth_weight >= 0:
            raise EecompileError("depth_weight is a weight", got=self.depth_weight, wanted="0 or more")

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs, scores = outputs_of(result), scores_of(result, where)
        labels = check_labels(outputs[-1], labels, where)
        if result.gates is not None and result.gates.dtype == torch.bool:
            share = result.gates.float().mean()
            return losses_of(outputs[-1], labels).mean() + self.controller.now * share
        losses = torch.stack([losses_of(output, labels) for output in outputs], 1)  # [B, G + 1]
        task = weighted(self.weights, list(losses.mean(0)))
        return task + self.depth_weight * self.choice(outputs, losses.detach(), scores, labels)

    def choice(self, outputs: tuple[Tensor, ...], losses: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Loss of the choice of depth, 0-dim; the price moves on with the targets' mean share of the blocks."""
        share = torch.linspace(0, 1, losses.shape[1], device=losses.device)
        log_p = log_probabilities(scores, self.distribution)
        if self.targets == "correctness":
            return F.nll_loss(log_p, first_right(outputs, labels))
        oracle = (losses + self.controller.now * share).argmin(1)
        if self.targets == "oracle":
            self.priced(share[oracle])
            return F.nll_loss(log_p, oracle)
        p = log_p.exp()
        spent = losses + self.priced((p.detach() * share).sum(1)) * share
        return regret(p, spent) if self.targets == "regret" else (p * spent).sum(1).mean()

    def options(self) -> tuple[str, ...]:
        return (*super().options(), "targets", "distribution", "weights", "depth_weight")


def scores_of(result: Result, where: str) -> Tensor:
    """[B, G]; an error where outputs and gates do not belong together."""
    count = len(result.outputs or ())
    scores = result.trace.gate_scores
    if scores is None or scores.shape[1] != count - 1:
        raise EecompileError(
            "targets of depth need a prediction for every depth",
            where=where,
            got=f"{count} predictions, {0 if scores is None else scores.shape[1]} gates",
            wanted="one prediction before every gate, and the model's own",
            hint='strategy="depth_adaptive"',
        )
    opened = result.gates
    if opened is not None and opened.dtype != torch.bool and not bool((opened.detach() == 1).all()):
        raise EecompileError(
            "a closed gate hides what the deeper blocks would have given",
            where=where,
            got="a result with closed gates",
            wanted="every gate open",
            hint='fast.gate_mode = "open" while training',
        )
    return scores


def first_right(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """[B] int64: the first depth at which the row is as right as it gets, with a position a class each."""
    correct = torch.stack([right(output.detach(), labels)[0].float() for output in outputs], 1)
    return correct.argmax(1)  # the first of equal ones


def log_probabilities(scores: Tensor, distribution: str) -> Tensor:
    """[B, G + 1] float32: log of the probability of every depth, from scores [B, G]."""
    s = scores.float()
    one, zero = torch.ones_like(s[:, :1]), torch.zeros_like(s[:, :1])
    if distribution == "geometric":
        s = torch.cat((one, s.clamp(EPSILON, 1 - EPSILON)), 1)
        stop = torch.cat((1 - s[:, 1:], one), 1)
        return s.log().cumsum(1) + stop.log()
    beyond = torch.cat((one, s, zero), 1)
    return (beyond[:, :-1] - beyond[:, 1:]).clamp_min(EPSILON).log()
