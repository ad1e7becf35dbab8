"""Writes gates into the graph: a score, a decision, and `skip` behind each region.

    score    = unit(x, mask)               [B] in [0, 1]
    decision = gate(score, thresholds, i)  [B] 1 or 0
    value    = skip(decision, y, x)

Run as it stands the graph computes every region and chooses: the reference meaning of a skipped block. What lies between
x and y stays where it is; lowering takes it out as a submodule and runs it on the open rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError, StrategyError
from eecompile.gates import GateUnit, RecurrentCore, RecurrentGate, unit_class
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.find_regions import exclusive
from eecompile.passes.functional import make_functional
from eecompile.passes.place_gates import GATES, make_unit, site_of
from eecompile.program import Carry, Cut, Gate, Live, Program, Refusal, Region, Report
from eecompile.strategies.base import GateRecipe

GATE_THRESHOLDS = "eecompile_gate_thresholds"
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertGates(Pass):
    """Inserts `program.gates` into the graph.

    Args:
        recipe: What the strategy asked for.
        units: Modules to use instead of new ones, by the name behind `eecompile_gates.`: for the training capture, or
            a loaded program.
        thresholds: The buffer to share instead of a new one.
        seed: Seed of the new units' weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_gates"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "gates placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gated"})

    recipe: GateRecipe
    units: Mapping[str, nn.Module] = field(default_factory=dict)
    thresholds: torch.Tensor | None = None
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        units = dict(self.units) or self.build(program)
        gm = facts.copy(program.graph_module)
        container = nn.Module()
        for name, unit in units.items():
            container.add_module(name, unit)
        gm.add_module(GATES, container)
        gm.register_buffer(GATE_THRESHOLDS, self._thresholds(program, gm))
        writer = _Writer(gm, program, self.recipe)
        gates = tuple(writer.add(i, g) for i, g in enumerate(program.gates))
        facts.tidy(gm)
        cuts, refusals = moved_cuts(program, gates, writer.insides)
        reports = tuple(Report(g.name, g.decision, g.node) for g in gates)
        reports += tuple(Report(f"{g.name}.score", g.score, g.node, training_only=True) for g in gates)
        done = program.replace(
            graph_module=gm, gates=gates, cuts=cuts, reports=(*program.reports, *reports), gate_recipe=self.recipe
        )
        return PassResult(done, True, tuple(refusals), f"{len(gates)} gates")

    def _thresholds(self, program: Program, gm: fx.GraphModule) -> torch.Tensor:
        if self.thresholds is not None:
            return self.thresholds
        count, given = len(program.gates), self.recipe.threshold
        values = given if isinstance(given, tuple) else (given,) * count
        if len(values) != count:
            raise StrategyError(
                "wrong number of gate thresholds",
                got=len(values),
                wanted=f"{count}, one for each of {', '.join(g.region for g in program.gates)}",
            )
        device = next((p.device for p in gm.parameters()), torch.device("cpu"))
        return torch.tensor(values, dtype=torch.float32, device=device)

    def build(self, program: Program) -> dict[str, GateUnit]:
        """New units, in the dtype and on the device of the model."""
        gm, regions = program.graph_module, {r.name: r for r in program.regions}
        device = next((p.device for p in gm.parameters()), torch.device("cpu"))
        units: dict[str, GateUnit] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            shared = RecurrentCore(self.recipe.open_bias) if self.recipe.unit == "recurrent" else None
            for g in program.gates:
                name = g.unit.rsplit(".", 1)[1]
                if name in units:
                    continue
                site, _ = site_of(program, regions[g.region], self.recipe.mask)
                kind = unit_class(self.recipe.unit, site, g.region)
                unit = make_unit(kind, site, self.recipe.open_bias, len(program.gates), shared)
                units[name] = unit.to(device=device, dtype=getattr(torch, site.dtype))
        return units


