"""Writes gates into the graph: a score, a decision, and `choose` after each region.

    score    = unit(x, mask)               [B] in [0, 1]
    decision = gate(score, thresholds, i)  [B] 1 or 0
    value    = choose(decision, [x, y])

Run as it stands the graph computes every region and chooses: the reference meaning of a skipped block. What lies between
x and y stays where it is; lowering takes it out as a submodule and runs it on the open rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError, StrategyError
from eecompile.gates import RecurrentCore, RecurrentGate
from eecompile.ir import settings
from eecompile.ir.graph import Counterparts
from eecompile.ir.recipes import GateRecipe
from eecompile.ir.records import Carry, Gate, Width
from eecompile.ir.settings import Settings
from eecompile.ir.writer import GraphWriter, Span, add_modules
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.find_regions import exclusive
from eecompile.passes.narrow import Narrower, Part, new_norms
from eecompile.passes.place_gates import GATES, mask_of, new_units, site_of
from eecompile.passes.place_widths import part_of
from eecompile.program import Program, Region, Report
from eecompile.untrained import seeded

assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertGates(Pass):
    """Inserts those gates of a program that are not in the graph yet: in a cascade the gates of each model in turn.

    Args:
        recipe: What the strategy asked for.
        units: Modules to use instead of new ones, by the name after `eecompile_gates.`: for the training capture, or
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
        done = tuple(g for g in program.choices.gates if g.decision)
        program = program.replace(gates=program.choices.gates[len(done) :])
        units = dict(self.units) or self.build(program)
        gm = facts.copy(program.graph_module)
        add_modules(gm, GATES, units)
        program = program.replace(settings=self._settings(program))
        program.settings.attach(gm, facts.device_of(gm))
        writer = _Writer(gm, program, self.recipe, len(done))
        gates, widths = writer.add_all()
        gates = tuple(replace(g, group=len(program.choices.gate_recipes)) for g in gates)
        writer.finish()
        cuts, refusals = writer.moved_cuts(program.structure.cuts, self.name)
        reports = tuple(Report(g.name, g.decision, g.node) for g in gates)
        reports += tuple(Report(f"{g.name}.score", g.score, g.node, training_only=True) for g in gates)
        marked = program.replace(
            graph_module=gm,
            gates=(*done, *gates),
            widths=widths,
            cuts=cuts,
            reports=(*program.choices.reports, *reports),
            gate_recipes=(*program.choices.gate_recipes, self.recipe),
        )
        return PassResult(marked, True, refusals, f"{len(gates)} gates")

    def _settings(self, program: Program) -> Settings:
        count, given = len(program.choices.gates), self.recipe.threshold
        values = given if isinstance(given, tuple) else (given,) * count
        if len(values) != count:
            raise StrategyError(
                "wrong number of gate thresholds",
                got=len(values),
                wanted=f"{count}, one for each of {', '.join(g.region for g in program.choices.gates)}",
            )
        return program.settings.add(settings.gates([g.name for g in program.choices.gates]), values)

    def build(self, program: Program) -> dict[str, nn.Module]:
        """New units, in the dtype and on the device of the model; norms of the narrower widths are those of the model."""
        gm, regions = program.graph_module, {r.name: r for r in program.structure.regions}
        device, bias = facts.device_of(gm), self.recipe.open_bias
        with seeded(self.seed):
            shared = RecurrentCore(bias) if self.recipe.unit == "recurrent" else None
            units = new_units(program, self.recipe, [(g.unit, g.region, bias) for g in program.choices.gates], shared)
        names = facts.by_name(gm)
        for w in program.choices.widths:
            region = regions[w.region]
            norms = new_norms(part_of(gm, names[region.x], names[region.y])[0], w.fractions)
            if norms is not None:
                dtype = getattr(torch, site_of(program, region, self.recipe.mask)[0].dtype)
                units[norms_name(w)] = norms.to(device=device, dtype=dtype)
        return units


def norms_name(width: Width) -> str:
    """Name of the module with a region's norms, below `eecompile_gates`."""
    return f"{width.name}_norms"


