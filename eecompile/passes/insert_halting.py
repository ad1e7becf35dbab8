"""Writes adaptive computation time into the graph (Graves 2016): a score, a `halt` and a choice behind each step.

    score_k                       = unit_k(y_k) * scale                  [B] or [B, S]
    weighted, ledger, running     = halt(score_k, y_k, weighted, ledger)
    y_k, weighted, ledger, running = choose(running before, [old, new])      each, but for the first step
    output                        = weighted                             what the model reads behind the chain

Where scores are probabilities of stopping (rule "stop", PonderNet), what is added up is the probability of having stopped,
and the output is the state that the row stopped at:

    score_k                       = unit_k(y_k) * (scale - accumulated)  = scale * p_k, the ledger adds up scale * P(n <= k)
    output                        = y_K                                  kept since the row stopped

A row that has halted keeps all four as they are, so lowering may leave the whole step out for it. With `scale` 0 no score
counts and the last step gets weight 1: the model as it was. A block that is repeated is written out `repeat` times with
the same parameters; its scale is then large, and the first step gets weight 1.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError
from eecompile.gates import unit_class
from eecompile.ir import settings
from eecompile.kernels.halt import ACCUMULATED
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.find_regions import exclusive
from eecompile.passes.functional import make_functional
from eecompile.passes.insert_gates import add_units
from eecompile.passes.place_gates import make_unit, site_of
from eecompile.passes.place_halting import starting_bias
from eecompile.program import Carry, Cut, Halt, HaltStep, Program, Refusal, Region, Report
from eecompile.strategies.base import HaltRecipe
from eecompile.untrained import mark_untrained

ROLE = "eecompile_halting"  # key in a node's meta: "score", "state" (behind a step) or "output", and the step
AT_ONCE = 2.0**100  # a scale with which any score halts
aten = torch.ops.aten
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertHalting(Pass):
    """Inserts those of `program.halts` into the graph that are not in it yet: in a cascade the chains of each model in turn.

    Args:
        recipe: What the strategy asked for.
        units: Modules to use instead of new ones, by the name behind `eecompile_gates.`.
        seed: Seed of the new units' weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_halting"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "halting placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"halting"})

    recipe: HaltRecipe
    units: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        there = tuple(h for h in program.halts if h.output)
        program = program.replace(halts=program.halts[len(there) :])
        units = dict(self.units) or self.build(program)
        gm = facts.copy(program.graph_module)
        add_units(gm, units)
        # The scale with which the marked graph is the model as it was.
        closed = AT_ONCE if any(h.repeated for h in program.halts) else 0.0
        program = program.replace(settings=program.settings.add(settings.halting(closed), [self.recipe.threshold]))
        program.settings.attach(gm, facts.device_of(gm))
        writer = _Writer(gm, program, self.recipe)
        halts = tuple(replace(writer.add(h), group=len(program.halt_recipes)) for h in program.halts)
        gm.graph.lint()  # not tidied: nothing reads the ledgers yet
        gm.recompile()
        swap = swapped(program.halts, halts)
        cuts, refusals = moved_cuts(program, writer.spans, swap, halts)
        reports = tuple(Report(h.name, h.ledger, h.output) for h in halts)
        told = {s.name: writer.shares.get(s.name, s.decision) for h in halts for s in h.steps}
        reports += tuple(Report(s.name, told[s.name], s.carries[0].node) for h in halts for s in h.steps if s.carries)
        done = program.replace(
            graph_module=gm,
            halts=(*there, *halts),
            cuts=cuts,
            reports=(*program.reports, *reports),
            halt_recipes=(*program.halt_recipes, self.recipe),
        )
        return PassResult(done, True, tuple(refusals), f"{sum(len(h.steps) for h in halts)} steps")

    def build(self, program: Program) -> dict[str, nn.Module]:
        """New units, in the dtype and on the device of the model."""
        regions = {r.name: r for r in program.regions}
        device = facts.device_of(program.graph_module)
        units: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for h in program.halts:
                for step in h.steps:
                    name = step.unit.rsplit(".", 1)[1]
                    if name in units:
                        continue
                    site, _ = site_of(program, regions[step.region], self.recipe.mask)
                    kind = unit_class(self.recipe.unit, site, step.region)
                    unit = make_unit(kind, site, starting_bias(self.recipe, len(h.steps)), 1, None)
                    units[name] = unit.to(device=device, dtype=getattr(torch, site.dtype))
                    mark_untrained(unit)
        return units


