"""Adaptive computation time: halting units after blocks, or one block repeated for as long as a row needs (Graves 2016;
Banino et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import HaltRecipe, Recipe
from eecompile.strategies.base import PLAIN, Strategy

HALTING = ("act", "pondernet")


@dataclass(frozen=True)
class Act(Strategy):
    """Each row takes as many steps as its halting scores ask for.

    | halting | a score | the output | objective |
    |---|---|---|---|
    | act | a share of the whole, spent when they add up to 1 | mean of the states under the shares | loss + price of steps |
    | pondernet | probability of stopping, given that the row got here | the state at the step where it stopped | expected \
loss over where it stops + beta x KL from a geometric prior |

    PonderNet trains every step's prediction, with no row halted. At inference a row stops, without chance, at the first step
    by which it would have stopped with probability `threshold`. It takes one chain: `blocks` of one shape in a row, or one
    block that is repeated. With another strategy's exits in the graph, their objective is added.

    Args:
        blocks: "every-block", or names of blocks with wildcards. Blocks of one shape in a row form a chain.
        max_steps: None to halt over the depth of the model; a number to repeat each of `blocks` up to so many times
            (a recurrent cell at every time step, a Transformer block as in the Universal Transformer).
        per_token: Every position of a sequence halts by itself: one that has halted keeps its state and still serves as
            key and value; a row leaves once all its positions have halted.
        halting: "act" or "pondernet".
        ponder_price: Weight of the mean ponder cost in the loss ("act").
        prior: Probability of stopping at each step, of the geometric prior ("pondernet").
        beta: Weight of the divergence from the prior ("pondernet").
        threshold: What scores, or the probability of having stopped, must add up to, until `fast.set_halting_threshold` or
            `calibrate` sets it. None is 1, for "pondernet" 0.5, the median.
        epsilon: A row halts once this share of the threshold, or less, is missing.
        halting_bias: Logit that untrained scores start near; None: they add up to one near the last step, for "pondernet"
            each is the prior's.
        mask: Name of the input that marks padding; found by itself where it has a usual name.
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise.
    """

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = "halting units: as many steps as a row needs"
    paper: ClassVar[str] = (
        "ACT, Graves 2016, arXiv:1603.08983; Dehghani et al. 2019, arXiv:1807.03819; PonderNet, Banino et al. 2021, "
        "arXiv:2107.05407"
    )

    inserts: ClassVar[Mapping[str, str]] = {"halting": "blocks"}

    blocks: str | Sequence[str] = "every-block"
    max_steps: int | None = None
    per_token: bool = False
    ponder_price: float = 0.01
    epsilon: float = 0.01
    halting_bias: float | None = None
    mask: str | None = None
    trunk: bool = True
    halting: str = "act"
    prior: float = 0.2
    beta: float = 0.01
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.blocks, str):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.max_steps is not None and self.max_steps < 2:
            raise StrategyError("max_steps= counts repetitions", got=self.max_steps, wanted="None, or 2 and more")
        if not 0 < self.epsilon < 1:
            raise StrategyError("epsilon= is out of range", got=self.epsilon, wanted="above 0 and below 1")
        if not self.ponder_price >= 0:
            raise StrategyError("ponder_price= weighs a cost", got=self.ponder_price, wanted="0 or more")
        check_name("way to halt", self.halting, HALTING, StrategyError)
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise StrategyError("threshold= is out of range", got=self.threshold, wanted="above 0 to 1")
        if not 0 < self.prior < 1:
            raise StrategyError("prior= is a probability of stopping", got=self.prior, wanted="above 0 and below 1")
        if not self.beta >= 0:
            raise StrategyError("beta= weighs a divergence", got=self.beta, wanted="0 or more")
        if self.per_token and self.halting == "pondernet":
            raise StrategyError(
                "PonderNet stops rows, not positions: a prediction depends on where all of them stopped",
                got="per_token=True",
                wanted='per_token=False, or halting="act"',
            )

    def recipe(self) -> Recipe:
        stops = self.halting == "pondernet"
        bias = math.log(self.prior / (1 - self.prior)) if stops and self.halting_bias is None else self.halting_bias
        return Recipe(
            halting=HaltRecipe(
                where=self.blocks,
                repeat=self.max_steps or 0,
                unit="token" if self.per_token else "linear",
                epsilon=self.epsilon,
                bias=bias,
                mask=self.mask,
                rule="stop" if stops else "mean",
                threshold=self.threshold or (0.5 if stops else 1.0),
            )
        )

    @property
    def objective(self) -> dict[str, Any]:
        if self.halting == "pondernet":
            return {"name": "pondernet", "prior": self.prior, "beta": self.beta}
        return {"name": "sum", "parts": [dict(PLAIN), {"name": "ponder"}], "factors": [1.0, self.ponder_price]}

    @property
    def joint(self) -> bool:
        return self.trunk
