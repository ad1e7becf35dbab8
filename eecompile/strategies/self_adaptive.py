"""Self-adaptive inference: one look at an early state says which parts of the model run for a row.

Skipped are attention halves, MLP halves or whole blocks, as BlockDrop (Wu et al. 2018) drops blocks and AdaViT (Meng et
al. 2022) parts of a vision Transformer; what runs may run with some of its hidden channels only, as slimmable networks do
(Yu et al. 2019); exits end the run of rows that are sure before the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import GateRecipe, Recipe, TrainingStage, Where
from eecompile.strategies.base import PLAIN, ExitStrategy, check_share, check_thresholds, with_warm_up

WIDTHS = (0.25, 0.5, 0.75, 1.0)
ESTIMATORS = {"gumbel": "gumbel", "straight_through": "hard", "reinforce": "sample"}


@dataclass(frozen=True)
class SelfAdaptive(ExitStrategy):
    """A policy over sub-modules, with exits.

    Training lets the last parts be dropped first and then ever more of them, as BlockDrop does: while the policy knows
    nothing, dropping early parts would spoil what all later ones read.

    Args:
        parts: What may be left out: "halves" (attention and MLP parts where a block has them, else the block),
            "every-block", "attention", "mlp", or names of blocks or parts with wildcards; () for none.
        widths: Shares of the hidden channels of an MLP (gated ones too) or between convolutions that may be run, such as
            (0.25, 0.5, 0.75, 1.0): ascending, the last one 1. Chosen for each row and each part that has such channels, and
            for such layers outside of the parts. () runs all channels. Train the trunk: it has to learn its widths.
        exits: As in every strategy with exits; None for none.
        gate_threshold: Score from which a part runs; one, or one per part. `calibrate` replaces it.
        open_bias: Logit of the score that an untrained policy starts near: above 0 everything runs.
        always_on: Names with wildcards of blocks or parts that always run, at full width.
        min_open: At least this many parts run, at whatever width.
        target_cost: Fraction of the model's cost, with all exits closed, that training steers the mean towards.
        estimator: Gradient of the policy: "gumbel", "straight_through" or "reinforce".
        curriculum: In how many steps the parts become free to be dropped, the last ones first; 1 for all at once.
        reward: Of "reinforce": "log_likelihood" or "correctness".
        entropy: Bonus on the entropy of sampled decisions.
        full_share: Share of the rows of a training batch that run every part. Above 0 the full model, which `calibrate`
            compares with, stays good while parts are dropped for nearly every row; the target cost is that of the others.
        warm_up: Share of the epochs before the policy is trained, in which the trunk learns to do without parts: they are
            dropped by chance, the later the likelier, the last one half the time (stochastic depth, Huang et al. 2016).
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise.

    The options of the exits (head, criterion, threshold, mask, max_head_share, weights, distillation, combine) are those of
    `ExitStrategy`.
    """

    name: ClassVar[str] = "self_adaptive"
    summary: ClassVar[str] = "a policy over attention halves, MLP halves, blocks and widths, with exits"
    paper: ClassVar[str] = "BlockDrop, Wu et al. 2018, arXiv:1711.08393; AdaViT, Meng et al. 2022, arXiv:2111.15668"

    inserts: ClassVar[Mapping[str, str]] = {"exits": "exits", "gates": "parts"}

    exits: Where | None = 2  # type: ignore[assignment]
    criterion: str | Criterion = "entropy"
    trunk: bool = True
    parts: str | Sequence[str] = "halves"
    gate_threshold: float | Sequence[float] = 0.5
    open_bias: float = 2.0
    always_on: Sequence[str] = ()
    min_open: int = 0
    target_cost: float = 0.6
    estimator: str = "gumbel"
    curriculum: int = 3
    reward: str = "log_likelihood"
    entropy: float = 0.01
    widths: Sequence[float] = ()
    full_share: float = 0.0
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.always_on, str):
            object.__setattr__(self, "always_on", (self.always_on,))
        check_thresholds(self.gate_threshold)
        if not 0 < self.target_cost <= 1:
            raise StrategyError("target_cost= is a fraction of the model's cost", got=self.target_cost, wanted="0 to 1")
        check_widths(self.widths)
        check_share("full_share", "a batch's rows", self.full_share)
        check_share("warm_up", "the epochs", self.warm_up)
        if not self.parts and not self.widths:
            raise StrategyError("there is nothing to choose", got="parts=() and widths=()", wanted="parts or widths")
        check_name("estimator", self.estimator, ESTIMATORS, StrategyError)
        for name, least in (("curriculum", 1), ("min_open", 0)):
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, int) or v < least:
                raise StrategyError(f"{name}= is a whole number", got=v, wanted=f"{least} or more")

    def recipe(self) -> Recipe:
        threshold = self.gate_threshold
        gates = GateRecipe(
            self.parts,
            "policy",
            tuple(threshold) if isinstance(threshold, Sequence) else float(threshold),
            self.open_bias,
            tuple(self.always_on),
            self.min_open,
            mask=self.mask,
            widths=tuple(float(w) for w in self.widths),
        )
        return Recipe(None if self.exits is None else super().recipe().exits, gates)

    @property
    def objective(self) -> dict[str, Any]:
        return dict(PLAIN) if self.exits is None else super().objective

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        mode, steps = ESTIMATORS[self.estimator], self.curriculum
        found = []
        for k in range(1, steps + 1):
            free = Fraction(k, steps)
            # With fewer parts to drop there is less to save: the target comes down with them.
            target = 1 - (1 - self.target_cost) * float(free)
            price: dict[str, Any] = {"name": "choice_cost", "target": target}
            if mode == "sample":
                price = {"name": "reinforce", "target": target, "reward": self.reward, "entropy": self.entropy}
            name = "all parts" if k == steps else f"the last {free} of the parts"
            share = 1.0 if k == steps else 1.0 / (steps - 1)
            found.append(TrainingStage(name, share, mode, price, kept_open=float(1 - free), full_share=self.full_share))
        return with_warm_up(self.warm_up, self.full_share, found)


def check_widths(widths: Any) -> None:
    """Whether these are shares of channels that a part may run with: none, or two and more.

    Raises:
        StrategyError: Not above 0 and at most 1, not ascending, or without the full width.
    """
    wanted = f"such as {WIDTHS}"
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise StrategyError("widths= is a sequence of shares of the channels", got=repr(widths), wanted=wanted)
    for w in widths:
        if isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w <= 1:
            raise StrategyError("a width is a share of the channels, above 0 and at most 1", got=repr(w), wanted=wanted)
    if not widths:
        return
    if any(b <= a for a, b in zip(widths, widths[1:], strict=False)):
        raise StrategyError("widths= ascend, and no two are equal", got=tuple(widths), wanted=wanted)
    if widths[-1] != 1 or len(widths) < 2:
        raise StrategyError("widths= end with 1, the model as it was, after smaller ones", got=tuple(widths), wanted=wanted)