class _Writer:
    """Writes chains in graph order; new nodes go behind `at`."""

    def __init__(self, gm: fx.GraphModule, program: Program, recipe: HaltRecipe) -> None:
        self.gm, self.program, self.recipe, self.graph = gm, program, recipe, gm.graph
        self.names = facts.by_name(gm)
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.spans: list[tuple[int, int, Halt]] = []
        self.written: set[fx.Node] = set()
        self.stops = recipe.rule == "stop"
        self.shares: dict[str, str] = {}  # where positions halt one by one: node [B] with the share of live ones, by step
        self.replaced: dict[str, fx.Node] = {}  # the last block's value of a chain, and what stands for it
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            self.scale = self.graph.get_attr(settings.HALTING_BUFFER)
            self.scale._rename("halt_scale")
        self.at = self.scale

    def add(self, halt: Halt) -> Halt:
        x, ys = self.replaced.get(halt.x, self.names[halt.x]), [self.names[y] for y in halt.ys]
        self.mode = facts.value(ys[0]).fake_mode
        with self.mode:
            self.scale.meta["val"] = torch.empty(1)
        for read in (x, *ys):
            make_functional(read, self.position)
        inside = exclusive(self.nodes, self.position, [ys[0]], {x})
        chain = _Chain(halt)
        for k in range(len(halt.steps)):
            if halt.repeated:
                y = self.again(inside, x, chain.value, ys[0]) if chain.value is not None else ys[0]
            else:
                y = ys[k]
            if y in self.position:
                self.at = y
            self.step(chain, k, y)
            if not halt.repeated and not chain.done(k):
                self.replace(y, chain.value)
        kept = chain.value if self.stops else chain.weighted
        assert kept is not None and chain.ledger is not None
        output = self.call(f"{halt.name}_output", aten.to.dtype, kept, facts.value(ys[0]).dtype)
        output.meta[ROLE] = ("output", 0)
        self.replace(ys[-1], output)
        make_functional(output, self.position)
        self.replaced[ys[-1].name] = output
        self.spans.append((self.position[ys[0]], self.position[ys[-1]], halt))
        return replace(halt, steps=tuple(chain.steps), ys=tuple(chain.ys), output=output.name, ledger=chain.ledger.name)

    def replace(self, y: fx.Node, value: fx.Node | None) -> None:
        """What the model reads of a step is from now on what its rows keep."""
        if value is None or value is y:
            return
        y.replace_all_uses_with(value, delete_user_cb=lambda u: u not in self.written)
        make_functional(value, self.position)

    def step(self, chain: _Chain, k: int, y: fx.Node) -> None:
        """Score, `halt` and, behind the first step, the choices of step k."""
        step, before = chain.halt.steps[k], (chain.value, chain.weighted, chain.ledger, chain.running)
        decision, live = chain.decision, ""
        unit = self.unit(step, y)
        unit.meta[ROLE] = ("score", k)
        score = self.call(f"{step.name}_score", aten.mul.Tensor, unit, self.left(step, chain))
        if chain.halt.per_token and chain.running is not None:
            live = chain.running.name
            wide = self.call(f"{step.name}_tokens", aten.unsqueeze.default, chain.running, -1)
            y = self.call(f"{step.name}_kept", aten.where.self, wide, y, chain.value)
        # Where nobody reads a mean of the states there is none: the scores stand in, and their mean goes nowhere.
        state = score if self.stops else y
        args = (score, state, chain.weighted, chain.ledger, self.recipe.epsilon, chain.done(k))
        halted = self.call(f"{step.name}_halt", torch.ops.eecompile.halt.default, *args)
        parts = [self.call(f"{step.name}_{n}", operator.getitem, halted, i) for i, n in enumerate(PARTS[1:])]
        after = [y, *parts]
        carries: list[Carry] = []
        for i, (name, new, old) in enumerate(zip(PARTS, list(after), before, strict=True)):
            unread = ("running",) if self.stops else ("value", "running")
            if old is None or decision is None or (chain.done(k) and name in unread):
                continue
            kept = self.call(f"{step.name}_{name}_kept", torch.ops.eecompile.choose.default, decision, [old, new], 0)
            carries.append(Carry(new.name, old.name, kept.name, 0))
            after[i] = kept
        chain.ys.append(y.name)
        chain.value, weighted, chain.ledger, chain.running = after
        chain.weighted = None if self.stops else weighted
        after[0].meta[ROLE] = ("state", k)
        if not chain.done(k):
            running = after[3]
            if chain.halt.per_token:
                ones = self.call(f"{step.name}_live", aten.to.dtype, running, torch.float32)
                share = self.call(f"{step.name}_live_share", aten.mean.dim, ones, [1])
                self.shares[chain.halt.steps[k + 1].name] = share.name
                running = self.call(f"{step.name}_row_runs", aten.any.dim, running, 1)
            chain.decision = running
        name = "" if decision is None else decision.name
        step = replace(step, decision=name, carries=tuple(carries), value=after[0].name, last=self.at.name, live=live)
        chain.steps.append(step)

    def left(self, step: HaltStep, chain: _Chain) -> fx.Node:
        """What a score is multiplied with: the scale, or with rule "stop" what it leaves to be given out."""
        if not self.stops or chain.ledger is None:
            return self.scale
        spent = self.call(f"{step.name}_spent", aten.select.int, chain.ledger, -1, ACCUMULATED)
        return self.call(f"{step.name}_left", aten.sub.Tensor, self.scale, spent)

    def unit(self, step: HaltStep, y: fx.Node) -> fx.Node:
        region = next((r for r in self.program.regions if r.name == step.region), None)
        if region is None:
            raise PassError("a step's block is not in this graph", where=step.region)
        _, mask = site_of(self.program, region, self.recipe.mask)
        with self.graph.inserting_after(self.at):
            node = self.graph.call_module(step.unit, (y, self.names[mask] if mask is not None else None))
        node._rename(f"{step.name}_unit")
        v = facts.value(y)
        with self.mode:
            node.meta["val"] = v.new_empty(v.shape[: 2 if self.recipe.unit == "token" else 1])
        return self.note(node)

    def again(self, inside: list[fx.Node], x: fx.Node, value: fx.Node, y: fx.Node) -> fx.Node:
        """The block once more, on what the rows have now."""
        env = {x: value}
        for n in inside:
            with self.graph.inserting_after(self.at):
                env[n] = self.graph.node_copy(n, lambda a: env.get(a, a))
            env[n].meta.pop(ROLE, None)
            self.note(env[n])
        return env[y]

    def call(self, name: str, target: Any, *args: Any) -> fx.Node:
        """A node with the value that the operator gives on fake tensors."""
        with self.graph.inserting_after(self.at):
            node = self.graph.call_function(target, args)
        node._rename(name)
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        return self.note(node)

    def note(self, node: fx.Node) -> fx.Node:
        self.written.add(node)
        self.at = node
        return node


