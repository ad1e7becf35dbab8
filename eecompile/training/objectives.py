"""What is minimised when exits are trained: small classes, by name, saved in artifacts as plain dicts.

An objective takes the `Result` of `fast.run(x)` in train mode (outputs of E exits and, last, of the model
itself) and labels, and gives one differentiable scalar. Outputs are `[B, C]` or `[B, S, C]` with labels
`[B]` or `[B, S]` of class indices, -100 left out.

| name | loss |
|---|---|
| exits | what strategies with exits ask for: the next three, put together from options |
| weighted_cross_entropy | sum of w_k CE(output_k, labels), w normalised to 1 (BranchyNet 2016) |
| distillation | (1 - alpha) CE + alpha T^2 KL(last / T, output_k / T) (Hinton et al. 2015) |
| exit_score | BCE of the learned exit score against "this exit is right" (BERxiT, Xin et al. 2021) |
| sum | any of them added, with weights; also written "a+b" |
| per_exit_loss | a function `(output, labels) -> scalar` of the user, for tasks that are not classification |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError, near
from eecompile.program import Result
from eecompile.training.scores import IGNORE, check_labels, right

Weights: TypeAlias = str | Sequence[float]
Loss = Callable[[Any, Any], Tensor]


class Objective(ABC):
    """Base of all objectives. Instances are immutable; `to_dict` and `objective` are inverse."""

    name: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        """The loss, 0-dim, of one batch. `where` names the batch in error messages."""

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        """Loss of the model's own output alone: the first of two stages of training."""
        last = outputs_of(result)[-1]
        return cross_entropy(last, check_labels(last, labels, where))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `objective(...)` reads it."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __add__(self, other: Objective) -> Objective:
        return Sum((self, other))


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
        outputs = outputs_of(result)
        labels = check_labels(outputs[-1], labels, where)
        return weighted(self.weights, [cross_entropy(output, labels) for output in outputs])


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
        if not 0 <= self.alpha <= 1:
            raise EecompileError("alpha of the distillation is out of range", got=self.alpha, wanted="0 to 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise EecompileError("the distillation temperature must be positive", got=self.temperature)

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = outputs_of(result)
        unlabelled = self.alpha == 1 and labels is None
        if not unlabelled:
            labels = check_labels(outputs[-1], labels, where)
        real = None if unlabelled else labels != IGNORE
        teacher = outputs[-1].detach()
        losses = []
        for student in outputs[:-1]:
            soft = divergence(teacher, student, self.temperature, real)
            hard = 0.0 if self.alpha == 1 else cross_entropy(student, labels)
            losses.append(self.alpha * soft + (1 - self.alpha) * hard)
        losses.append(outputs[-1].sum() * 0 if unlabelled else cross_entropy(outputs[-1], labels))
        return weighted(self.weights, losses)


@dataclass(frozen=True)
class ExitScore(Objective):
    """Binary cross entropy of each exit's score against whether that exit is right, which is detached.

    For `[B, S, C]` the target is the share of a row's positions that are right.
    """

    name: ClassVar[str] = "exit_score"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs = outputs_of(result)
        if result.scores is None or len(result.scores) != len(outputs) - 1:
            raise EecompileError(
                "there are no exit scores to train",
                where=where,
                got="none" if result.scores is None else f"{len(result.scores)} scores",
                wanted=f"{len(outputs) - 1} scores, one per exit",
                hint="use criterion='learned', or an objective without exit_score",
            )
        labels = check_labels(outputs[-1], labels, where)
        losses = []
        for score, output in zip(result.scores, outputs, strict=False):
            target, valid = right(output.detach(), labels)
            each = F.binary_cross_entropy_with_logits(score.float(), target.float(), reduction="none")
            losses.append((each * valid).sum() / valid.sum().clamp_min(1))
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class PerExitLoss(Objective):
    """A loss of the user's, applied to the output of every exit and of the model itself, and weighted.

    Args:
        function: `(output, labels) -> scalar`, differentiable. It is not saved: an artifact keeps its name
            only.
        weights: As in `WeightedCrossEntropy`.
    """

    name: ClassVar[str] = "per_exit_loss"

    function: Loss | None = None
    weights: Weights = "uniform"
    function_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.weights))
        if self.function is not None:
            name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
            object.__setattr__(self, "function_name", f"{getattr(self.function, '__module__', '?')}.{name}")

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return weighted(self.weights, [self._one(output, labels, where) for output in outputs_of(result)])

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return self._one(outputs_of(result)[-1], labels, where)

    def _one(self, output: Tensor, labels: Any, where: str) -> Tensor:
        if self.function is None:
            raise EecompileError(
                "the loss function was not saved with the artifact",
                where=where,
                got=self.function_name or "no function",
                hint="pass loss= again",
            )
        value: Any = self.function(output, labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise EecompileError(
                "the loss function does not give a scalar",
                where=f"{self.function_name}, {where}",
                got=f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                wanted="a tensor with one element",
                hint="average over the batch",
            )
        return value.reshape(())

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "function_name": self.function_name}


