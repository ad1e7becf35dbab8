"""Writes a router into the graph.

To branches:

    weights  = unit(reads, mask)                        [B, K] float32, the model's own way last
    admitted = weights - margins                        a margin above 1 closes a route
    choice   = the largest of admitted                  [B] int64
    value    = choose(admitted, [branch_0(x), ..., y])   rows of each branch

To exits:

    weights    = unit(reads, mask)                      [B, E + 1]
    confidence = cumulative sums without the last       [B, E], the probability that the row needs at most exit k

Run as it stands the graph computes every branch and every head, and chooses: the reference meaning of a route. Lowering
groups the rows by route and runs each branch, or head, on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError
from eecompile.ir import settings
from eecompile.ir.graph import Counterparts
from eecompile.ir.recipes import RouteRecipe
from eecompile.ir.records import Route, Way
from eecompile.ir.writer import GraphWriter, Span, add_modules
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.branches import Part
from eecompile.passes.place_routes import ROUTE, ROUTES, Places
from eecompile.program import Program, Refusal, Report
from eecompile.routers import unit_class
from eecompile.untrained import seeded, untrained

STACK = ((ROUTES, 0, "Router"),)  # a module of their own, so that the model's own calls are counted as before
aten = torch.ops.aten
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertRoutes(Pass):
    """Inserts `program.choices.route` into the graph.

    Args:
        recipe: What the strategy asked for.
        modules: The unit and branches to use instead of new ones, by the name after `eecompile_routes.`: for the training
            capture, or a loaded program.
        seed: Seed of the new unit's weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_routes"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "routes placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"routed"})

    recipe: RouteRecipe
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        route = program.choices.route
        assert route is not None  # placed
        gm = facts.copy(program.graph_module)
        modules = self.build(program, route)
        add_modules(gm, ROUTES, modules)
        writer = _Writer(gm, program)
        route = writer.weights(route, len(program.exits) + 1 if route.to_exits else len(route.ways))
        refusals: tuple[Refusal, ...] = ()
        if route.to_exits:
            route = writer.confidence(route, len(program.exits))
            # an exit at the value that the router reads comes after the router
            after = {route.reads: route.choice}
            exits = tuple(replace(e, routed=route.choice, after=after.get(e.after, e.after)) for e in program.exits)
            cuts = tuple(replace(c, after=after.get(c.after, c.after)) for c in program.structure.cuts)
            program = program.replace(exits=exits, cuts=cuts)
        else:
            names = [w.name for w in route.ways]
            program = program.replace(settings=program.settings.add(settings.branches(names), [0.0] * len(names)))
            program.settings.attach(gm, facts.device_of(gm))
            route = writer.branches(route)
            cuts, refusals = writer.moved_cuts(program.structure.cuts, self.name)
            program = program.replace(cuts=cuts)
        writer.finish()
        owner = route.node or route.choice
        reports: tuple[Report, ...] = (
            Report(ROUTE, route.choice, owner),
            Report(f"{ROUTE}.weights", route.weights, owner, True),
        )
        if route.admitted:
            reports += (Report(f"{ROUTE}.admitted", route.admitted, owner, True),)
        done = program.replace(
            graph_module=gm, route=route, reports=(*program.choices.reports, *reports), route_recipe=self.recipe
        )
        ways = len(route.ways) or len(program.exits) + 1
        return PassResult(done, True, refusals, f"{ways} routes")

    def build(self, program: Program, route: Route) -> dict[str, nn.Module]:
        """The unit and the branches: light versions, and copies of the user's modules. New, where they are not given."""
        found, device = dict(self.modules), facts.device_of(program.graph_module)
        if "unit" not in found:
            names = facts.by_name(program.graph_module)
            site, _ = Places(program, None).site(names[route.reads], self.recipe.mask, route.at)
            with seeded(self.seed):
                count = len(route.ways) or len(program.exits) + 1
                unit = unit_class(self.recipe.unit, site, route.at)(site, count, self.recipe.bias)
            found["unit"] = untrained(unit, device, site.dtype)
        for way, (_, what) in zip(route.ways, self.recipe.branches, strict=False):
            name = way.module.rpartition(".")[2]
            if name not in found:
                own = isinstance(what, nn.Module)
                found[name] = copy.deepcopy(what).to(device) if own else light_of(program, route, way)
        return found