PARTS = ("value", "weighted", "ledger", "running")


class _Chain:
    """What the rows have behind the last step that was written."""

    def __init__(self, halt: Halt) -> None:
        self.halt = halt
        self.steps: list[HaltStep] = []
        self.ys: list[str] = []
        self.value: fx.Node | None = None
        self.weighted: fx.Node | None = None
        self.ledger: fx.Node | None = None
        self.running: fx.Node | None = None
        self.decision: fx.Node | None = None

    def done(self, k: int) -> bool:
        return k == len(self.halt.steps) - 1


def swapped(before: tuple[Halt, ...], halts: tuple[Halt, ...]) -> dict[str, str]:
    """What the rows have behind each block of a chain, by the name of the block's own value: the weighted state behind the
    last one."""
    found: dict[str, str] = {}
    for old, new in zip(before, halts, strict=True):
        if not new.repeated:
            found |= {y: s.value for y, s in zip(old.ys[:-1], new.steps, strict=False)}
        found[old.ys[-1]] = new.output
    return found


def moved_cuts(
    program: Program, spans: list[tuple[int, int, Halt]], swap: Mapping[str, str], halts: tuple[Halt, ...]
) -> tuple[tuple[Cut, ...], list[Refusal]]:
    """The cuts with each chain's output in place of its last block's value. A cut between two steps lies behind the first
    one's score, and what has halted there goes along with the rows; cuts inside a step are refused."""
    position = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    ends = {s.value: s.last for h in halts for s in h.steps[:-1]}
    kept, refusals = [], []
    for cut in program.cuts:
        at = position[cut.after]
        inside_of = next((h for start, end, h in spans if start <= at < end), None)
        between = swap.get(cut.value) if inside_of is not None and not inside_of.repeated else None
        if inside_of is not None and between is None:
            refusals.append(Refusal(cut.name, "insert_halting", f"inside {inside_of.name}, where rows stop one by one"))
            continue
        live = tuple(replace(v, node=swap.get(v.node, v.node)) for v in cut.live)
        after = swap.get(cut.after, cut.after)
        if between is not None and at <= position[cut.value]:
            after = ends[between]
        kept.append(replace(cut, after=after, value=swap.get(cut.value, cut.value), live=live))
    return tuple(kept), refusals


def relocate_halting(program: Program, halts: tuple[Halt, ...]) -> Program:
    """The same chains in another capture of the same model, found by the anchors of their blocks.

    Raises:
        PassError: A block of the first capture has no counterpart.
    """
    nodes = list(program.graph_module.graph.nodes)
    names = facts.by_name(program.graph_module)
    found = {a: n for n, a in facts.anchors(nodes).items()}
    moved, regions = [], []
    for h in halts:
        steps = h.steps[:1] if h.repeated else h.steps
        ends = []
        for step, old in zip(steps, h.ys, strict=False):
            ax, ay = step.anchors
            x = found.get(ax) if ax is not None else names.get(h.x)
            y = found.get(ay) if ay is not None else names.get(old)
            if x is None or y is None:
                raise PassError("a step's block is not in the other capture", where=step.region)
            ends.append((x.name, y.name))
            regions.append(
                Region(step.region, "block", step.region, x.name, y.name, 0, step.flops, h.depth, True, step.anchors)
            )
        bare = tuple(replace(s, decision="", carries=(), value="", last="", live="", parts=()) for s in h.steps)
        moved.append(replace(h, steps=bare, x=ends[0][0], ys=tuple(y for _, y in ends), output="", ledger=""))
    return program.replace(
        halts=(*program.halts, *moved),
        regions=(*program.regions, *regions),
        facts=program.facts | {"halting placed", "regions"},
    )
