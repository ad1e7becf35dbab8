"""Objectives by name: as they stand in a saved program, a checkpoint or a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from eecompile.errors import EecompileError, near
from eecompile.training.objectives.base import Objective

OBJECTIVES: dict[str, type[Objective]] = {}


def register(*kinds: type[Objective]) -> None:
    """Makes objectives known by their names."""
    OBJECTIVES.update({kind.name: kind for kind in kinds})


def objective(spec: str | Mapping[str, Any] | Objective | None) -> Objective:
    """An objective from its name, names joined by "+", its `to_dict()`, or itself. None is the default.

    Raises:
        EecompileError: The name or an option is unknown; the message lists the valid ones.
    """
    if isinstance(spec, Objective):
        return spec
    if spec is None:
        return OBJECTIVES["weighted_cross_entropy"]()
    if isinstance(spec, str) and "+" in spec:
        return OBJECTIVES["sum"](parts=tuple(objective(part.strip()) for part in spec.split("+")))  # type: ignore[call-arg]
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name: Any = options.pop("name", None)
    if name not in OBJECTIVES:
        raise EecompileError("unknown objective", got=repr(name), wanted=near(str(name), OBJECTIVES))
    known = [f.name for f in fields(OBJECTIVES[name]) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise EecompileError(f"unknown option of the objective {name!r}", got=option, wanted=near(option, known))
    return OBJECTIVES[name](**options)