@dataclass(frozen=True)
class Sum(Objective):
    """Several objectives added.

    Args:
        parts: The objectives, or anything that `objective` takes.
        factors: One factor of 0 or more per part; 1 each by default.
    """

    name: ClassVar[str] = "sum"

    parts: tuple[Objective, ...] = ()
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(objective(part) for part in self.parts))
        object.__setattr__(self, "factors", tuple(float(f) for f in self.factors) or (1.0,) * len(self.parts))
        if not self.parts or len(self.parts) != len(self.factors):
            raise EecompileError(
                "a sum of objectives needs one factor per part",
                got=f"{len(self.parts)} parts, {len(self.factors)} factors",
            )
        check_weights(self.factors)

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        terms = [f * part(result, labels, where=where) for f, part in zip(self.factors, self.parts, strict=True)]
        return torch.stack(terms).sum()

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return self.parts[0].final(result, labels, where=where)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [p.to_dict() for p in self.parts], "factors": list(self.factors)}


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


OBJECTIVES: dict[str, type[Objective]] = {
    o.name: o for o in (Exits, WeightedCrossEntropy, Distillation, ExitScore, PerExitLoss, Sum)
}


def objective(spec: str | Mapping[str, Any] | Objective | None) -> Objective:
    """An objective from its name, names joined by "+", its `to_dict()`, or itself. None is the default.

    Raises:
        EecompileError: The name or an option is unknown; the message lists the valid ones.
    """
    if isinstance(spec, Objective):
        return spec
    if spec is None:
        return WeightedCrossEntropy()
    if isinstance(spec, str) and "+" in spec:
        return Sum(tuple(objective(part.strip()) for part in spec.split("+")))
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name: Any = options.pop("name", None)
    if name not in OBJECTIVES:
        raise EecompileError("unknown objective", got=repr(name), wanted=near(str(name), OBJECTIVES))
    known = [f.name for f in fields(OBJECTIVES[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise EecompileError(f"unknown option of the objective {name!r}", got=option, wanted=near(option, known))
    return OBJECTIVES[name](**options)


def outputs_of(result: Result) -> tuple[Tensor, ...]:
    """The outputs of every exit and of the model; an error where `run` was not called in train mode."""
    if not result.outputs:
        raise EecompileError(
            "the result holds no outputs of the exits",
            got="a result of eval mode",
            wanted="a result of fast.run(...) in train mode",
            hint="call fast.train() before fast.run(...)",
        )
    return result.outputs


def check_weights(weights: Weights) -> Weights:
    if isinstance(weights, str):
        if weights not in ("uniform", "linear"):
            raise EecompileError("unknown weights", got=repr(weights), wanted=near(weights, ("uniform", "linear")))
        return weights
    values = tuple(float(w) for w in weights)
    if not values or any(not math.isfinite(w) or w < 0 for w in values) or sum(values) == 0:
        raise EecompileError(
            "weights must be finite, 0 or more, and not all 0",
            got=list(values),
            wanted="'uniform', 'linear' or a list",
        )
    return values


def weighted(weights: Weights, losses: Sequence[Tensor]) -> Tensor:
    """Mean of 0-dim losses under weights that are normalised to 1."""
    n = len(losses)
    if weights == "uniform":
        values: Sequence[float] = [1.0] * n
    elif weights == "linear":
        values = [float(k + 1) for k in range(n)]
    else:
        values = [float(w) for w in weights]
    if len(values) != n:
        raise EecompileError(
            "the objective has the wrong number of weights",
            got=f"{len(values)} weights",
            wanted=f"{n}: one per exit ({n - 1}) and one for the model's own output",
        )
    total = sum(values)
    terms = [loss * (w / total) for loss, w in zip(losses, values, strict=True) if w > 0]
    return torch.stack(terms).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100; 0 where there is none. float32 arithmetic."""
    logits = logits.float().flatten(0, -2)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def divergence(teacher: Tensor, student: Tensor, temperature: float, real: Tensor | None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the positions that are `real`."""
    p = torch.log_softmax(teacher.float() / temperature, -1)
    q = torch.log_softmax(student.float() / temperature, -1)
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * temperature**2
    if real is None:
        return each.mean()
    return (each * real).sum() / real.sum().clamp_min(1)
