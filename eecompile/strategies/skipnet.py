"""SkipNet: gates on residual blocks, trained to skip what a row does not need (Wang et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import GateRecipe, Recipe, TrainingStage
from eecompile.strategies.base import PLAIN, Strategy, check_share, check_thresholds, with_warm_up

ESTIMATORS = {"straight_through": "hard", "gumbel": "gumbel"}
REWARDS = ("log_likelihood", "correctness")


@dataclass(frozen=True)
class SkipNet(Strategy):
    """Gates on residual blocks, or on their attention and MLP halves.

    Args:
        gates: "every-block", "halves", "attention", "mlp", or names of blocks or parts with wildcards.
        unit: "auto" (conv on maps, linear elsewhere), "conv", "linear", or "recurrent" (one LSTM shared by all gates).
        threshold: Score from which a gate is open; one, or one per gate. `calibrate` replaces it.
        open_bias: Logit of the score that untrained gates start near: above 0 they begin open.
        always_on: Names with wildcards of blocks that are never skipped.
        min_open: At least this many gates let a row in.
        target_cost: Fraction of the model's cost that training steers the mean towards.
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise.
        shares: Shares of the epochs that gates are trained softly, then with hard decisions, then by REINFORCE; 0 leaves a
            stage out. Epochs are whole, so with few of them the smaller shares go without.
        estimator: Gradient of hard decisions: "straight_through" or "gumbel".
        reward: Of REINFORCE: "log_likelihood" or "correctness".
        entropy: Bonus on the entropy of sampled decisions.
        full_share: Share of the rows of a training batch that run every block. Above 0 the full model, which `calibrate`
            compares with, stays good while blocks are skipped for nearly every row; the target cost is that of the others.
        warm_up: Share of the epochs before gates are trained, in which the trunk learns to do without blocks: they are
            dropped by chance, the later the likelier, the last one half the time (stochastic depth, Huang et al. 2016).
    """

    name: ClassVar[str] = "skipnet"
    summary: ClassVar[str] = "gates that skip residual blocks"
    paper: ClassVar[str] = "SkipNet, Wang et al. 2018, arXiv:1711.09485"

    inserts: ClassVar[Mapping[str, str]] = {"gates": "gates"}

    gates: str | Sequence[str] = "every-block"
    unit: str = "auto"
    threshold: float | Sequence[float] = 0.5
    open_bias: float = 2.0
    always_on: Sequence[str] = ()
    min_open: int = 0
    mask: str | None = None
    target_cost: float = 0.6
    trunk: bool = True
    shares: Sequence[float] = (0.3, 0.4, 0.3)
    estimator: str = "straight_through"
    reward: str = "log_likelihood"
    entropy: float = 0.01
    full_share: float = 0.0
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.always_on, str):
            object.__setattr__(self, "always_on", (self.always_on,))
        check_thresholds(self.threshold)
        if not 0 < self.target_cost <= 1:
            raise StrategyError("target_cost= is a fraction of the model's cost", got=self.target_cost, wanted="0 to 1")
        if self.min_open < 0:
            raise StrategyError("min_open= counts gates", got=self.min_open, wanted="0 or more")
        numbers = self.shares if isinstance(self.shares, tuple) else ()
        if len(numbers) != 3 or not all(isinstance(s, int | float) and s >= 0 for s in numbers) or sum(numbers) <= 0:
            raise StrategyError(
                "shares= are those of the soft, the hard and the REINFORCE stage",
                got=self.shares,
                wanted="three numbers of 0 or more, not all 0",
            )
        check_name("estimator", self.estimator, ESTIMATORS, StrategyError)
        check_name("reward", self.reward, REWARDS, StrategyError)
        if not self.entropy >= 0:
            raise StrategyError("entropy= is the weight of a bonus", got=self.entropy, wanted="0 or more")
        check_share("full_share", "a batch's rows", self.full_share)
        check_share("warm_up", "the epochs", self.warm_up)

    def recipe(self) -> Recipe:
        threshold = tuple(self.threshold) if isinstance(self.threshold, Sequence) else float(self.threshold)
        return Recipe(
            gates=GateRecipe(
                where=self.gates,
                unit=self.unit,
                threshold=threshold,
                open_bias=self.open_bias,
                always_on=tuple(self.always_on),
                min_open=self.min_open,
                mask=self.mask,
            )
        )

    @property
    def objective(self) -> dict[str, Any]:
        return dict(PLAIN)

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        price = {"name": "choice_cost", "target": self.target_cost}
        policy = {"name": "reinforce", "target": self.target_cost, "reward": self.reward, "entropy": self.entropy}
        found = (
            TrainingStage("soft gates", self.shares[0], "soft", price, full_share=self.full_share),
            TrainingStage("hard gates", self.shares[1], ESTIMATORS[self.estimator], price, full_share=self.full_share),
            TrainingStage("reinforce", self.shares[2], "sample", policy, full_share=self.full_share),
        )
        return with_warm_up(self.warm_up, self.full_share, [stage for stage in found if stage.share > 0])

    @property
    def joint(self) -> bool:
        return self.trunk
