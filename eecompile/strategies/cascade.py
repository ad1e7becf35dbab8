"""Cascades: several models, or growing subsets of one model's layers, one after the other until one is sure enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import Recipe, Where
from eecompile.strategies.base import ExitStrategy, Strategy

ORDERS = ("check", "cost", "given")
PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Cascade(ExitStrategy):
    """Models one after the other, the cheapest first; only rows that are not sure yet reach the next.

    The last model is the full model: its output type is the cascade's, and costs are fractions of its FLOPs (above 1
    for a row that went through all of them). Exits are the other models' own predictions, with no parameters of theirs.

    A compiled model may be one of them: its exits come along, with their heads and thresholds.

    With a single model the stages are subsets of its layers: `exits` and `head` then mean what they mean in `Branchy`.

    Args:
        prepare: One function or module for each model, or None: makes the model's arguments (a tensor, a tuple or a
            dict) from the cascade's inputs, row by row. Its work counts as that model's.
        inputs: For each model the inputs that it takes, as names or as `{its argument: name}`. None: positional
            arguments go to every model, a keyword argument to those that name it.
        order: "check" refuses a model that costs `max_head_share` of the next one or more, and says the right order;
            "cost" sorts them; "given" takes them as they are.
    """

    name: ClassVar[str] = "cascade"
    summary: ClassVar[str] = "several models, or subsets of layers, one after the other"
    paper: ClassVar[str] = "Viola and Jones 2001; FrugalGPT, Chen et al. 2023, arXiv:2305.05176"

    exits: Where = PREDICTIONS
    prepare: Sequence[Any] | None = None
    inputs: Sequence[Sequence[str] | Mapping[str, str] | None] | None = None
    order: str = "check"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("order", self.order, ORDERS, StrategyError)
        for name in ("prepare", "inputs"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, str | Mapping) or not isinstance(given, Sequence)):
                raise StrategyError(
                    f"{name}= takes a list", got=type(given).__name__, wanted="one entry, or None, per model"
                )
            if given is not None:
                object.__setattr__(self, name, tuple(given))
        for one in self.prepare or ():
            if one is not None and not callable(one):
                raise StrategyError("prepare= takes functions and modules", got=type(one).__name__)

    def over(self, models: int) -> Strategy:
        if models == 1:
            for name in ("prepare", "inputs"):
                if getattr(self, name) is not None:
                    raise StrategyError(f"{name}= is for a cascade of several models", got="one model")
            return replace(self, exits=2) if self.exits == PREDICTIONS else self
        self._check_models(models)
        if self.exits != PREDICTIONS or self.head != "auto":
            raise StrategyError(
                "exits= and head= are for a cascade over the layers of one model",
                got=f"{models} models, exits={self.exits!r}, head={self.head!r}",
                hint="leave them out: the exits are the models' own predictions",
            )
        for name in ("prepare", "inputs"):
            given = getattr(self, name)
            if given is not None and len(given) != models:
                raise StrategyError(f"{name}= has another length than the list of models", got=len(given), wanted=models)
        return self

    @property
    def together(self) -> dict[str, Any]:
        return {"prepare": self.prepare, "inputs": self.inputs, "order": self.order}

    def recipe(self) -> Recipe:
        assert isinstance(self.criterion, Criterion)  # __post_init__ resolved it
        recipe = super().recipe()
        assert recipe.exits is not None
        if self.exits != PREDICTIONS:
            return recipe
        share = float("inf") if self.order == "given" else self.max_head_share
        return replace(recipe, exits=replace(recipe.exits, head="identity", max_head_share=share))

    def to_dict(self) -> dict[str, Any]:
        named = super().to_dict()
        named["prepare"] = None if self.prepare is None else "custom"
        if self.inputs is not None:
            named["inputs"] = [dict(i) if isinstance(i, Mapping) else None if i is None else list(i) for i in self.inputs]
        return named
