"""AdaLoss: each exit's loss counts in inverse proportion to its running mean (Hu et al. 2019, arXiv:1708.06832).

With l_i the mean of exit i's loss over the last batches, the weights are `b_i / l_i`, normalised to 1: that is the
gradient of `sum b_i log l_i`, the geometric mean of the losses. An exit with a small loss, mostly a late one, thus counts
for more than under equal weights, and the early ones, whose losses stay large, do not drown it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import Objective, Weights, check_weights, relative, unweighted, weighted
from eecompile.training.objectives.exits import check_distillation, distilled, distilled_one

LEAST = 1e-3  # a loss of 0 would take all the weight


@dataclass(frozen=True)
class AdaLoss(Objective):
    """Cross entropy of every exit and of the model, weighted by the inverse of each one's running mean.

    The running means move with every loss that gradients are recorded for, are part of a checkpoint of `fit`, and start
    anew with each `fit`. The weights themselves are constants to autograd.

    Args:
        weights: Base weights b, as in `WeightedCrossEntropy`.
        alpha: Share of self-distillation from the model's own output, in [0, 1] (Li et al. 2019).
        temperature: Of the distillation.
        memory: Share of the old mean in a new one, in [0, 1); 0.95 looks back over some 20 batches.
    """

    name: ClassVar[str] = "adaloss"

    weights: Weights = "uniform"
    alpha: float = 0.0
    temperature: float = 2.0
    memory: float = 0.95
    running: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.weights))
        check_distillation(self.alpha, self.temperature)
        if not 0 <= self.memory < 1:
            raise EecompileError("memory of the running means is out of range", got=self.memory, wanted="0 to below 1")

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        losses = distilled(result, labels, self.alpha, self.temperature, where)
        if torch.is_grad_enabled():
            self._follow([float(loss.detach()) for loss in losses])
        return weighted(self.weights_now(len(losses)), losses)

    @property
    def entangled(self) -> str:
        return unweighted(self.weights)

    def of_one(self, output: Tensor, teacher: Tensor, labels: Any, where: str = "this batch") -> Tensor:
        """The weights scale the losses of heads that share nothing, which moves no optimum."""
        return distilled_one(output, teacher, labels, self.alpha, self.temperature, where)

    def _follow(self, values: list[float]) -> None:
        old = self.running if len(self.running) == len(values) else values
        self.running[:] = [self.memory * m + (1 - self.memory) * v for m, v in zip(old, values, strict=True)]

    def weights_now(self, count: int) -> list[float]:
        """Weights of `count` losses, summing to 1; the base weights before there is any running mean."""
        base = relative(self.weights, count)
        if len(self.running) != count:
            return base
        raw = [b / max(m, LEAST) for b, m in zip(base, self.running, strict=True)]
        return [r / sum(raw) for r in raw]

    def state(self) -> dict[str, Any]:
        return {"running": list(self.running)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.running[:] = state.get("running", [])

    def to_dict(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("weights", "alpha", "temperature", "memory")}
        return {"name": self.name, **options}
