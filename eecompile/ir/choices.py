"""Gates, widths, halting steps and branches as one thing: choices between arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from eecompile.ir.recipes import GateRecipe, HaltRecipe, RouteRecipe
from eecompile.ir.records import Arm, Carry, Choice, Gate, Halt, Merge, Report, Route, Width


@dataclass(frozen=True)
class ChoiceRecords(Sequence[Choice]):
    """Everything in a graph that decides between arms, by kind; as a sequence, each of them as a `Choice`: gates and widths
    in the order of the gates, then halting steps, then branches.

    Attributes:
        gate_recipes: What the gates were inserted by: one entry, in a cascade one for each model with gates.
        halt_recipes: The same for the chains that halt.
        reports: What a run reports for each row in addition to its outputs.
    """

    gates: tuple[Gate, ...] = ()
    widths: tuple[Width, ...] = ()
    halts: tuple[Halt, ...] = ()
    route: Route | None = None
    gate_recipes: tuple[GateRecipe, ...] = ()
    halt_recipes: tuple[HaltRecipe, ...] = ()
    route_recipe: RouteRecipe | None = None
    reports: tuple[Report, ...] = ()

    @cached_property
    def _all(self) -> tuple[Choice, ...]:
        by_gate = {name: w for w in self.widths for name in w.gates}
        found = list[Choice]()
        for i, g in enumerate(self.gates):
            w = by_gate.get(g.name)
            if w is None:
                arms = _skip_or_run(g.carries)
                found.append(Choice(g.name, g.region, (g.decision,), arms, _merges(g.carries), (g.name,)))
            elif g.name == w.gates[0]:
                found.append(_width(w, self.gates[i : i + len(w.gates)]))
        found += [step for h in self.halts for step in _steps(h)]
        return (*found, *([_branches(self.route)] if self.route is not None and self.route.ways else []))

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, i: int) -> Choice: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Choice, ...]: ...
    def __getitem__(self, i: int | slice) -> Choice | tuple[Choice, ...]:
        return self._all[i]


def _skip_or_run(carries: Sequence[Carry]) -> tuple[Arm, Arm]:
    return Arm("skip", tuple(c.x for c in carries), skips=True), Arm("run", tuple(c.y for c in carries))


def _merges(carries: Sequence[Carry]) -> tuple[Merge, ...]:
    return tuple(Merge(c.node, c.batch_axis) for c in carries)


def _width(w: Width, gates: Sequence[Gate]) -> Choice:
    arms = [Arm(str(k), (value,)) for k, value in enumerate(w.values)]
    if w.skips:
        arms.insert(0, Arm("skip", (w.x,), skips=True))
    return Choice(
        w.name,
        w.region,
        tuple(g.decision for g in gates),
        tuple(arms),
        _merges(gates[-1].carries),
        w.gates,
        reads=(w.x,),
        inner=tuple(g.node for g in gates[:-1]),
    )


def _steps(h: Halt) -> Iterator[Choice]:
    for s in h.steps:
        if s.carries:
            arms, merges = _skip_or_run(s.carries), _merges(s.carries)
            yield Choice(s.name, s.region, (s.decision,), arms, merges, live=s.live, parts=s.parts)


def _branches(r: Route) -> Choice:
    arms = tuple(
        Arm(w.name, (w.value,), module=w.module, inputs=(r.x, *w.sides) if w.module and not w.custom else ()) for w in r.ways
    )
    return Choice(r.name, r.region, (r.choice,), arms, (Merge(r.node, r.batch_axis),), reads=(r.x, r.reads))
