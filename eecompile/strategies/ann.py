"""Anytime neural networks: auxiliary predictors whose losses are balanced as training goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import Recipe, Where
from eecompile.strategies.base import ExitStrategy

BALANCES = ("adaloss", "fixed")


@dataclass(frozen=True)
class Ann(ExitStrategy):
    """Auxiliary predictors all along the model, trained together with it.

    `distillation=` is self-distillation from the model's own output (Li et al. 2019).

    Args:
        balance: "adaloss" (each loss weighted by the inverse of its running mean, times `weights`) or "fixed" (`weights`).
        memory: Share of the old running mean in a new one.
        gradient_equilibrium: Scale gradients at the exits so that they do not add up towards the input (Li et al. 2019).
            Only where the trunk is trained.
    """

    name: ClassVar[str] = "ann"
    summary: ClassVar[str] = "auxiliary predictors with losses balanced as training goes (AdaLoss)"
    paper: ClassVar[str] = "AdaLoss, Hu et al. 2019, arXiv:1708.06832; Li et al. 2019, arXiv:1908.06294"
    keep_open: ClassVar[bool] = True

    exits: Where = "everywhere"
    criterion: str | Criterion = "max_probability"
    threshold: float | tuple[float, ...] | None = 1.0
    trunk: bool = True
    balance: str = "adaloss"
    memory: float = 0.95
    gradient_equilibrium: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("balance of the losses", self.balance, BALANCES, StrategyError)
        if not 0 <= self.memory < 1:
            raise StrategyError("memory= of the running means is a share", got=self.memory, wanted="0 to below 1")

    def recipe(self) -> Recipe:
        return replace(super().recipe(), equilibrium=self.gradient_equilibrium)

    @property
    def objective(self) -> dict[str, Any]:
        if self.balance == "fixed":
            return super().objective
        weights = self.weights if isinstance(self.weights, str) else list(self.weights)
        task = {"name": "adaloss", "weights": weights, "alpha": self.distillation, "memory": self.memory}
        return self.with_parts(task)
