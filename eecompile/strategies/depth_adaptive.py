"""Depth-adaptive networks: each row runs its first blocks only, as many as it needs (Elbayad et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.criteria import criterion
from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import ExitRecipe, GateRecipe, Recipe, TrainingStage
from eecompile.strategies.base import PLAIN, Strategy
from eecompile.strategies.skipnet import SkipNet

MODES = ("up_front", "halting", "gates")
TARGETS = ("oracle", "correctness", "expected", "regret", "cost")
CLOSED = 2.0  # threshold of the exits that are there for training alone


@dataclass(frozen=True)
class DepthAdaptive(Strategy):
    """Depth chosen for each row: up front, block by block, or as gates that skip.

    | mode | what decides | a row runs |
    |---|---|---|
    | up_front | one multinomial over depths, from the input of the first gated block | its first d blocks |
    | halting | after every block its own unit: go on or not | the blocks before the first no |
    | gates | before every block its own unit: run it or not (SkipNet) | any of the blocks |

    Targets other than "cost" need the prediction at every depth. It comes from exits with the model's
    own layers before every gate, which skip that gate's block and all later ones; what is not gated (the blocks that change
    the shape, in networks with stages) runs in each of them. Training opens every gate, and at inference those exits are
    closed. Their work grows with the share of the model that has no gate: where that is large, "cost" trains faster.

    Args:
        mode: "up_front", "halting" or "gates".
        gates: "every-block", or names of blocks with wildcards.
        min_depth: The first so many blocks run for every row; the depth is chosen after them.
        targets: "oracle": the depth with the least loss plus price; "correctness": the first that is right; "expected":
            loss plus price in the mean over the chosen distribution; "regret": every depth by what it saves against the
            worst; "cost": no target depth, but gradients through the decisions and a price on their cost. None is "oracle",
            with mode "gates" "cost".
        price: Loss that running all gated blocks must be worth ("oracle", "expected", "regret").
        target_depth: Mean share of the gated blocks that the price is steered towards; None keeps the price.
        target_cost: Fraction of the model's cost that training steers the mean towards ("cost").
        unit: Of the modes "halting" and "gates": "auto", "linear", "conv" or "recurrent".
        threshold: Score from which a gate is open: up front, of the probability that the depth is larger.
        open_bias: Logit that untrained units start near: above 0 they begin deep.
        weights: Of the task's loss at every depth: "uniform", "linear" in depth, or a list.
        depth_weight: Of the choice's loss, next to the task's.
        mask: Name of the input that marks padding; found by itself where it has a usual name.
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise. The final layers must learn to read every depth.
    """

    name: ClassVar[str] = "depth_adaptive"
    summary: ClassVar[str] = "depth chosen for each row, up front or block by block"
    training_exits: ClassVar[bool] = True
    paper: ClassVar[str] = "Depth-adaptive Transformer, Elbayad et al. 2020, arXiv:1910.10073"

    inserts: ClassVar[Mapping[str, str]] = {"exits": "targets", "gates": "gates"}

    mode: str = "up_front"
    gates: str | Sequence[str] = "every-block"
    min_depth: int = 1
    targets: str | None = None
    price: float = 0.1
    target_depth: float | None = None
    target_cost: float = 0.6
    unit: str = "auto"
    threshold: float | Sequence[float] = 0.5
    open_bias: float = 2.0
    weights: str | Sequence[float] = "uniform"
    depth_weight: float = 1.0
    mask: str | None = None
    trunk: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("mode of depth_adaptive", self.mode, MODES, StrategyError)
        if self.targets is None:
            object.__setattr__(self, "targets", "cost" if self.mode == "gates" else "oracle")
        check_name("targets", self.targets, TARGETS, StrategyError)
        if self.mode == "gates" and self.targets != "cost":
            raise StrategyError(
                "gates that skip single blocks have no depth to aim at",
                got=f"targets={self.targets!r}",
                wanted='targets="cost", or mode="up_front" or "halting"',
            )
        for name, is_a, kind in (("min_depth", "counts blocks", int), ("price", "is a loss", (int, float))):
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, kind) or not v >= 0:
                raise StrategyError(f"{name}= {is_a}", got=v, wanted="0 or more")
        priced = self.targets not in ("correctness", "cost")
        if self.target_depth is not None and not (0 < self.target_depth <= 1 and priced):
            raise StrategyError(
                "target_depth= is a share of the gated blocks, for targets with a price",
                got=f"{self.target_depth}, targets={self.targets!r}",
                wanted='0 to 1, with targets="oracle", "expected" or "regret"',
            )
        # SkipNet's own checks of threshold and target cost.
        self._gates()

    def _gates(self) -> SkipNet:
        """The gates as SkipNet has them: what they are, and how a price on their cost trains them."""
        # Soft decisions of one multinomial are no product of its scores, so up front they are hard from the start.
        shares = (0, 1, 0) if self.mode == "up_front" else (1, 1, 0)
        return SkipNet(
            self.gates,
            "depth" if self.mode == "up_front" else self.unit,
            self.threshold,
            self.open_bias,
            mask=self.mask,
            target_cost=self.target_cost,
            shares=shares,
        )

    def recipe(self) -> Recipe:
        own = self._gates().recipe().gates
        assert own is not None
        gates = GateRecipe(**{**vars(own), "ungated": self.min_depth, "monotone": self.mode != "gates"})
        exits = ExitRecipe("gates", "shared", criterion("max_probability"), CLOSED, self.mask)
        return Recipe(exits if self.targets != "cost" else None, gates)

    @property
    def objective(self) -> dict[str, Any]:
        if self.targets == "cost":
            return dict(PLAIN)
        return {
            "name": "depth_targets",
            "targets": self.targets,
            "distribution": "multinomial" if self.mode == "up_front" else "geometric",
            "price": self.price,
            "target": self.target_depth,
            "weights": self.weights if isinstance(self.weights, str) else list(self.weights),
            "depth_weight": self.depth_weight,
        }

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        if self.targets == "cost":
            return self._gates().stages
        return (TrainingStage("every depth", 1.0, "open"),)

    @property
    def joint(self) -> bool:
        return self.trunk
