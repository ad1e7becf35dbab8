"""Writes gates into the graph: a score, a decision, and `choose` after each region.

    score    = unit(x, mask)               [B] in [0, 1]
    decision = gate(score, thresholds, i)  [B] 1 or 0
    value    = choose(decision, [x, y])

Run as it stands the graph computes every region and chooses: the reference meaning of a skipped block. What lies between
x and y stays where it is; lowering takes it out as a submodule and runs it on the open rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError, StrategyError
from eecompile.gates import RecurrentCore, RecurrentGate, unit_class
from eecompile.ir import settings
from eecompile.ir.settings import Settings
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.find_regions import exclusive
from eecompile.passes.functional import make_functional
from eecompile.passes.narrow import Narrower, Part, new_norms
from eecompile.passes.place_gates import GATES, make_unit, site_of
from eecompile.passes.place_widths import part_of
from eecompile.program import Carry, Cut, Gate, Live, Program, Refusal, Region, Report, Width
from eecompile.strategies.base import GateRecipe
from eecompile.untrained import mark_untrained

assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertGates(Pass):
    """Inserts those of `program.gates` into the graph that are not in it yet: in a cascade the gates of each model in turn.

    Args:
        recipe: What the strategy asked for.
        units: Modules to use instead of new ones, by the name behind `eecompile_gates.`: for the training capture, or
            a loaded program.
        seed: Seed of the new units' weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_gates"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "gates placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gated"})

    recipe: GateRecipe
    units: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        done = tuple(g for g in program.gates if g.decision)
        program = program.replace(gates=program.gates[len(done) :])
        units = dict(self.units) or self.build(program)
        gm = facts.copy(program.graph_module)
        add_units(gm, units)
        program = program.replace(settings=self._settings(program))
        program.settings.attach(gm, facts.device_of(gm))
        writer = _Writer(gm, program, self.recipe, len(done))
        gates, widths = writer.add_all()
        gates = tuple(replace(g, group=len(program.gate_recipes)) for g in gates)
        gm.graph.lint()  # not tidied: nothing reads what chains that halt tell
        gm.recompile()
        cuts, refusals = moved_cuts(program, writer.spans)
        reports = tuple(Report(g.name, g.decision, g.node) for g in gates)
        reports += tuple(Report(f"{g.name}.score", g.score, g.node, training_only=True) for g in gates)
        marked = program.replace(
            graph_module=gm,
            gates=(*done, *gates),
            widths=widths,
            cuts=cuts,
            reports=(*program.reports, *reports),
            gate_recipes=(*program.gate_recipes, self.recipe),
        )
        return PassResult(marked, True, tuple(refusals), f"{len(gates)} gates")

    def _settings(self, program: Program) -> Settings:
        count, given = len(program.gates), self.recipe.threshold
        values = given if isinstance(given, tuple) else (given,) * count
        if len(values) != count:
            raise StrategyError(
                "wrong number of gate thresholds",
                got=len(values),
                wanted=f"{count}, one for each of {', '.join(g.region for g in program.gates)}",
            )
        return program.settings.add(settings.gates([g.name for g in program.gates]), values)

    def build(self, program: Program) -> dict[str, nn.Module]:
        """New units, in the dtype and on the device of the model; norms of the narrower widths are those of the model."""
        gm, regions = program.graph_module, {r.name: r for r in program.regions}
        device = facts.device_of(gm)
        units: dict[str, nn.Module] = {}
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
                mark_untrained(unit)
        names = facts.by_name(gm)
        for w in program.widths:
            region = regions[w.region]
            norms = new_norms(part_of(gm, names[region.x], names[region.y])[0], w.fractions)
            if norms is not None:
                dtype = getattr(torch, site_of(program, region, self.recipe.mask)[0].dtype)
                units[norms_name(w)] = norms.to(device=device, dtype=dtype)
        return units


def norms_name(width: Width) -> str:
    """Name of the module with a region's norms, below `eecompile_gates`."""
    return f"{width.name}_norms"


@dataclass(frozen=True)
class Span:
    """Where a gated region lies in the graph before gates were inserted.

    Attributes:
        start: Position of its first node that is computed behind its input; `stop` that of its value.
        y: Name of its value, and of the node that hands it on now.
    """

    region: str
    start: int
    stop: int
    y: str
    node: str


