"""What a router is, as an option of strategies: where it reads, where it may send rows, how it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from eecompile.errors import StrategyError, check_name, near
from eecompile.ir.recipes import CUSTOM, FULL, RouteRecipe
from eecompile.plain import plain

EXITS = "exits"
# How decisions get a gradient, and the way that they are taken meanwhile (`passes/training_decisions.py`).
ESTIMATORS = {
    "regret": "every",
    "straight_through": "hard",
    "gumbel": "gumbel",
    "soft": "soft",
    "reinforce": "sample",
}
OBJECTIVES = {"regret": "regret", "reinforce": "reinforce"}  # the others: choice_cost
GAIN = 1.0  # of the price: what a row loses on another route is a few tenths, less than with gates


@dataclass(frozen=True)
class Router:
    """Sends each row one way, from an estimate of its difficulty.

    To exits, every exit and the model's own end are a route; a row's exit is known as soon as the router has run, and of
    the heads only that one is computed for it. The router gives the probability that a row needs at most exit k, and the
    row goes to the first open exit where this reaches the exit's threshold, 0.5 unless calibrated.

    To branches, a part of the model has alternative versions; each row takes the most probable one, and each
    version computes its own rows only. The model's own way is called "full" and is the last route. Branches have weights
    of their own, so the full way stays the model, bit for bit, whatever is trained.

    Args:
        at: What the router reads: "input", the name of an input, or of a cut (`eecompile inspect` shows them).
        to: "exits", or branches by name: a share between 0 and 1 of the blocks that a light version keeps, the others
            left out evenly, its weights copied from the model; or a module called with the value where branches begin,
            which is copied too.
        over: Cuts where branches begin and end, "input" and "output" among them: `("input", "output")` for whole models
            in addition to this one. None: from `at` to the end of the last block.
        unit: "auto", "conv" (maps and images), "linear" or "mlp".
        bias: Logit of the full way that training starts near.
        price: Loss that a full model's FLOPs must be worth.
        target_cost: Fraction of the model's cost that the price is steered towards; None keeps the price.
        balance: Weight of the load-balancing loss (Switch Transformer, Fedus et al. 2021): 1 where rows are spread evenly.
        estimator: Gradient of decisions between branches: "regret" (the router learns from what each branch costs a row, for
            which a training step runs the model once more for each), "straight_through", "gumbel", "soft" (branches are
            mixed while training) or "reinforce". A router to exits always learns from the regret.
        warm_up: Share of the epochs before the router is trained: heads are, or branches, to which rows then go at random,
            so that each learns from all kinds of rows.
        mask: Name of the input that marks padding; found by itself where it has a usual name.

    Raises:
        StrategyError: One route, a name that is taken, a number out of range.
    """

    at: str = "input"
    to: str | Mapping[Any, Any] = EXITS
    over: Sequence[str] | None = None
    unit: str = "auto"
    bias: float = 0.0
    price: float = 0.1
    target_cost: float | None = None
    balance: float = 0.0
    estimator: str = "regret"
    warm_up: float = 0.5
    mask: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name), f.name))
        if isinstance(self.to, str) and self.to != EXITS:
            raise StrategyError(
                "a router sends rows to exits or branches", got=repr(self.to), wanted='"exits", or {name: ...}'
            )
        if not isinstance(self.to, str):
            if not isinstance(self.to, Mapping):
                raise StrategyError("to= takes branches by name", got=type(self.to).__name__, wanted='{"light": 0.5}')
            object.__setattr__(self, "to", dict(self.to))
            self._check_branches()
        if self.over is not None:
            if isinstance(self.over, str) or len(self.over) != 2:
                raise StrategyError("over= takes two cuts", got=self.over, wanted='("layer1", "layer3"), where branches run')
            if self.to_exits:
                raise StrategyError("over= is for branches", got='to="exits"', hint="leave it out")
            object.__setattr__(self, "over", tuple(self.over))
        check_name("estimator", self.estimator, ESTIMATORS, StrategyError)
        for name in ("price", "balance", "warm_up"):
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < math.inf:
                raise StrategyError(f"{name}= is a number of 0 or more", got=repr(v))
        if not self.warm_up < 1:
            raise StrategyError("warm_up= is a share of the epochs", got=self.warm_up, wanted="0 to below 1")
        if self.target_cost is not None and not 0 < self.target_cost <= 1:
            raise StrategyError("target_cost= is a fraction of the model's cost", got=self.target_cost, wanted="0 to 1")

    def _check_branches(self) -> None:
        assert isinstance(self.to, Mapping)
        if not self.to:
            raise StrategyError(
                "a router with one route has nothing to choose",
                got="to={}, so the full model alone",
                wanted="at least one branch in addition",
                hint='to={"light": 0.5}',
            )
        for name, what in self.to.items():
            if not isinstance(name, str) or not name.isidentifier() or name in (FULL, "unit"):
                raise StrategyError(
                    "a branch has a name of its own",
                    got=repr(name),
                    wanted=f'letters, digits and "_", not "unit" or {FULL!r}, which is the model\'s own way',
                )
            share = isinstance(what, int | float) and not isinstance(what, bool) and 0 < what < 1
            if not (share or isinstance(what, nn.Module) or what == CUSTOM):
                raise StrategyError(
                    "a branch is a share of the blocks to keep, or a module",
                    where=name,
                    got=repr(what) if isinstance(what, int | float | str) else type(what).__name__,
                    wanted="a number between 0 and 1, or a torch.nn.Module",
                )

    @property
    def to_exits(self) -> bool:
        return self.to == EXITS

    def recipe(self) -> RouteRecipe:
        branches = () if isinstance(self.to, str) else tuple(self.to.items())
        over = None if self.over is None else (self.over[0], self.over[1])
        return RouteRecipe(self.at, branches, over, self.unit, self.bias, self.mask)

    @property
    def training(self) -> tuple[tuple[str, float, str, dict[str, Any] | None], ...]:
        """Stages: name, share of the epochs, how decisions are taken, and the objective added to the task's."""
        price = {"price": self.price, "target": self.target_cost, "gain": GAIN, "balance": self.balance}
        if self.to_exits:
            warm = (("every exit", self.warm_up, "hard", None),) if self.warm_up else ()
            return (*warm, ("exits and router", 1 - self.warm_up, "hard", {"name": "regret", **price}))
        cost = {"name": OBJECTIVES.get(self.estimator, "choice_cost"), **price}
        warm = (("every branch", self.warm_up, "uniform", None),) if self.warm_up else ()
        return (*warm, ("routed", 1 - self.warm_up, ESTIMATORS[self.estimator], cost))

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; modules are named, not kept."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.to, Mapping):
            found["to"] = {name: CUSTOM if isinstance(what, nn.Module) else what for name, what in self.to.items()}
        return found | {"over": None if self.over is None else list(self.over)}


def router(spec: Router | Mapping[str, Any] | str | None) -> Router | None:
    """A router from its options, "exits" or itself.

    Raises:
        StrategyError: Unknown options; what `Router` refuses.
    """
    if spec is None or isinstance(spec, Router):
        return spec
    if isinstance(spec, str):
        return Router(to=spec)
    if not isinstance(spec, Mapping):
        raise StrategyError("router= takes a Router", got=type(spec).__name__, wanted='strategies.Router(at="input")')
    valid = [f.name for f in fields(Router)]
    for option in spec:
        if option not in valid:
            raise StrategyError("a router has no such option", got=repr(option), wanted=near(str(option), valid))
    return Router(**spec)
