"""Writes adaptive computation time into the graph (Graves 2016): a score, a `halt` and a choice after each step.

    score_k                       = unit_k(y_k) * scale                  [B] or [B, S]
    weighted, ledger, running     = halt(score_k, y_k, weighted, ledger)
    y_k, weighted, ledger, running = choose(running before, [old, new])      each, but for the first step
    output                        = weighted                             what the model reads after the chain

Where scores are probabilities of stopping (rule "stop", PonderNet), what is added up is the probability of having stopped,
and the output is the state that the row stopped at:

    score_k                       = unit_k(y_k) * (scale - accumulated)  = scale * p_k, the ledger adds up scale * P(n <= k)
    output                        = y_K                                  kept since the row stopped

A row that has halted keeps all four as they are, so lowering may leave the whole step out for it. With `scale` 0 no score
counts and the last step gets weight 1: the model as it was. A block that is repeated is written out `repeat` times with
the same parameters; its scale is then large, and the first step gets weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.ir import settings
from eecompile.ir.graph import Counterparts
from eecompile.ir.recipes import HaltRecipe
from eecompile.ir.records import Carry, HaltingChain, HaltStep
from eecompile.ir.writer import GraphWriter, Span, add_modules
from eecompile.kernels.halt import ACCUMULATED
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.find_regions import exclusive
from eecompile.passes.place_gates import GATES, mask_of, new_units
from eecompile.passes.place_halting import starting_bias
from eecompile.program import Program, Region, Report
from eecompile.untrained import seeded

ROLE = "eecompile_halting"  # key in a node's meta: "score", "state" (after a step) or "output", and the step
AT_ONCE = 2.0**100  # a scale with which any score halts
aten = torch.ops.aten
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertHalting(Pass):
    """Inserts those halting chains that are not in the graph yet: in a cascade the chains of each model in turn.

    Args:
        recipe: What the strategy asked for.
        units: Modules to use instead of new ones, by the name after `eecompile_gates.`.
        seed: Seed of the new units' weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_halting"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "halting placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"halting"})

    recipe: HaltRecipe
    units: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        there = tuple(h for h in program.choices.chains if h.output)
        program = program.replace(chains=program.choices.chains[len(there) :])
        units = dict(self.units) or self.build(program)
        gm = facts.copy(program.graph_module)
        add_modules(gm, GATES, units)
        # The scale with which the marked graph is the model as it was.
        closed = AT_ONCE if any(h.repeated for h in program.choices.chains) else 0.0
        program = program.replace(settings=program.settings.add(settings.halting(closed), [self.recipe.threshold]))
        program.settings.attach(gm, facts.device_of(gm))
        writer = _Writer(gm, program, self.recipe)
        halts = tuple(replace(writer.add(h), group=len(program.choices.halt_recipes)) for h in program.choices.chains)
        writer.finish()
        cuts, refusals = writer.moved_cuts(program.structure.cuts, self.name)
        reports = tuple(Report(h.name, h.ledger, h.output) for h in halts)
        shares = {s.name: writer.shares.get(s.name, s.decision) for h in halts for s in h.steps}
        reports += tuple(Report(s.name, shares[s.name], s.carries[0].node) for h in halts for s in h.steps if s.carries)
        done = program.replace(
            graph_module=gm,
            chains=(*there, *halts),
            cuts=cuts,
            reports=(*program.choices.reports, *reports),
            halt_recipes=(*program.choices.halt_recipes, self.recipe),
        )
        return PassResult(done, True, refusals, f"{sum(len(h.steps) for h in halts)} steps")

    def build(self, program: Program) -> dict[str, nn.Module]:
        """New units, in the dtype and on the device of the model."""
        chains = [(h, starting_bias(self.recipe, len(h.steps))) for h in program.choices.chains]
        with seeded(self.seed):
            return new_units(program, self.recipe, [(s.unit, s.region, bias) for h, bias in chains for s in h.steps])


