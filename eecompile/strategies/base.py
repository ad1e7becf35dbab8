"""What a strategy is: a recipe over the four primitives (exit, gate, halt, route), a criterion and an objective.

A strategy never touches a graph. It says where exits go, which heads they get, how sure they must be and how they are
trained; the passes do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from eecompile.criteria import Criterion, Routed, criterion
from eecompile.errors import StrategyError, shown
from eecompile.heads import HeadSpec
from eecompile.ir.recipes import ExitRecipe, Recipe, TrainingStage, Where
from eecompile.kernels.combine import check_combination
from eecompile.plain import check_switches, plain
from eecompile.strategies.router import Router, router

PLAIN = {"name": "exits"}  # the task's loss alone: what strategies without exits ask for


KINDS: dict[str, type[Strategy]] = {}  # by name, each there once its file is imported


def check_thresholds(given: float | Sequence[float]) -> None:
    """Checks one threshold or several.

    Raises:
        StrategyError: One is no number of 0 or more.
    """
    for t in given if isinstance(given, tuple) else (given,):
        if not (isinstance(t, int | float) and t >= 0):
            raise StrategyError("a threshold is 0 or more", got=given, wanted="0 to 1; an exit or gate is closed above 1")


def check_share(option: str, of: str, given: Any) -> None:
    """Checks an option that is a share and leaves something for the rest.

    Raises:
        StrategyError: No number from 0 to below 1.
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1:
        raise StrategyError(f"{option}= is a share of {of}", got=repr(given), wanted="0 to below 1")


