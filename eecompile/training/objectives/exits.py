"""Losses of classifiers at exits: cross entropy, distillation from the last, exit scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import (
    Objective,
    Weights,
    check_weights,
    cross_entropy,
    divergence,
    heads_of,
    outputs_of,
    unweighted,
    weighted,
)
from eecompile.training.scores import check_labels, right


@dataclass(frozen=True)
class WeightedCrossEntropy(Objective):
    """Cross entropy of every exit and of the model's own output, weighted.

    Args:
        weights: "uniform", "linear" (proportional to the exit's rank, so later ones count more, as in
            PABEE), or one number of 0 or more per exit and, last, one for the model's own output.
    """

    name: ClassVar[str] = "weighted_cross_entropy"

    weights: Weights = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.weights))

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = heads_of(result)
        labels = check_labels(outputs[-1], labels, where)
        return weighted(self.weights, [cross_entropy(output, labels) for output in outputs])

    @property
    def entangled(self) -> str:
        return unweighted(self.weights)

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        return cross_entropy(output, check_labels(output, labels, where))


@dataclass(frozen=True)
class Distillation(Objective):
    """Every exit learns from the labels and from the model's own output; the latter learns from the labels.

    Args:
        alpha: Share of the teacher, in [0, 1]. With 1 no labels are needed.
        temperature: Softens both distributions; the loss is scaled by its square.
        weights: As in `WeightedCrossEntropy`.
    """

    name: ClassVar[str] = "distillation"

    alpha: float = 0.5
    temperature: float = 2.0
    weights: Weights = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.weights))
        check_distillation(self.alpha, self.temperature)

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return weighted(self.weights, distilled(result, labels, self.alpha, self.temperature, where))

    @property
    def entangled(self) -> str:
        return unweighted(self.weights)

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        return distilled_one(output, teacher, labels, self.alpha, self.temperature, where)


def check_distillation(alpha: float, temperature: float) -> None:
    if not 0 <= alpha <= 1:
        raise EecompileError("alpha of the distillation is out of range", got=alpha, wanted="0 to 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise EecompileError("the distillation temperature must be positive", got=temperature)


def distilled(result: Result, labels: Any, alpha: float, temperature: float, where: str) -> list[Tensor]:
    """Loss of every exit, `(1 - alpha)` from the labels and `alpha` from the model's own output, and of the model itself.

    The teacher is detached. With alpha 1 no labels are needed; with 0 it is plain cross entropy.
    """
    outputs = heads_of(result)
    unlabelled = alpha == 1 and labels is None
    if not unlabelled:
        labels = check_labels(outputs[-1], labels, where)
    teacher = outputs[-1].detach()
    losses = [distilled_one(student, teacher, labels, alpha, temperature, where) for student in outputs[:-1]]
    losses.append(outputs[-1].sum() * 0 if unlabelled else cross_entropy(outputs[-1], labels))
    return losses


def distilled_one(student: Tensor, teacher: Tensor, labels: Any, alpha: float, temperature: float, where: str) -> Tensor:
    """`(1 - alpha)` of the labels' cross entropy and `alpha` of the divergence from the teacher, for one exit."""
    if alpha == 1 and labels is None:
        return divergence(teacher, student, temperature, None)
    labels = check_labels(student, labels, where)
    if alpha == 0:
        return cross_entropy(student, labels)
    soft = divergence(teacher, student, temperature, labels)
    return alpha * soft + (1 - alpha) * (0.0 if alpha == 1 else cross_entropy(student, labels))


@dataclass(frozen=True)
class ExitScore(Objective):
    """Binary cross entropy of each exit's score against whether that exit is right, which is detached.

    For `[B, S, C]` the target is the share of a row's positions that are right.
    """

    name: ClassVar[str] = "exit_score"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = outputs_of(result)
        if result.trace.scores is None or len(result.trace.scores) != len(outputs) - 1:
            raise EecompileError(
                "there are no exit scores to train",
                where=where,
                got="none" if result.trace.scores is None else f"{len(result.trace.scores)} scores",
                wanted=f"{len(outputs) - 1} scores, one per exit",
                hint="use criterion='learned', or an objective without exit_score",
            )
        labels = check_labels(outputs[-1], labels, where)
        losses = []
        for score, output in zip(result.trace.scores, outputs, strict=False):
            target, valid = right(output.detach(), labels)
            each = F.binary_cross_entropy_with_logits(score.float(), target.float(), reduction="none")
            losses.append((each * valid).sum() / valid.sum().clamp_min(1))
        return torch.stack(losses).mean()

    @property
    def entangled(self) -> str:
        return ""

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        """Nothing: heads learn nothing from it, scores are fitted by themselves."""
        return output.sum() * 0


@dataclass(frozen=True)
class Ensemble(Objective):
    """Mean cross entropy of what the exits answer together: trains the weights of `combine="weighted"` alone.

    The heads' own outputs reach the ensemble detached, as in the second phase of Zero Time Waste (Wolczyk et al. 2021), so
    this part of a sum moves nothing else.
    """

    name: ClassVar[str] = "ensemble"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = outputs_of(result)
        if result.trace.separate is None:
            raise EecompileError(
                "there is no ensemble to train", where=where, got='combine="last"', wanted='combine="weighted"'
            )
        labels = check_labels(outputs[-1], labels, where)
        return torch.stack([cross_entropy(output, labels) for output in outputs[:-1]]).mean()

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return outputs_of(result)[-1].sum() * 0


@dataclass(frozen=True)
class Exits(Objective):
    """What strategies with exits ask for: weighted cross entropy, with a share of distillation, plus exit
    scores.

    Args:
        weights: As in `WeightedCrossEntropy`.
        distillation: Share of the loss that is distilled from the model's own output, in [0, 1].
        learned: Whether exit scores are trained as well.
    """

    name: ClassVar[str] = "exits"

    weights: Weights = "uniform"
    distillation: float = 0.0
    learned: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.weights))
        self._parts()

    def _parts(self) -> list[Objective]:
        first: Objective = WeightedCrossEntropy(self.weights)
        if self.distillation:
            first = Distillation(alpha=self.distillation, weights=self.weights)
        return [first, ExitScore()] if self.learned else [first]

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return torch.stack([part(result, labels, where=where) for part in self._parts()]).sum()

    @property
    def entangled(self) -> str:
        return "".join(part.entangled for part in self._parts())

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        return torch.stack([part.of_one(output, teacher, labels, where) for part in self._parts()]).sum()
