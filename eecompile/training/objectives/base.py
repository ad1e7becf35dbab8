"""Base of the objectives, their registry by name, and the losses that they are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError, check_name, near
from eecompile.kernels.confidence import yes_or_no
from eecompile.result import Result
from eecompile.training.scores import IGNORE, check_labels, over_classes

Weights: TypeAlias = str | Sequence[float]


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

    @property
    def entangled(self) -> str:
        """Why, with a frozen trunk, the loss of one exit needs more than `of_one` takes; empty where it does not."""
        return f"objective {self.name!r} needs the outputs of all exits together"

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        """Loss of one exit, 0-dim, mean over its labels, where no `entangled` speaks against it.

        Args:
            output: What its head gives, `[B, C]` or `[B, S, C]`.
            teacher: The model's own output, of the same shape, without gradient.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the objective has learnt while training, for checkpoints: numbers, strings, lists. Most have nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`; an empty one starts anew."""
        return

    def passed_on(self) -> dict[str, Any]:
        """What the objective of the next stage of training goes on from."""
        return {}

    def take(self, passed: dict[str, Any]) -> None:
        """Goes on from what the last stage's objective `passed_on`."""
        return

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `objective(...)` reads it."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __add__(self, other: Objective) -> Objective:
        return OBJECTIVES["sum"](parts=(self, other))  # type: ignore[call-arg]


OBJECTIVES: dict[str, type[Objective]] = {}


def register(*kinds: type[Objective]) -> None:
    """Makes objectives known by their names."""
    OBJECTIVES.update({kind.name: kind for kind in kinds})


def objective(spec: str | Mapping[str, Any] | Objective | None) -> Objective:
    """An objective from its name, names joined by "+", its `to_dict()`, or itself. None is the default.

    Raises:
        EecompileError: The name or an option is unknown; the message lists the valid ones.
    """
    if isinstance(spec, Objective):
        return spec
    if spec is None:
        return OBJECTIVES["weighted_cross_entropy"]()
    if isinstance(spec, str) and "+" in spec:
        return OBJECTIVES["sum"](parts=tuple(objective(part.strip()) for part in spec.split("+")))  # type: ignore[call-arg]
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name: Any = options.pop("name", None)
    check_name("objective", name, OBJECTIVES)
    known = [f.name for f in fields(OBJECTIVES[name]) if f.init]  # type: ignore[arg-type]
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


def heads_of(result: Result) -> tuple[Tensor, ...]:
    """What is trained: every head's own output, also where exits answer together, and the model's."""
    return result.trace.separate or outputs_of(result)


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


def relative(weights: Weights, n: int) -> list[float]:
    """Weights of n losses, summing to 1."""
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
    return [w / total for w in values]


def unweighted(weights: Weights) -> str:
    """Why exits cannot be fitted one by one under these weights; empty where they can."""
    zero = not isinstance(weights, str) and any(w == 0 for w in weights[:-1])
    return "an exit has weight 0 in the objective" if zero else ""


def weighted(weights: Weights, losses: Sequence[Tensor]) -> Tensor:
    """Mean of 0-dim losses under weights that are normalised to 1."""
    values = relative(weights, len(losses))
    return torch.stack([loss * w for loss, w in zip(losses, values, strict=True) if w > 0]).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100; 0 where there is none. Binary where labels say yes or no to each score.

    float32 arithmetic.
    """
    logits = over_classes(logits.float(), labels).flatten(0, -2)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def losses_of(output: Tensor, labels: Tensor) -> Tensor:
    """[B] float32: cross entropy of each row, a mean over its positions that have a label; 0 where none has."""
    logits = over_classes(output.float(), labels).flatten(0, -2)
    each = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none").view(labels.shape)
    if each.ndim == 1:
        return each
    return each.flatten(1).sum(1) / (labels != IGNORE).flatten(1).sum(1).clamp_min(1)


def divergence(teacher: Tensor, student: Tensor, temperature: float, labels: Tensor | None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over what has a label; over all without labels.

    Between the probabilities of no and yes where labels say that of each score, and where there is one score alone.
    """
    if teacher.shape[-1] == 1 or (labels is not None and labels.ndim == teacher.ndim):
        teacher, student = yes_or_no(teacher, True), yes_or_no(student, True)
    p = torch.log_softmax(teacher.float() / temperature, -1)
    q = torch.log_softmax(student.float() / temperature, -1)
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * temperature**2
    if labels is None:
        return each.mean()
    real = labels != IGNORE
    return (each * real).sum() / real.sum().clamp_min(1)
