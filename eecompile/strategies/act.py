"""Adaptive computation time: halting units after blocks, or one block repeated for as long as a row needs (Graves 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.errors import StrategyError
from eecompile.strategies.base import PLAIN, HaltRecipe, Recipe, Strategy


@dataclass(frozen=True)
class Act(Strategy):
    """Each row takes as many steps as its halting scores ask for; the output is the weighted mean of its states.

    Args:
        blocks: "every-block", or names of blocks with wildcards. Blocks of one shape in a row form a chain.
        max_steps: None to halt over the depth of the model; a number to repeat each of `blocks` up to so many times
            (a recurrent cell at every time step, a Transformer block as in the Universal Transformer).
        per_token: Every position of a sequence halts by itself: one that has halted keeps its state and still serves as
            key and value; a row leaves once all its positions have halted.
        ponder_price: Weight of the mean ponder cost in the loss.
        epsilon: A row halts once its scores add up to `1 - epsilon`.
        halting_bias: Logit that untrained scores start near; None: they add up to one near the last step.
        mask: Name of the input that marks padding; found by itself where it has a usual name.
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise.
    """

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = "halting units: as many steps as a row needs"
    paper: ClassVar[str] = "ACT, Graves 2016, arXiv:1603.08983; Dehghani et al. 2019, arXiv:1807.03819"

    inserts: ClassVar[Mapping[str, str]] = {"halting": "blocks"}

    blocks: str | Sequence[str] = "every-block"
    max_steps: int | None = None
    per_token: bool = False
    ponder_price: float = 0.01
    epsilon: float = 0.01
    halting_bias: float | None = None
    mask: str | None = None
    trunk: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, str):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.max_steps is not None and self.max_steps < 2:
            raise StrategyError("max_steps= counts repetitions", got=self.max_steps, wanted="None, or 2 and more")
        if not 0 < self.epsilon < 1:
            raise StrategyError("epsilon= is out of range", got=self.epsilon, wanted="above 0 and below 1")
        if not self.ponder_price >= 0:
            raise StrategyError("ponder_price= weighs a cost", got=self.ponder_price, wanted="0 or more")

    def recipe(self) -> Recipe:
        return Recipe(
            halting=HaltRecipe(
                where=self.blocks,
                repeat=self.max_steps or 0,
                unit="token" if self.per_token else "linear",
                epsilon=self.epsilon,
                bias=self.halting_bias,
                mask=self.mask,
            )
        )

    @property
    def objective(self) -> dict[str, Any]:
        return {"name": "sum", "parts": [dict(PLAIN), {"name": "ponder"}], "factors": [1.0, self.ponder_price]}

    @property
    def joint(self) -> bool:
        return self.trunk