class _Writer(GraphWriter):
    """Writes gates in graph order; `offset` is the index of the first among all gates of the program."""

    def __init__(self, gm: fx.GraphModule, program: Program, recipe: GateRecipe, offset: int = 0) -> None:
        super().__init__(gm)
        self.program, self.recipe, self.offset = program, recipe, offset
        self.units: dict[str, fx.Node] = {}
        self.state: tuple[fx.Node, ...] = ()
        self.opened: fx.Node | None = None
        self.decided: dict[str, fx.Node] = {}
        self.thresholds = self.setting(settings.GATES_BUFFER, "gate_thresholds")

    def add_all(self) -> tuple[tuple[Gate, ...], tuple[Width, ...]]:
        """Every gate, those of a region with widths together; the records of both with the names of the new nodes."""
        program, done, widths = self.program, list[Gate](), list[Width]()
        chains = {w.gates[0]: w for w in program.choices.widths}
        while len(done) < len(program.choices.gates):
            i = len(done)
            first = program.choices.gates[i]
            after = self.after(first)
            width = chains.get(first.name)
            if width is None:
                done += self.add(i, (first,), after, [])
                continue
            gates = program.choices.gates[i : i + len(width.gates)]
            values = self.narrower(width, first)
            done += self.add(i, gates, after, values)
            x = self.now(first.carries[0].x)
            widths.append(replace(width, x=x.name, values=tuple(v.name for v in values)))
        return tuple(done), tuple(widths)

    def after(self, gate: Gate) -> list[fx.Node]:
        """What the region computes after its input."""
        x, y = (self.names[n] for n in (gate.carries[0].x, gate.carries[0].y))
        return [n for n in exclusive(self.nodes, self.position, [y], {x}) if self.position[n] > self.position[x]]

    def narrower(self, width: Width, gate: Gate) -> list[fx.Node]:
        """Writes the region at every width below the full one; the values at all widths."""
        x, y = self.now(gate.carries[0].x), self.names[gate.carries[0].y]
        self.keep(x)
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
        self.keep(*(a for a in sorted(shared, key=lambda n: self.position.get(n, -1)) if a.op != "get_attr"))

    def add(self, i: int, gates: Sequence[Gate], after: list[fx.Node], values: list[fx.Node]) -> list[Gate]:
        """A region's gate, or all of its gates where it has widths; `values` are then those at each width."""
        carry = gates[0].carries[0]
        x, y = self.now(carry.x), self.names[carry.y]
        self.at = after[0].prev
        decisions = []
        for k, gate in enumerate(gates):
            score = self.score(i + k, gate, x)
            decisions.append((score, self.decision(i + k, gate, score)))
        before = values[0] if len(gates) < len(values) else x
        self.at = values[-2] if values else y  # the full width is where it was, the narrower ones follow it
        done: list[Gate] = []
        for gate, value, (score, decision) in zip(gates, values[-len(gates) :] or [y], decisions, strict=True):
            node = self.choose(f"{gate.name}_value", decision, [before, value], carry.batch_axis)
            made = (Carry(value.name, before.name, node.name, carry.batch_axis),)
            needs = gate.needs or self.before(i)
            done.append(replace(gate, node=node.name, score=score.name, decision=decision.name, needs=needs, carries=made))
            before = node
        # Compaction hands x or y on as they are: nothing may overwrite either.
        self.keep(x, y)
        self.replace(y, before)
        reason = f"inside {gates[0].region}, which a gate may skip"
        self.spans.append(Span(self.position[after[0]], self.position[y], reason))
        return done

    def score(self, i: int, gate: Gate, x: fx.Node) -> fx.Node:
        name = gate.unit.rsplit(".", 1)[1]
        unit = self.gm.get_submodule(gate.unit)
        common, recurrent = getattr(unit, "common", False), getattr(unit, "recurrent", False)
        if gate.unit not in self.units:
            rows = facts.value(x).shape[gate.carries[0].batch_axis]
            count = len(self.program.choices.gates)
            val = self.empty(x, (rows, count) if common else (rows,))
            if recurrent:
                assert isinstance(unit, RecurrentGate)
                width = unit.shared.cell.hidden_size
                val = (val, self.empty(x, (rows, width)), self.empty(x, (rows, width)))
            called = f"{name}_scores" if common or recurrent else f"{gate.name}_score"
            call = self.units[gate.unit] = self.module(called, gate.unit, (x, self._mask(gate), *self.state), val)
            if recurrent:
                parts = [self.item(f"{gate.name}_{n}", call, k) for k, n in enumerate(("score", "h", "c"))]
                self.state = tuple(parts[1:])
                return parts[0]
        call = self.units[gate.unit]
        return self.call(f"{gate.name}_score", torch.ops.aten.select.int, call, 1, i) if common else call

    def _mask(self, gate: Gate) -> fx.Node | None:
        name = mask_of(self.program, gate.region, self.recipe.mask)
        return self.names[name] if name is not None else None

    def before(self, i: int) -> str:
        """Name of the gate that closes gate i with itself, where gates close all later ones."""
        return self.program.choices.gates[i - 1].name if self.recipe.monotone and i else ""

    def decision(self, i: int, gate: Gate, score: fx.Node) -> fx.Node:
        counted = bool(self.recipe.min_open) and gate.kind != "width"
        args: tuple[Any, ...] = (score, self.thresholds, self.offset + i)
        if counted:
            later = sum(g.kind != "width" for g in self.program.choices.gates[i + 1 :])
            args = (*args, self.opened, max(0, self.recipe.min_open - later))
        node = self.call(f"{gate.name}_open", torch.ops.eecompile.gate.default, *args)
        before = self.decided.get(gate.needs or self.before(i))
        if before is not None:
            node = self.call(f"{gate.name}_still_open", torch.ops.aten.mul.Tensor, node, before)
        self.decided[gate.name] = node
        if counted:
            self.opened = (
                node
                if self.opened is None
                else self.call(f"{gate.name}_count", torch.ops.aten.add.Tensor, self.opened, node)
            )
        return node


def relocate_gates(program: Program, gates: tuple[Gate, ...], widths: tuple[Width, ...] = ()) -> Program:
    """The same gates in another capture of the same model, found by the anchors of their regions.

    Raises:
        PassError: A region of the first capture has no counterpart.
    """
    there = Counterparts(program.graph_module, "a gate")
    inputs = {g: w.x for w in widths for g in w.gates}
    moved, regions = [], []
    for g in gates:
        c = g.carries[0]
        x = there.name(g.anchors[0], inputs.get(g.name, c.x), g.region)
        y = there.name(g.anchors[1], c.y, g.region)
        moved.append(replace(g, score="", decision="", carries=(Carry(y, x, "", c.batch_axis),)))
        regions.append(Region(g.region, g.kind, "", x, y, c.batch_axis, g.flops, g.depth, True, g.anchors))
    return program.establish("gates placed").replace(
        gates=(*program.choices.gates, *moved),
        widths=widths or program.choices.widths,
        regions=(*program.structure.regions, *regions),
    )