def add_units(gm: fx.GraphModule, units: Mapping[str, nn.Module]) -> None:
    """Puts units beside those that are there already."""
    container = nn.Module()
    before = dict(gm.get_submodule(GATES).named_children()) if hasattr(gm, GATES) else {}
    for name, unit in {**before, **units}.items():
        container.add_module(name, unit)
    gm.add_module(GATES, container)


class _Writer:
    """Writes gates in graph order; `offset` is the index of the first among all gates of the program."""

    def __init__(self, gm: fx.GraphModule, program: Program, recipe: GateRecipe, offset: int = 0) -> None:
        self.offset = offset
        self.gm, self.program, self.recipe, self.graph = gm, program, recipe, gm.graph
        self.names = facts.by_name(gm)
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.replaced: dict[str, fx.Node] = {}
        self.spans: list[Span] = []
        self.units: dict[str, fx.Node] = {}
        self.state: tuple[fx.Node, ...] = ()
        self.opened: fx.Node | None = None
        self.decided: dict[str, fx.Node] = {}
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            self.thresholds = self.graph.get_attr(settings.GATES_BUFFER)
            self.thresholds._rename("gate_thresholds")

    def add_all(self) -> tuple[tuple[Gate, ...], tuple[Width, ...]]:
        """Every gate, those of a region with widths together; the records of both with the names of the new nodes."""
        program, done, widths = self.program, list[Gate](), list[Width]()
        chains = {w.gates[0]: w for w in program.widths}
        while len(done) < len(program.gates):
            i = len(done)
            first = program.gates[i]
            behind = self.behind(first)
            width = chains.get(first.name)
            if width is None:
                done += self.add(i, (first,), behind, [])
                continue
            gates = program.gates[i : i + len(width.gates)]
            values = self.narrower(width, first)
            done += self.add(i, gates, behind, values)
            x = self.replaced.get(first.carries[0].x, self.names[first.carries[0].x])
            widths.append(replace(width, x=x.name, values=tuple(v.name for v in values)))
        return tuple(done), tuple(widths)

    def behind(self, gate: Gate) -> list[fx.Node]:
        """What the region computes behind its input."""
        x, y = (self.names[n] for n in (gate.carries[0].x, gate.carries[0].y))
        return [n for n in exclusive(self.nodes, self.position, [y], {x}) if self.position[n] > self.position[x]]

    def narrower(self, width: Width, gate: Gate) -> list[fx.Node]:
        """Writes the region at every width below the full one; the values at all widths."""
        x, y = self.replaced.get(gate.carries[0].x, self.names[gate.carries[0].x]), self.names[gate.carries[0].y]
        make_functional(x, self.position)
        part, reason = part_of(self.gm, x, y)
        sizes = tuple(tuple(c.kept(f) for f in width.fractions) for c in part.channels)
        if sizes != width.channels:
            raise PassError(
                "a region with widths has other channels in this capture",
                where=width.region,
                got=f"{sizes} {reason if not sizes else ''}",
                wanted=str(width.channels),
            )
        self._spare(part)
        norms = f"{GATES}.{norms_name(width)}.levels" if part.norms() else None
        values = []
        with self.graph.inserting_before(y.next):
            for k, fraction in enumerate(width.fractions[:-1]):
                tag = f"{width.name}_{k}"
                values.append(Narrower(part, fraction, f"{norms}.{k}" if norms else None, tag).write())
        return [*values, y]

    def _spare(self, part: Part) -> None:
        """Values that all widths read are not overwritten by the full one."""
        dependent = set(part.dependent())
        shared = {a for n in part.nodes if n in dependent for a in n.all_input_nodes if a not in dependent}
        for a in sorted(shared, key=lambda n: self.position.get(n, -1)):
            if a.op != "get_attr":
                make_functional(a, self.position)

    def add(self, i: int, gates: Sequence[Gate], behind: list[fx.Node], values: list[fx.Node]) -> list[Gate]:
        """A region's gate, or all of its gates where it has widths; `values` are then those at each width."""
        carry = gates[0].carries[0]
        x, y = self.replaced.get(carry.x, self.names[carry.x]), self.names[carry.y]
        decisions = []
        with self.graph.inserting_before(behind[0]):
            for k, gate in enumerate(gates):
                score = self.score(i + k, gate, x)
                decisions.append((score, self.decision(i + k, gate, score)))
        before = values[0] if len(gates) < len(values) else x
        last = values[-2] if values else y  # the full width is where it was, the narrower ones follow it
        done: list[Gate] = []
        for gate, value, (score, decision) in zip(gates, values[-len(gates) :] or [y], decisions, strict=True):
            with self.graph.inserting_after(last):
                args = (decision, [before, value], carry.batch_axis)
                node = self.graph.call_function(torch.ops.eecompile.choose.default, args)
            node._rename(f"{gate.name}_value")
            node.meta = {k: v for k, v in y.meta.items() if k in ("val", "stack")}
            made = (Carry(value.name, before.name, node.name, carry.batch_axis),)
            needs = gate.needs or self.before(i)
            done.append(replace(gate, node=node.name, score=score.name, decision=decision.name, needs=needs, carries=made))
            last = before = node
        # Compaction hands x or y on as they are: nothing may overwrite either, or what comes behind.
        for read in (x, y):
            make_functional(read, self.position)
        chosen = {g.node for g in done}
        y.replace_all_uses_with(last, delete_user_cb=lambda u: u.name not in chosen)
        make_functional(last, self.position)
        self.replaced[carry.y] = last
        self.spans.append(Span(gates[0].region, self.position[behind[0]], self.position[y], carry.y, last.name))
        return done

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

    def before(self, i: int) -> str:
        """Name of the gate that shuts gate i with itself, where gates shut all later ones."""
        return self.program.gates[i - 1].name if self.recipe.monotone and i else ""

    def decision(self, i: int, gate: Gate, score: fx.Node) -> fx.Node:
        counted = bool(self.recipe.min_open) and gate.kind != "width"
        args: tuple[Any, ...] = (score, self.thresholds, self.offset + i)
        if counted:
            later = sum(g.kind != "width" for g in self.program.gates[i + 1 :])
            args = (*args, self.opened, max(0, self.recipe.min_open - later))
        node = self.graph.call_function(torch.ops.eecompile.gate.default, args)
        node._rename(f"{gate.name}_open")
        node.meta["val"] = self._float32(score)
        before = self.decided.get(gate.needs or self.before(i))
        if before is not None:
            both = self.graph.call_function(torch.ops.aten.mul.Tensor, (node, before))
            both._rename(f"{gate.name}_still_open")
            both.meta["val"] = node.meta["val"]
            node = both
        self.decided[gate.name] = node
        if counted:
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