def light_of(program: Program, route: Route, way: Way) -> fx.GraphModule:
    """A light version, made from the graph and the names of what it leaves out.

    Raises:
        PassError: A block that was left out is not found again.
    """
    part = Part(program, facts.copy(program.graph_module), route.x, route.y, route.region)
    blocks = {r.name: r for r in part.blocks()}
    missing = [name for name in way.left_out if name not in blocks]
    if missing:
        raise PassError("a block that a light version leaves out is not in this graph", where=way.name, got=missing)
    light = part.light(tuple(blocks[name] for name in way.left_out))
    if light.sides != way.sides:
        raise PassError("a light version reads other values than before", where=way.name, got=light.sides, wanted=way.sides)
    return light.module


class _Writer(GraphWriter):
    """Writes a router and its branches."""

    def __init__(self, gm: fx.GraphModule, program: Program) -> None:
        super().__init__(gm, STACK)
        self.program = program

    def weights(self, route: Route, count: int) -> Route:
        reads = self.names[route.reads]
        mask = None if route.mask is None else self.names[route.mask]
        self.keep(reads)
        # Directly after what it reads; an input's router comes first of all.
        self.at = reads if reads.op != "placeholder" else self.last_input
        axis = facts.Batch(self.gm, self.program.signature).axis(reads)
        assert isinstance(axis, int)
        val = self.empty(reads, (facts.value(reads).shape[axis], count), torch.float32)
        return replace(route, weights=self.module("route_weights", route.unit, (reads, mask), val).name)

    def confidence(self, route: Route, exits: int) -> Route:
        sums = self.call("route_sums", aten.cumsum.default, self.at, 1)
        # the last is 1, the model's own end; sums of rounded numbers may come out above it
        within = self.call("route_bounded", aten.clamp.default, sums, 0.0, 1.0)
        node = self.call("route_confidence", aten.slice.Tensor, within, 1, 0, exits)
        return replace(route, choice=node.name)

    def branches(self, route: Route) -> Route:
        weights, x, y = self.at, self.names[route.x], self.names[route.y]
        part = Part(self.program, self.gm, route.x, route.y, route.region)
        reason = f"between {route.region}, where rows take other routes"
        self.spans.append(Span(part.first, self.position[y], reason))
        self.keep(x, y)
        margins = self.setting(settings.BRANCHES_BUFFER, "route_margins")
        self.at = weights
        admitted = self.call("route_admitted", aten.sub.Tensor, weights, margins)
        largest = self.call("route_largest", aten.max.dim, admitted, 1)
        choice = self.item("route_choice", largest, 1)
        self.at = y
        values = []
        for way in route.ways[:-1]:
            args, val = (x, *(self.names[s] for s in way.sides)), facts.value(y)
            if way.custom:
                values.append(self.module(f"route_{way.name}", way.module, args, val))
                continue
            call = self.module(f"route_{way.name}_version", way.module, args, (val,))
            values.append(self.item(f"route_{way.name}", call, 0))
        values.append(y)
        node = self.choose("route_value", admitted, values, route.batch_axis)
        self.replace(y, node)
        ways = tuple(replace(w, value=v.name) for w, v in zip(route.ways, values, strict=True))
        return replace(route, admitted=admitted.name, choice=choice.name, node=node.name, ways=ways)


def relocate_route(program: Program, route: Route) -> Program:
    """The same router in another capture of the same model, found by anchors.

    Raises:
        PassError: A value of the first capture has no counterpart.
    """
    there = Counterparts(program.graph_module, "a router")
    old = (route.reads, route.x, route.y) if route.ways else (route.reads,)
    reads, *ends = (there.name(a, n, route.at) for a, n in zip(route.anchors, old, strict=True))
    ways = tuple(
        replace(w, sides=tuple(there.name(a, s, w.name) for a, s in zip(w.side_anchors, w.sides, strict=True)))
        for w in route.ways
    )
    x, y = ends or ("", "")
    return program.establish("routes placed").replace(route=replace(route, reads=reads, x=x, y=y, ways=ways))
