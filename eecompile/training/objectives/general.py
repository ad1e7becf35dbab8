"""Objectives for any task: a loss of the user's, and sums of objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import (
    Objective,
    Weights,
    check_weights,
    heads_of,
    objective,
    outputs_of,
    unweighted,
    weighted,
)

Loss = Callable[[Any, Any], Tensor]


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
        if result.trace.step_outputs is not None:
            raise EecompileError(
                "probabilities of stopping need the loss of each row",
                where=where,
                got=f"loss={self.function_name}, one number for a batch",
                wanted="classification, with the strategy's own objective",
                hint='Act(halting="act") is trained with any loss',
            )
        return weighted(self.weights, [self._one(output, labels, where) for output in heads_of(result)])

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return self._one(outputs_of(result)[-1], labels, where)

    @property
    def entangled(self) -> str:
        return unweighted(self.weights)

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        return self._one(output, labels, where)

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

    @property
    def entangled(self) -> str:
        return next((part.entangled for part in self.parts if part.entangled), "")

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        terms = zip(self.factors, self.parts, strict=True)
        return torch.stack([f * part.of_one(output, teacher, labels, where) for f, part in terms]).sum()

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [p.to_dict() for p in self.parts], "factors": list(self.factors)}

    def state(self) -> dict[str, Any]:
        states = [part.state() for part in self.parts]
        return {"parts": states} if any(states) else {}

    def load_state(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state.get("parts") or [{} for _ in self.parts], strict=True):
            part.load_state(own)

    def passed_on(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.passed_on().items()}

    def take(self, passed: dict[str, Any]) -> None:
        for part in self.parts:
            part.take(passed)
