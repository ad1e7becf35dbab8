"""Which parts of a sum of strategies contradict one another: found from their options, before any model is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError
from eecompile.strategies.base import PLAIN, ExitStrategy, Strategy
from eecompile.strategies.cascade import Cascade

PRIMITIVES = ("exits", "gates", "halting", "routes")
# Objectives that hold the task's loss; a sum has one of them.
TASKS = ("exits", "weighted_cross_entropy", "distillation", "adaloss", "depth_targets", "per_exit_loss")
# What the exits of one program share. A cascade's and those inside of its models agree on it.
SHARED = ("criterion", "combine", "weights", "distillation", "mask")


@dataclass(frozen=True)
class Clause:
    """An option of one part, as an error names it: `anytime(exits='everywhere')`."""

    part: Strategy
    option: str

    def __str__(self) -> str:
        value = getattr(self.part, self.option, None)
        shown = value.name if isinstance(value, Criterion) else value
        return f"{self.part.name}({self.option}={shown!r})"


def conflict(what: str, first: Clause, second: Clause, wanted: str, hint: str | None = None) -> StrategyError:
    return StrategyError(what, got=f"{first} + {second}", wanted=wanted, hint=hint)


def check(parts: Sequence[Strategy], models: int | None = None) -> None:
    """Whether the parts can be one program.

    Args:
        models: How many models there are, None where that is not known yet.

    Raises:
        StrategyError: Two clauses contradict each other; both are named.
    """
    for first, second in combinations(parts, 2):
        _insertions(first, second, models)
        _masks(first, second)
        _training(first, second)


def _insertions(first: Strategy, second: Strategy, models: int | None) -> None:
    for kind in PRIMITIVES:
        a, b = clause(first, kind), clause(second, kind)
        if a is None or b is None or (kind == "exits" and models != 1 and over_models(first) != over_models(second)):
            continue
        hint = "say all that is wanted in the options of one"
        if kind == "exits" and any(part.name == "self_adaptive" for part in (first, second)):
            hint = "SelfAdaptive(exits=None) leaves the exits to the other"
        elif kind == "exits" and any(part.name == "depth_adaptive" for part in (first, second)):
            hint = 'DepthAdaptive(targets="cost") needs no exits of its own'
        raise conflict(f"two strategies insert {kind}", a, b, f"{kind} from one of them", hint)
    for one, other in ((first, second), (second, first)):
        gates, halts = clause(one, "gates"), clause(other, "halting")
        if gates is not None and halts is not None:
            raise conflict(
                "gates and halting both leave blocks out",
                gates,
                halts,
                "one of them: a row that halted skips every later block already",
                "in a cascade one model may have gates and another halt",
            )


def _masks(first: Strategy, second: Strategy) -> None:
    masks = getattr(first, "mask", None), getattr(second, "mask", None)
    if None not in masks and masks[0] != masks[1]:
        raise conflict("two names of the padding mask", Clause(first, "mask"), Clause(second, "mask"), "one of them")


def _training(first: Strategy, second: Strategy) -> None:
    if first.stages and second.stages:
        a, b = staging(first), staging(second)
        raise conflict("two strategies have stages of training", a, b, "stages from one of them at most")
    for one, other in ((first, second), (second, first)):
        if one.two_stage and other.stages:
            raise conflict(
                "two strategies have stages of training",
                Clause(one, "two_stage"),
                staging(other),
                "stages from one of them at most",
                "fit the exits and the gates one after the other: two calls of fast.fit",
            )
    a_task, b_task = (task_of(part.objective) for part in (first, second))
    pair = over_models(first) != over_models(second)
    if a_task != PLAIN and b_task != PLAIN and not pair:
        a, b = (Clause(p, "objective") for p in (first, second))
        raise conflict("two objectives that cannot be added: each holds the task's loss", a, b, "one of them")


def agreed(parts: Sequence[Strategy]) -> tuple[Strategy, ...]:
    """The parts, a cascade's exits and those inside of its models of one mind: an option with its default value gives way.

    Raises:
        StrategyError: Both have values of their own, and different ones.
    """
    cascade = next((p for p in parts if over_models(p)), None)
    inner = next((p for p in parts if p is not cascade and isinstance(p, ExitStrategy) and clause(p, "exits")), None)
    if cascade is None or inner is None:
        return tuple(parts)
    changes: dict[str, dict[str, Any]] = {"cascade": {}, "inner": {}}
    for option in SHARED:
        a, b = getattr(cascade, option), getattr(inner, option)
        if a == b:
            continue
        if a == default(cascade, option):
            changes["cascade"][option] = b
        elif b == default(inner, option):
            changes["inner"][option] = a
        else:
            what = {"criterion": "two criteria", "combine": "two ways to combine exits"}.get(option, f"two {option}=")
            raise conflict(what, Clause(cascade, option), Clause(inner, option), "the exits of one program share it")
    new = {id(cascade): replace(cascade, **changes["cascade"]), id(inner): replace(inner, **changes["inner"])}
    return tuple(new.get(id(p), p) for p in parts)


def default(part: Strategy, option: str) -> Any:
    """The default value of an option."""
    given = next(f.default for f in fields(part) if f.name == option)
    return type(part)(**{option: given}).__dict__[option]


def over_models(part: Strategy) -> bool:
    """Whether its exits are the predictions of several models."""
    return isinstance(part, Cascade) and part.exits == "predictions"


def clause(part: Strategy, kind: str) -> Clause | None:
    """What makes a strategy insert exits, gates or halting; None where nothing does."""
    if getattr(part.recipe(), kind) is None:
        return None
    return Clause(part, part.inserts.get(kind, kind))


def staging(part: Strategy) -> Clause:
    """The option that says how training is divided."""
    return Clause(
        part, next((o for o in ("shares", "curriculum", "targets", "mode", "router") if hasattr(part, o)), "stages")
    )


def terms(objective: Mapping[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """The parts of a sum with their factors, or the objective alone."""
    if objective["name"] != "sum":
        return [(1.0, dict(objective))]
    factors = objective.get("factors") or [1.0] * len(objective["parts"])
    return [(f * g, t) for f, part in zip(factors, objective["parts"], strict=True) for g, t in terms(part)]


def task_of(objective: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an objective that holds the task's loss; the plain one where none does."""
    return next((t for _, t in terms(objective) if t["name"] in TASKS), dict(PLAIN))
