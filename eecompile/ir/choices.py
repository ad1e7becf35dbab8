"""Gates, widths, halting steps and branches as one thing: choices between arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, overload

from eecompile.ir.recipes import GateRecipe, HaltRecipe, RouteRecipe
from eecompile.ir.records import (
    Arm,
    Carry,
    Charge,
    Choice,
    Decider,
    Gate,
    HaltingChain,
    Merge,
    Report,
    Route,
    TokenPart,
    Width,
)
from eecompile.ir.settings import BRANCHES, EXITS, GATES, HALTING


@dataclass(frozen=True)
class ChoiceRecords(Sequence[Choice]):
    """Everything in a graph that decides between arms, by kind; as a sequence, each of them as a `Choice`: gates and widths
    in the order of the gates, then halting steps, then branches.

    Attributes:
        gate_recipes: What the gates were inserted by: one entry, in a cascade one for each model with gates.
        halt_recipes: The same for the chains that halt.
        reports: What a run reports for each row in addition to its outputs.
        parts: By name of a halting step what runs at live positions only; set by `find_token_parts`.
        begins: By name of a node of `places` how many exits lie before it; set by `stage`.
        only_for: By name of a node the exits that alone need it, where the model's own output does not: it runs while one of
            them is open. Set by `stage`.
    """

    gates: tuple[Gate, ...] = ()
    widths: tuple[Width, ...] = ()
    chains: tuple[HaltingChain, ...] = ()
    route: Route | None = None
    gate_recipes: tuple[GateRecipe, ...] = ()
    halt_recipes: tuple[HaltRecipe, ...] = ()
    route_recipe: RouteRecipe | None = None
    reports: tuple[Report, ...] = ()
    parts: Mapping[str, tuple[TokenPart, ...]] = field(default_factory=dict)
    begins: Mapping[str, int] = field(default_factory=dict)
    only_for: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def _all(self) -> tuple[Choice, ...]:
        by_gate = {name: w for w in self.widths for name in w.gates}
        found = list[Choice]()
        for i, g in enumerate(self.gates):
            w = by_gate.get(g.name)
            if w is None:
                arms = _skip_or_run(g.carries)
                merges = _merges(g.carries)
                found.append(Choice(g.name, g.region, (g.decision,), arms, merges, GATES, 1, (g.name,), (g.score,), g.needs))
            elif g.name == w.gates[0]:
                found.append(_width(w, self.gates[i : i + len(w.gates)]))
        found += [step for h in self.chains for step in self._steps(h)]
        return (*found, *([_branches(self.route)] if self.route is not None and self.route.ways else []))

    def _steps(self, h: HaltingChain) -> Iterator[Choice]:
        for s in h.steps:
            if s.carries:
                arms, merges, usual = _skip_or_run(s.carries), _merges(s.carries), int(not h.repeated)
                parts = self.parts.get(s.name, ())
                yield Choice(s.name, s.region, (s.decision,), arms, merges, HALTING, usual, live=s.live, parts=parts)

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, i: int) -> Choice: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Choice, ...]: ...
    def __getitem__(self, i: int | slice) -> Choice | tuple[Choice, ...]:
        return self._all[i]

    @cached_property
    def deciders(self) -> tuple[Decider, ...]:
        """The units of gates, halting steps and the router, in this order."""
        found = [Decider(g.name, g.unit, GATES, (g.name,), g.decision, g.node, g.unit_flops) for g in self.gates]
        for h in self.chains:
            steps = zip(h.steps, h.ys, strict=True)
            found += [Decider(s.name, s.unit, HALTING, ("halting",), y, h.output, s.unit_flops) for s, y in steps]
        r = self.route
        if r is not None:
            family, slots = EXITS if r.to_exits else BRANCHES, tuple(w.name for w in r.ways[:-1])
            found.append(Decider(r.name, r.unit, family, slots, r.weights, r.node, r.unit_flops))
        return tuple(found)

    @cached_property
    def charges(self) -> tuple[Charge, ...]:
        """What a row pays for apart from the stages: for gates, for the steps of every chain, and for branches."""
        found = [Charge(g.name, g.flops, True, g.decision, g.node) for g in self.gates]
        for h in self.chains:
            for k, (s, y) in enumerate(zip(h.steps, h.ys, strict=True)):
                live = sum(p.flops for p in self.parts.get(s.name, ()))
                found.append(Charge(s.name, s.flops, not h.repeated or not k, y, h.output, s.unit_flops, live))
        r = self.route
        for w in () if r is None else r.ways:
            assert r is not None
            found.append(Charge(f"{r.name}.{w.name}", w.flops, w is r.ways[-1], r.node, r.node))
        return tuple(found)

    @property
    def places(self) -> set[str]:
        """Names of the nodes whose place among the exits is asked for."""
        return {d.node for d in self.deciders} | {c.node for c in self.charges} | {h.output for h in self.chains}

    def stage_of(self, node: str) -> int:
        """How many exits lie before a node of `places`; 0 in a graph without stages."""
        return self.begins.get(node, 0)

    @property
    def stops(self) -> bool:
        """Whether halting scores are probabilities of stopping: training reads a prediction for every step then."""
        return any(r.rule == "stop" for r in self.halt_recipes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, without what passes find again."""
        bare = replace(self, route_recipe=None, reports=(), parts={}, begins={}, only_for={})
        return {**asdict(bare), "route_recipe": None if self.route_recipe is None else self.route_recipe.to_dict()}


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
        GATES,
        len(arms) - 1,
        w.gates,
        tuple(g.score for g in gates),
        gates[0].needs,
        reads=(w.x,),
        inner=tuple(g.node for g in gates[:-1]),
    )


def _branches(r: Route) -> Choice:
    arms = tuple(
        Arm(w.name, (w.value,), module=w.module, inputs=(r.x, *w.sides) if w.module and not w.custom else ()) for w in r.ways
    )
    merges, usual = (Merge(r.node, r.batch_axis),), len(arms) - 1
    return Choice(r.name, r.region, (r.choice,), arms, merges, BRANCHES, usual, reads=(r.x, r.reads))