class _Writer:
    """Writes gates in graph order."""

    def __init__(self, gm: fx.GraphModule, program: Program, recipe: GateRecipe) -> None:
        self.gm, self.program, self.recipe, self.graph = gm, program, recipe, gm.graph
        self.names = facts.by_name(gm)
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.replaced: dict[str, fx.Node] = {}
        self.insides: list[list[fx.Node]] = []
        self.units: dict[str, fx.Node] = {}
        self.state: tuple[fx.Node, ...] = ()
        self.opened: fx.Node | None = None
        self.before: fx.Node | None = None
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            self.thresholds = self.graph.get_attr(GATE_THRESHOLDS)
            self.thresholds._rename("gate_thresholds")

    def add(self, i: int, gate: Gate) -> Gate:
        carry = gate.carries[0]
        x, y = self.replaced.get(carry.x, self.names[carry.x]), self.names[carry.y]
        inside = exclusive(self.nodes, self.position, [y], {self.names[carry.x]})
        self.insides.append(inside)
        behind = [n for n in inside if self.position[n] > self.position[self.names[carry.x]]]
        with self.graph.inserting_before(behind[0]):
            score = self.score(i, gate, x)
            decision = self.decision(i, gate, score)
        with self.graph.inserting_after(y):
            args = (decision, y, x, carry.batch_axis)
            node = self.graph.call_function(torch.ops.eecompile.skip.default, args)
        node._rename(f"{gate.name}_value")
        node.meta = {k: v for k, v in y.meta.items() if k in ("val", "stack")}
        # Compaction hands x or y on as they are: nothing may overwrite either, or what comes behind.
        for read in (x, y):
            make_functional(read, self.position)
        y.replace_all_uses_with(node, delete_user_cb=lambda u: u is not node)
        make_functional(node, self.position)
        self.replaced[carry.y] = node
        return replace(
            gate,
            node=node.name,
            score=score.name,
            decision=decision.name,
            needs=f"gate_{i - 1}" if self.recipe.monotone and i else "",
            carries=(Carry(y.name, x.name, node.name, carry.batch_axis),),
        )

    def score(self, i: int, gate: Gate, x: fx.Node) -> fx.Node:
        name = gate.unit.rsplit(".", 1)[1]
        unit = self.gm.get_submodule(gate.unit)
        common, recurrent = getattr(unit, "common", False), getattr(unit, "recurrent", False)
        if gate.unit not in self.units:
            axis = gate.carries[0].batch_axis
            mask = self._mask(gate)
            call = self.graph.call_module(gate.unit, (x, mask, *self.state))
            call._rename(f"{name}_scores" if common or recurrent else f"{gate.name}_score")
            count = len(self.program.gates)
            call.meta["val"] = self._like(x, axis, (count,) if common else ())
            self.units[gate.unit] = call
            if recurrent:
                assert isinstance(unit, RecurrentGate)
                width = unit.shared.cell.hidden_size
                shapes: tuple[tuple[int, ...], ...] = ((), (width,), (width,))
                call.meta["val"] = tuple(self._like(x, axis, s) for s in shapes)
                parts = [self._item(call, k, f"{gate.name}_{n}") for k, n in enumerate(("score", "h", "c"))]
                self.state = tuple(parts[1:])
                return parts[0]
        call = self.units[gate.unit]
        if not common:
            return call
        score = self.graph.call_function(torch.ops.aten.select.int, (call, 1, i))
        score._rename(f"{gate.name}_score")
        score.meta["val"] = call.meta["val"][:, i]
        return score

    def _mask(self, gate: Gate) -> fx.Node | None:
        region = next((r for r in self.program.regions if r.name == gate.region), None)
        if region is None:
            raise PassError("a gate's region is not in this graph", where=gate.region)
        _, name = site_of(self.program, region, self.recipe.mask)
        return self.names[name] if name is not None else None

    def decision(self, i: int, gate: Gate, score: fx.Node) -> fx.Node:
        least = max(0, self.recipe.min_open - (len(self.program.gates) - 1 - i))
        args: tuple[Any, ...] = (score, self.thresholds, i)
        if self.recipe.min_open:
            args = (*args, self.opened, least)
        node = self.graph.call_function(torch.ops.eecompile.gate.default, args)
        node._rename(f"{gate.name}_open")
        node.meta["val"] = self._float32(score)
        if self.recipe.monotone and self.before is not None:
            both = self.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.before))
            both._rename(f"{gate.name}_still_open")
            both.meta["val"] = node.meta["val"]
            node = both
        self.before = node
        if self.recipe.min_open:
            if self.opened is None:
                self.opened = node
            else:
                self.opened = self.graph.call_function(torch.ops.aten.add.Tensor, (self.opened, node))
                self.opened._rename(f"{gate.name}_count")
                self.opened.meta["val"] = node.meta["val"]
        return node

    def _item(self, source: fx.Node, k: int, name: str) -> fx.Node:
        node = self.graph.call_function(operator.getitem, (source, k))
        node._rename(name)
        node.meta["val"] = source.meta["val"][k]
        return node

    def _like(self, x: fx.Node, axis: int, rest: tuple[int, ...]) -> Any:
        v = facts.value(x)
        with v.fake_mode:
            return v.new_empty((v.shape[axis], *rest))

    def _float32(self, score: fx.Node) -> Any:
        v = facts.value(score)
        with v.fake_mode:
            return torch.empty_like(v, dtype=torch.float32)


