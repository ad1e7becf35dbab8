"""Several strategies in one graph: `Branchy(...) + SkipNet(...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eecompile.errors import StrategyError
from eecompile.strategies.base import Recipe, Strategy, TrainingStage

PRIMITIVES = ("exits", "gates", "halting")
PLAIN = {"name": "exits"}  # the task alone: what strategies without exits ask for


@dataclass(frozen=True)
class Combined(Strategy):
    """What its parts insert, each kind by one of them.

    The objective is the sum of theirs, the task counted once; stages of training are those of the part that has some; the
    trunk is trained where any part asks for it.

    Args:
        parts: Two strategies or more; sums among them are flattened.
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
        object.__setattr__(self, "parts", tuple(found))
        if len(found) < 2:
            raise StrategyError("a sum of strategies needs two of them", got=", ".join(map(str, found)) or "none")
        for kind in PRIMITIVES:
            asking = [part.name for part in found if getattr(part.recipe(), kind) is not None]
            if len(asking) > 1:
                raise StrategyError(
                    f"two strategies insert {kind}",
                    got=" + ".join(asking),
                    wanted=f"{kind} from one of them",
                    hint="say all that is wanted in the options of one",
                )
        staged = [part.name for part in found if part.stages]
        if len(staged) > 1:
            raise StrategyError("two strategies have stages of training", got=" + ".join(staged), wanted="one at most")

    def over(self, models: int) -> Strategy:
        return replace(self, parts=tuple(part.over(models) for part in self.parts))

    @property
    def together(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in part.together.items()}

    def recipe(self) -> Recipe:
        recipes = [part.recipe() for part in self.parts]
        chosen = {kind: next((r for r in (getattr(o, kind) for o in recipes) if r is not None), None) for kind in PRIMITIVES}
        return Recipe(**chosen, equilibrium=any(r.equilibrium for r in recipes))

    @property
    def objective(self) -> dict[str, Any]:
        terms = [t for part in self.parts for t in _terms(part.objective)]
        with_exits = any(part.recipe().exits is not None for part in self.parts)
        others = [t for t in terms if t[1] != PLAIN]
        # the exits' own objective holds the task; without exits one plain one does
        kept = others if with_exits and others else [(1.0, dict(PLAIN)), *others]
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
    def keep_open(self) -> bool:  # type: ignore[override]
        return any(part.keep_open for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


def _terms(objective: Mapping[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """The parts of a sum with their factors, or the objective alone."""
    if objective["name"] != "sum":
        return [(1.0, dict(objective))]
    factors = objective.get("factors") or [1.0] * len(objective["parts"])
    return [(f * g, t) for f, part in zip(factors, objective["parts"], strict=True) for g, t in _terms(part)]
