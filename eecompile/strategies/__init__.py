"""The strategies by name. `eecompile(model, strategy="branchy")` or `strategies.Branchy(exits=3)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from eecompile.criteria import criterion
from eecompile.errors import StrategyError, check_name, near
from eecompile.ir.recipes import ExitRecipe, GateRecipe, HaltRecipe, Recipe, RouteRecipe, TrainingStage
from eecompile.strategies.act import Act
from eecompile.strategies.ann import Ann
from eecompile.strategies.anytime import Anytime
from eecompile.strategies.base import ExitStrategy, Strategy
from eecompile.strategies.branchy import Branchy
from eecompile.strategies.cascade import Cascade
from eecompile.strategies.combined import Combined
from eecompile.strategies.depth_adaptive import DepthAdaptive
from eecompile.strategies.mebert import MeBert
from eecompile.strategies.router import Router
from eecompile.strategies.self_adaptive import SelfAdaptive
from eecompile.strategies.self_speculative import SelfSpeculative
from eecompile.strategies.skipnet import SkipNet

STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s for s in (Act, Ann, Anytime, Branchy, Cascade, DepthAdaptive, MeBert, SelfAdaptive, SelfSpeculative, SkipNet)
}


def strategy(spec: str | Strategy | Mapping[str, Any]) -> Strategy:
    """A strategy from its name, names joined by "+", its `to_dict()` or itself.

    Raises:
        StrategyError: Unknown name or option; the message lists the valid ones.
    """
    if isinstance(spec, Strategy):
        return spec
    if not isinstance(spec, str | Mapping):
        raise StrategyError("strategy= takes a name or an instance", got=type(spec).__name__, wanted=", ".join(STRATEGIES))
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name: Any = options.pop("name", None)
    if isinstance(name, str) and "+" in name and not options:
        return Combined(tuple(strategy(part.strip()) for part in name.split("+")))
    if name == Combined.name and set(options) == {"parts"}:
        return Combined(tuple(strategy(part) for part in options["parts"]))
    check_name("strategy", name, STRATEGIES, StrategyError)
    kind = STRATEGIES[name]
    valid = {f.name for f in fields(kind)}
    for key in options:
        if key not in valid:
            raise StrategyError(f"strategy {name!r} has no such option", got=key, wanted=near(key, valid))
    chosen: dict[str, Any] = dict(options)
    if isinstance(chosen.get("criterion"), dict):
        chosen["criterion"] = criterion(chosen["criterion"])
    return kind(**chosen)


__all__ = [
    "STRATEGIES",
    "Act",
    "Ann",
    "Anytime",
    "Branchy",
    "Cascade",
    "Combined",
    "DepthAdaptive",
    "ExitRecipe",
    "ExitStrategy",
    "GateRecipe",
    "HaltRecipe",
    "MeBert",
    "Recipe",
    "RouteRecipe",
    "Router",
    "SelfAdaptive",
    "SelfSpeculative",
    "SkipNet",
    "Strategy",
    "TrainingStage",
    "strategy",
]