def moved_cuts(program: Program, spans: Sequence[Span]) -> tuple[tuple[Cut, ...], list[Refusal]]:
    """The cuts with each gated region's value in place of the region's own; cuts inside a region are refused."""
    position = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    swap = {s.y: s.node for s in spans}
    kept, refusals = [], []
    for cut in program.cuts:
        at = position[cut.after]
        inside_of = next((s for s in spans if s.start <= at < s.stop), None)
        if inside_of is not None:
            refusals.append(Refusal(cut.name, "insert_gates", f"inside {inside_of.region}, which a gate may skip"))
            continue
        live = tuple(Live(swap.get(v.node, v.node), *_rest(v)) for v in cut.live)
        kept.append(replace(cut, after=swap.get(cut.after, cut.after), value=swap.get(cut.value, cut.value), live=live))
    return tuple(kept), refusals


def _rest(v: Live) -> tuple[Any, ...]:
    return v.batch_axis, v.shape, v.dtype, v.trunk


def relocate_gates(program: Program, gates: tuple[Gate, ...], widths: tuple[Width, ...] = ()) -> Program:
    """The same gates in another capture of the same model, found by the anchors of their regions.

    Raises:
        PassError: A region of the first capture has no counterpart.
    """
    nodes = list(program.graph_module.graph.nodes)
    names = facts.by_name(program.graph_module)
    found = {a: n for n, a in facts.anchors(nodes).items()}
    inputs = {g: w.x for w in widths for g in w.gates}
    moved, regions = [], []
    for g in gates:
        c, (ax, ay) = g.carries[0], g.anchors
        x = found.get(ax) if ax is not None else names.get(inputs.get(g.name, c.x))
        y = found.get(ay) if ay is not None else names.get(c.y)
        if x is None or y is None:
            raise PassError("a gate's region is not in the other capture", where=g.region, got=str(ax if x is None else ay))
        moved.append(replace(g, score="", decision="", carries=(Carry(y.name, x.name, "", c.batch_axis),)))
        regions.append(Region(g.region, g.kind, "", x.name, y.name, c.batch_axis, g.flops, g.depth, True, g.anchors))
    return program.replace(
        gates=(*program.gates, *moved),
        widths=widths or program.widths,
        regions=(*program.regions, *regions),
        facts=program.facts | {"gates placed"},
    )