def with_warm_up(warm_up: float, full_share: float, stages: Sequence[TrainingStage]) -> tuple[TrainingStage, ...]:
    """The stages of gates, after a share `warm_up` of all epochs in which blocks are dropped by chance."""
    if not warm_up:
        return tuple(stages)
    share = sum(stage.share for stage in stages) * warm_up / (1 - warm_up)
    return (TrainingStage("blocks dropped", share, "dropped", full_share=full_share), *stages)


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies: frozen options with units in their names."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    keep_open: ClassVar[bool] = False
    """Whether calibration leaves every exit open, because a call may be stopped there."""
    training_exits: ClassVar[bool] = False
    """Whether the exits are there for the objective alone: calibration leaves them closed."""
    two_stage: ClassVar[bool] = False
    """Whether the model is trained first and the heads afterwards, unless `fit` says otherwise."""
    inserts: ClassVar[Mapping[str, str]] = {}
    """For each primitive that it inserts the option that says where, as errors name it."""

    def __init_subclass__(cls) -> None:
        KINDS.setdefault(cls.name, cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = plain(getattr(self, f.name), f.name)
            tuples = isinstance(value, Sequence) and not isinstance(value, str)
            object.__setattr__(self, f.name, tuple(value) if tuples else value)
        check_switches(type(self), vars(self), StrategyError)

    @property
    def within(self) -> Strategy | None:
        """What is put into each of several models before they become a cascade; None for nothing."""
        return None

    def over(self, models: int) -> Strategy:
        """This strategy for so many models in one graph.

        Raises:
            StrategyError: It takes a single model.
        """
        if models > 1:
            raise StrategyError(
                f"strategy {self.name!r} takes one model", got=f"{models} models", hint='for several: strategy="cascade"'
            )
        return self

    @property
    def together(self) -> dict[str, Any]:
        """How several models are put together: `prepare`, `inputs` and `order`."""
        return {}

    def __add__(self, other: Strategy) -> Strategy:
        """Both in one graph; see `Combined`."""
        return KINDS["combined"](parts=(self, other))  # type: ignore[call-arg]

    def recipe(self) -> Recipe:
        raise NotImplementedError

    @property
    def objective(self) -> dict[str, Any]:
        """The training objective as JSON data."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        """The stages of training, one after the other; none where `fit` has nothing but the objective to go by."""
        return ()

    @property
    def joint(self) -> bool:
        """Whether training moves the trunk too unless `fit` says otherwise."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; modules and factories given as heads are named, not kept."""
        out: dict[str, Any] = {"name": self.name}
        for f in fields(self):
            v = getattr(self, f.name)
            if isinstance(v, Criterion | Router):
                v = v.to_dict()
            elif isinstance(v, nn.Module) or callable(v):
                v = "custom"
            elif isinstance(v, tuple):
                v = list(v)
            out[f.name] = v
        return out

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class ExitStrategy(Strategy):
    """What strategies that insert exits share.

    Args:
        exits: A number spaced by cost, "every-block", "everywhere" that pays, names with wildcards
            (`"bert.encoder.layer.3"`, `"layer*.1"`), or fractions of the model's cost (`[0.25, 0.5]`).
        head: "auto", "linear", "conv", "mlp", "pooler", "shared", a module, or a factory over a `Site`.
        criterion: A name or an instance of `eecompile.criteria`.
        threshold: Confidence from which a sample leaves; one, or one per exit. `calibrate` replaces it.
        mask: Name of the input that marks padding; found by itself where it has a usual name.
        max_head_share: Refuse an exit whose head costs more than this fraction of what leaving there saves.
        weights: Loss weight of each exit: "uniform", "linear" in depth, or a list, the model's own end last.
        distillation: Share of the loss that is distilled from the model's own output, 0 to 1.
        trunk: Train the trunk too unless `fit(trunk=...)` says otherwise.
        combine: What an exit answers, given the open exits before it: "last" (its own head), "ensemble" (geometric mean
            of all so far, Zero Time Waste), "weighted" (the same with trained weights and class biases) or "confident" (the
            surest so far). The model's own end answers for itself.
        router: Sends rows straight to one of the exits, in place of a criterion, or into branches of the model; a `Router`
            or its options.
    """

    inserts: ClassVar[Mapping[str, str]] = {"exits": "exits", "routes": "router"}

    exits: Where = 3
    head: HeadSpec = "auto"
    criterion: str | Criterion = "max_probability"
    threshold: float | Sequence[float] | None = None
    mask: str | None = None
    max_head_share: float = 1.0
    weights: str | Sequence[float] = "uniform"
    distillation: float = 0.0
    trunk: bool = False
    combine: str = "last"
    router: Router | Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combination(self.combine)
        object.__setattr__(self, "criterion", criterion(self.criterion))
        object.__setattr__(self, "router", router(self.router))
        self._check_router()
        least = 0 if isinstance(self.router, Router) and not self.router.to_exits else 1
        if isinstance(self.exits, bool) or (isinstance(self.exits, int) and self.exits < least):
            raise StrategyError("a strategy needs at least one exit", got=self.exits, wanted="an integer >= 1")
        if isinstance(self.exits, float):
            object.__setattr__(self, "exits", (self.exits,))
        if not isinstance(self.exits, int | str | tuple | None):  # None where exits may be left out
            raise StrategyError(
                "exits= says where they go",
                got=shown(self.exits)[:80],
                wanted="a number, a name, or a list of names or fractions",
            )
        if isinstance(self.exits, tuple):
            if not self.exits:
                raise StrategyError("exits= is an empty list", hint="give a number, names or fractions")
            bad = [e for e in self.exits if isinstance(e, float) and not 0.0 < e < 1.0]
            if bad or any(not isinstance(e, str | float) for e in self.exits):
                raise StrategyError("exits= takes names or fractions of the cost between 0 and 1", got=list(self.exits))
        if self.threshold is not None:
            check_thresholds(self.threshold)
        if not 0.0 <= self.distillation <= 1.0:
            raise StrategyError("distillation= is a share of the loss", got=self.distillation, wanted="0 to 1")

    def _check_router(self) -> None:
        """With a router to exits no criterion decides."""
        assert isinstance(self.criterion, Criterion)
        to_exits = isinstance(self.router, Router) and self.router.to_exits
        if isinstance(self.criterion, Routed) and not to_exits:
            raise StrategyError(
                'the criterion "routed" needs a router', got="router=None", hint='router=strategies.Router(to="exits")'
            )
        if isinstance(self.router, Router) and getattr(self, "two_stage", False):
            raise StrategyError("a router has stages of training of its own", got="two_stage=True", wanted="two_stage=False")
        if not to_exits or isinstance(self.criterion, Routed):
            return
        usual: Any = next(f.default for f in fields(self) if f.name == "criterion")
        if self.criterion != criterion(usual) or self.combine != "last":
            raise StrategyError(
                "a router sends each row to one exit, so no criterion decides and no exits answer together",
                got=f"criterion={self.criterion.name!r}, combine={self.combine!r}",
                hint="leave them out",
            )
        object.__setattr__(self, "criterion", Routed(self.criterion.reduce))

    def over(self, models: int) -> Strategy:
        self._check_models(models)
        return super().over(models)

    def _check_models(self, models: int) -> None:
        if models > 1 and isinstance(self.router, Router):
            raise StrategyError(
                "a router chooses between the parts of one model",
                got=f"{models} models",
                hint='branches that are whole models: Branchy(router=Router(to={"small": model}, over=("input", "output")))',
            )

    def recipe(self) -> Recipe:
        assert isinstance(self.criterion, Criterion)  # __post_init__ resolved it
        threshold = self.criterion.default_threshold if self.threshold is None else self.threshold
        routes = self.router.recipe() if isinstance(self.router, Router) else None
        if self.exits is None:
            raise StrategyError("a strategy needs at least one exit", got="exits=None", wanted="a number, a name, or names")
        if self.exits == 0:
            return Recipe(routes=routes)
        return Recipe(
            routes=routes,
            exits=ExitRecipe(
                self.exits,
                self.head,
                self.criterion,
                tuple(threshold) if isinstance(threshold, Sequence) else float(threshold),
                self.mask,
                self.max_head_share,
                self.combine,
            ),
        )

    @property
    def objective(self) -> dict[str, Any]:
        weights = self.weights if isinstance(self.weights, str) else list(self.weights)
        task: dict[str, Any] = {"name": "weighted_cross_entropy", "weights": weights}
        if self.distillation > 0:
            task = {"name": "distillation", "alpha": self.distillation, "weights": weights}
        return self.with_parts(task)

    def with_parts(self, task: dict[str, Any]) -> dict[str, Any]:
        """The task's objective and what else the exits have to learn: scores, weights of their ensemble."""
        assert isinstance(self.criterion, Criterion)  # __post_init__ resolved it
        parts = [task, *([{"name": "exit_score"}] if self.criterion.learned else [])]
        parts += [{"name": "ensemble"}] if self.combine == "weighted" else []
        return task if len(parts) == 1 else {"name": "sum", "parts": parts, "factors": [1.0] * len(parts)}

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        return tuple(TrainingStage(*stage) for stage in self.router.training) if isinstance(self.router, Router) else ()

    @property
    def joint(self) -> bool:
        return self.trunk