class _Writer(GraphWriter):
    """Writes chains in graph order."""

    def __init__(self, gm: fx.GraphModule, program: Program, recipe: HaltRecipe) -> None:
        super().__init__(gm)
        self.program, self.recipe = program, recipe
        self.stops = recipe.rule == "stop"
        self.shares: dict[str, str] = {}  # where positions halt one by one: node [B] with the share of live ones, by step
        self.scale = self.setting(settings.HALTING_BUFFER, "halt_scale")

    def add(self, halt: HaltingChain) -> HaltingChain:
        x, ys = self.now(halt.x), [self.names[y] for y in halt.ys]
        self.keep(x, *ys)
        inside = exclusive(self.nodes, self.position, [ys[0]], {x})
        chain, between = _Chain(halt), dict[str, str]()
        for k in range(len(halt.steps)):
            if halt.repeated:
                y = self.again(inside, x, chain.value, ys[0]) if chain.value is not None else ys[0]
            else:
                y = ys[k]
            if y in self.position:
                self.at = y
            self.step(chain, k, y)
            if not halt.repeated and not chain.done(k):
                assert chain.value is not None
                self.replace(y, chain.value)
                between[y.name] = chain.steps[-1].last
        kept = chain.value if self.stops else chain.weighted
        assert kept is not None and chain.ledger is not None
        output = self.call(f"{halt.name}_output", aten.to.dtype, kept, facts.value(ys[0]).dtype)
        output.meta[ROLE] = ("output", 0)
        self.replace(ys[-1], output)
        reason = f"inside {halt.name}, where rows stop one by one"
        self.spans.append(Span(self.position[ys[0]], self.position[ys[-1]], reason, between))
        return replace(halt, steps=tuple(chain.steps), ys=tuple(chain.ys), output=output.name, ledger=chain.ledger.name)

    def step(self, chain: _Chain, k: int, y: fx.Node) -> None:
        """Score, `halt` and, after the first step, the choices of step k."""
        step, before = chain.halt.steps[k], (chain.value, chain.weighted, chain.ledger, chain.running)
        decision, live = chain.decision, ""
        unit = self.unit(step, y)
        unit.meta[ROLE] = ("score", k)
        score = self.call(f"{step.name}_score", aten.mul.Tensor, unit, self.left(step, chain))
        if chain.halt.per_token and chain.running is not None:
            live = chain.running.name
            wide = self.call(f"{step.name}_tokens", aten.unsqueeze.default, chain.running, -1)
            y = self.call(f"{step.name}_kept", aten.where.self, wide, y, chain.value)
        # Rule "stop" has no mean of the states: the scores stand in for them, and their mean is not read.
        state = score if self.stops else y
        args = (score, state, chain.weighted, chain.ledger, self.recipe.epsilon, chain.done(k))
        halted = self.call(f"{step.name}_halt", torch.ops.eecompile.halt.default, *args)
        parts = [self.item(f"{step.name}_{n}", halted, i) for i, n in enumerate(PARTS[1:])]
        after = [y, *parts]
        carries: list[Carry] = []
        for i, (name, new, old) in enumerate(zip(PARTS, list(after), before, strict=True)):
            unread = ("running",) if self.stops else ("value", "running")
            if old is None or decision is None or (chain.done(k) and name in unread):
                continue
            kept = self.choose(f"{step.name}_{name}_kept", decision, [old, new], 0)
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
        mask = mask_of(self.program, step.region, self.recipe.mask)
        sizes = facts.value(y).shape[: 2 if self.recipe.unit == "token" else 1]
        args = (y, self.names[mask] if mask is not None else None)
        return self.module(f"{step.name}_unit", step.unit, args, self.empty(y, sizes))

    def again(self, inside: list[fx.Node], x: fx.Node, value: fx.Node, y: fx.Node) -> fx.Node:
        """The block once more, on what the rows have now."""
        env = {x: value}
        for n in inside:
            with self.graph.inserting_after(self.at):
                env[n] = self.graph.node_copy(n, lambda a: env.get(a, a))
            env[n].meta.pop(ROLE, None)
            self.written.add(env[n])
            self.at = env[n]
        return env[y]


PARTS = ("value", "weighted", "ledger", "running")


class _Chain:
    """What the rows have after the last step that was written."""

    def __init__(self, halt: HaltingChain) -> None:
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


def relocate_halting(program: Program, halts: tuple[HaltingChain, ...]) -> Program:
    """The same chains in another capture of the same model, found by the anchors of their blocks.

    Raises:
        PassError: A block of the first capture has no counterpart.
    """
    there = Counterparts(program.graph_module, "a halting step")
    moved, regions = [], []
    for h in halts:
        steps = h.steps[:1] if h.repeated else h.steps
        ends = []
        for step, old in zip(steps, h.ys, strict=False):
            x, y = (there.name(a, n, step.region) for a, n in zip(step.anchors, (h.x, old), strict=True))
            ends.append((x, y))
            regions.append(Region(step.region, "block", step.region, x, y, 0, step.flops, h.depth, True, step.anchors))
        bare = tuple(replace(s, decision="", carries=(), value="", last="", live="") for s in h.steps)
        moved.append(replace(h, steps=bare, x=ends[0][0], ys=tuple(y for _, y in ends), output="", ledger=""))
    return program.establish("halting placed", "regions").replace(
        chains=(*program.choices.chains, *moved), regions=(*program.structure.regions, *regions)
    )