def moved_cuts(
    program: Program, gates: tuple[Gate, ...], insides: list[list[fx.Node]]
) -> tuple[tuple[Cut, ...], list[Refusal]]:
    """The cuts with each gated region's value in place of the region's own; cuts inside a region are refused."""
    position = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    swap = {c.y: c.node for g in gates for c in g.carries}
    spans = []
    for g, inside in zip(gates, insides, strict=True):
        c = g.carries[0]
        start = min(position[n.name] for n in inside if position[n.name] > position.get(c.x, -1))
        spans.append((start, position[c.y], g))
    kept, refusals = [], []
    for cut in program.cuts:
        at = position[cut.after]
        inside_of = next((g for start, end, g in spans if start <= at < end), None)
        if inside_of is not None:
            refusals.append(Refusal(cut.name, "insert_gates", f"inside {inside_of.region}, which a gate may skip"))
            continue
        live = tuple(Live(swap.get(v.node, v.node), *_rest(v)) for v in cut.live)
        kept.append(replace(cut, after=swap.get(cut.after, cut.after), value=swap.get(cut.value, cut.value), live=live))
    return tuple(kept), refusals


def _rest(v: Live) -> tuple[Any, ...]:
    return v.batch_axis, v.shape, v.dtype, v.trunk


def relocate_gates(program: Program, gates: tuple[Gate, ...]) -> Program:
    """The same gates in another capture of the same model, found by the anchors of their regions.

    Raises:
        PassError: A region of the first capture has no counterpart.
    """
    nodes = list(program.graph_module.graph.nodes)
    names = facts.by_name(program.graph_module)
    found = {a: n for n, a in facts.anchors(nodes).items()}
    moved, regions = [], []
    for g in gates:
        c, (ax, ay) = g.carries[0], g.anchors
        x = found.get(ax) if ax is not None else names.get(c.x)
        y = found.get(ay) if ay is not None else names.get(c.y)
        if x is None or y is None:
            raise PassError("a gate's region is not in the other capture", where=g.region, got=str(ax if x is None else ay))
        moved.append(replace(g, carries=(Carry(y.name, x.name, "", c.batch_axis),)))
        regions.append(Region(g.region, g.kind, "", x.name, y.name, c.batch_axis, g.flops, g.depth, True, g.anchors))
    return program.replace(gates=tuple(moved), regions=tuple(regions), facts=program.facts | {"gates placed"})
