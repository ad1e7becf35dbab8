"""Several strategies in one graph: `Branchy(...) + SkipNet(...)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eecompile.errors import StrategyError
from eecompile.ir.recipes import Recipe, TrainingStage
from eecompile.strategies import conflicts
from eecompile.strategies.base import PLAIN, Strategy
from eecompile.strategies.conflicts import PRIMITIVES, TASKS, over_models, terms


@dataclass(frozen=True)
class Combined(Strategy):
    """What its parts insert, each kind by one of them.

    The objective is the sum of theirs, the task counted once; stages of training are those of the part that has some; the
    trunk is trained where any part asks for it.

    With a cascade of several models among the parts the others are put into each of its models: `Cascade() + Anytime()`
    has heads inside the models in addition to the models' own predictions. All these exits share criterion, combination and
    loss weights; where the two parts differ, an option with its default value gives way.

    Args:
        parts: Two strategies or more; sums among them are flattened.

    Raises:
        StrategyError: Parts that contradict each other; both clauses are named.
    """

    name: ClassVar[str] = "combined"
    summary: ClassVar[str] = 'several strategies in one graph: Branchy() + SkipNet(), or "branchy+skipnet"'
    paper: ClassVar[str] = ""

    parts: tuple[Strategy, ...] = ()

    def __post_init__(self) -> None:
        found: list[Strategy] = []
        for part in self.parts:
            if not isinstance(part, Strategy):
                raise StrategyError("a sum of strategies takes strategies", got=type(part).__name__)
            found += part.parts if isinstance(part, Combined) else [part]
        if len(found) < 2:
            raise StrategyError("a sum of strategies needs two of them", got=", ".join(map(str, found)) or "none")
        conflicts.check(found)
        object.__setattr__(self, "parts", conflicts.agreed(found))

    def over(self, models: int) -> Strategy:
        cascade = next((part for part in self.parts if over_models(part)), None)
        if models == 1 or cascade is None:
            conflicts.check(self.parts, models)
            return replace(self, parts=tuple(part.over(models) for part in self.parts))
        return replace(self, parts=tuple(part.over(models) if part is cascade else part for part in self.parts))

    @property
    def within(self) -> Strategy | None:
        others = tuple(part for part in self.parts if not over_models(part))
        if len(others) == len(self.parts):
            return None
        return others[0] if len(others) == 1 else Combined(others)

    @property
    def together(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in part.together.items()}

    def recipe(self) -> Recipe:
        """What goes into the graph; of a cascade of several models the exits after them alone, since the models bring the
        rest along."""
        recipes = [part.recipe() for part in self.parts if self.within is None or over_models(part)]
        chosen = {kind: next((r for r in (getattr(o, kind) for o in recipes) if r is not None), None) for kind in PRIMITIVES}
        return Recipe(**chosen, equilibrium=any(part.recipe().equilibrium for part in self.parts))

    @property
    def objective(self) -> dict[str, Any]:
        found = [t for part in self.parts for t in terms(part.objective)]
        tasks = [(f, t) for f, t in found if t["name"] in TASKS]
        # a cascade of several models leaves the loss to what is inside of them
        own = [t for t in tasks if t[1] != PLAIN]
        inner = [t for part in self.parts if not over_models(part) for t in terms(part.objective) if t in own]
        kept = [*(inner or own or [(1.0, dict(PLAIN))])[:1]]
        kept += [t for k, t in enumerate(found) if t[1]["name"] not in TASKS and t not in found[:k]]
        if len(kept) == 1 and kept[0][0] == 1.0:
            return kept[0][1]
        return {"name": "sum", "parts": [t for _, t in kept], "factors": [f for f, _ in kept]}

    @property
    def stages(self) -> tuple[TrainingStage, ...]:
        return next((part.stages for part in self.parts if part.stages), ())

    @property
    def joint(self) -> bool:
        return any(part.joint for part in self.parts)

    @property
    def two_stage(self) -> bool:  # type: ignore[override]
        return any(part.two_stage for part in self.parts)

    @property
    def keep_open(self) -> bool:  # type: ignore[override]
        return any(part.keep_open for part in self.parts)

    @property
    def training_exits(self) -> bool:  # type: ignore[override]
        return any(part.training_exits and part.recipe().exits is not None for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))
