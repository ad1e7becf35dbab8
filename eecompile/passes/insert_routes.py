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
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import PassError
from eecompile.ir import settings
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.branches import Part
from eecompile.passes.functional import make_functional
from eecompile.passes.place_routes import ROUTE, ROUTES, Places
from eecompile.program import Cut, Program, Refusal, Report, Route, Way
from eecompile.routers import unit_class
from eecompile.strategies.router import RouteRecipe
from eecompile.untrained import mark_untrained

STACK = ((ROUTES, 0, "Router"),)  # a module of their own, so that the model's own calls are counted as before
aten = torch.ops.aten
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertRoutes(Pass):
    """Inserts `program.routes` into the graph.

    Args:
        recipe: What the strategy asked for.
        modules: The unit and the branches to use instead of new ones, by the name behind `eecompile_routes.`: for the
            training capture, or a loaded program.
        seed: Seed of the new unit's weights; the global generator is left as it was.
    """

    name: ClassVar[str] = "insert_routes"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "routes placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"routed"})

    recipe: RouteRecipe
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        (route,) = program.routes
        gm = facts.copy(program.graph_module)
        modules = dict(self.modules) or self.build(program, route)
        container = nn.Module()
        for name, module in modules.items():
            container.add_module(name, module)
        gm.add_module(ROUTES, container)
        writer = _Writer(gm, program)
        route = writer.weights(route, len(program.exits) + 1 if route.to_exits else len(route.ways))
        refusals: list[Refusal] = []
        if route.to_exits:
            route = writer.confidence(route, len(program.exits))
            exits = tuple(replace(e, routed=route.choice) for e in program.exits)
            program = program.replace(exits=exits)
        else:
            names = [w.name for w in route.ways]
            program = program.replace(settings=program.settings.add(settings.branches(names), [0.0] * len(names)))
            program.settings.attach(gm, facts.device_of(gm))
            route = writer.branches(route)
            cuts, refusals = moved_cuts(program, route, writer.span)
            program = program.replace(cuts=cuts)
        gm.graph.lint()  # not tidied: nothing reads the confidence of exits yet
        gm.recompile()
        beside = route.node or route.choice
        reports: tuple[Report, ...] = (
            Report(ROUTE, route.choice, beside),
            Report(f"{ROUTE}.weights", route.weights, beside, True),
        )
        if route.admitted:
            reports += (Report(f"{ROUTE}.admitted", route.admitted, beside, True),)
        done = program.replace(
            graph_module=gm, routes=(route,), reports=(*program.reports, *reports), route_recipe=self.recipe
        )
        ways = len(route.ways) or len(program.exits) + 1
        return PassResult(done, True, tuple(refusals), f"{ways} routes")

    def build(self, program: Program, route: Route) -> dict[str, nn.Module]:
        """The unit, new, and the branches: light versions, and copies of the user's modules."""
        names = facts.by_name(program.graph_module)
        device = facts.device_of(program.graph_module)
        site, _ = Places(program, None).site(names[route.reads], self.recipe.mask, route.at)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            count = len(route.ways) or len(program.exits) + 1
            unit = unit_class(self.recipe.unit, site, route.at)(site, count, self.recipe.bias)
        found: dict[str, nn.Module] = {"unit": unit.to(device=device, dtype=getattr(torch, site.dtype))}
        mark_untrained(found["unit"])
        for way, (name, what) in zip(route.ways, self.recipe.branches, strict=False):
            found[name] = copy.deepcopy(what).to(device) if isinstance(what, nn.Module) else light_of(program, route, way)
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


class _Writer:
    """Writes a router and its branches."""

    def __init__(self, gm: fx.GraphModule, program: Program) -> None:
        self.gm, self.program, self.graph = gm, program, gm.graph
        self.names = facts.by_name(gm)
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.span = (0, 0)

    def weights(self, route: Route, count: int) -> Route:
        reads = self.names[route.reads]
        self.mode = facts.value(reads).fake_mode
        mask = None if route.mask is None else self.names[route.mask]
        make_functional(reads, self.position)
        # Directly behind what it reads; an input's router comes first of all.
        self.at = reads if reads.op != "placeholder" else [n for n in self.nodes if n.op == "placeholder"][-1]
        axis = facts.Batch(self.gm, self.program.signature).axis(reads)
        assert isinstance(axis, int)
        with self.graph.inserting_after(self.at):
            node = self.graph.call_module(route.unit, (reads, mask))
        node._rename("route_weights")
        node.meta["stack"] = STACK
        v = facts.value(reads)
        with self.mode:
            node.meta["val"] = v.new_empty((v.shape[axis], count), dtype=torch.float32)
        self.at = node
        return replace(route, weights=node.name)

    def confidence(self, route: Route, exits: int) -> Route:
        sums = self.call("route_sums", aten.cumsum.default, self.at, 1)
        # the last is 1, the model's own end; sums of rounded numbers may come out above it
        within = self.call("route_bounded", aten.clamp.default, sums, 0.0, 1.0)
        node = self.call("route_confidence", aten.slice.Tensor, within, 1, 0, exits)
        return replace(route, choice=node.name)

    def branches(self, route: Route) -> Route:
        weights, x, y = self.at, self.names[route.x], self.names[route.y]
        part = Part(self.program, self.gm, route.x, route.y, route.region)
        self.span = (part.first, self.position[y])
        for read in (x, y):
            make_functional(read, self.position)
        with self.graph.inserting_after(self.at):
            margins = self.graph.get_attr(settings.BRANCHES_BUFFER)
        margins._rename("route_margins")
        with self.mode:
            margins.meta["val"] = torch.empty(len(route.ways))
        self.at = margins
        admitted = self.call("route_admitted", aten.sub.Tensor, weights, margins)
        largest = self.call("route_largest", aten.max.dim, admitted, 1)
        choice = self.call("route_choice", operator.getitem, largest, 1)
        self.at = y
        values = []
        for way in route.ways[:-1]:
            with self.graph.inserting_after(self.at):
                call = self.graph.call_module(way.module, (x, *(self.names[s] for s in way.sides)))
            self.at = call
            if way.custom:
                call._rename(f"route_{way.name}")
                call.meta |= {"val": facts.value(y), "stack": STACK}
                values.append(call)
                continue
            call._rename(f"route_{way.name}_version")
            call.meta |= {"val": (facts.value(y),), "stack": STACK}
            values.append(self.call(f"route_{way.name}", operator.getitem, call, 0))
        args = (admitted, [*values, y], route.batch_axis)
        with self.graph.inserting_after(self.at):
            node = self.graph.call_function(torch.ops.eecompile.choose.default, args)
        node._rename("route_value")
        node.meta = {k: v for k, v in y.meta.items() if k in ("val", "stack")}
        y.replace_all_uses_with(node, delete_user_cb=lambda u: u is not node)
        make_functional(node, self.position)
        ways = tuple(replace(w, value=v.name) for w, v in zip(route.ways, [*values, y], strict=True))
        return replace(route, admitted=admitted.name, choice=choice.name, node=node.name, ways=ways)

    def call(self, name: str, target: Any, *args: Any) -> fx.Node:
        """A node behind the last one, with the value that the operator gives on fake tensors."""
        with self.graph.inserting_after(self.at):
            node = self.graph.call_function(target, args)
        node._rename(name)
        node.meta["stack"] = STACK
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        self.at = node
        return node


def moved_cuts(program: Program, route: Route, span: tuple[int, int]) -> tuple[tuple[Cut, ...], list[Refusal]]:
    """The cuts with the routed value in place of the model's own; cuts among the branches are refused."""
    position = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    swap, (start, end) = {route.y: route.node}, span
    kept, refusals = [], []
    for cut in program.cuts:
        if start <= position[cut.after] < end:
            refusals.append(Refusal(cut.name, "insert_routes", f"between {route.region}, where rows take other routes"))
            continue
        live = tuple(replace(v, node=swap.get(v.node, v.node)) for v in cut.live)
        kept.append(replace(cut, after=swap.get(cut.after, cut.after), value=swap.get(cut.value, cut.value), live=live))
    return tuple(kept), refusals


def relocate_routes(program: Program, routes: tuple[Route, ...]) -> Program:
    """The same router in another capture of the same model, found by anchors.

    Raises:
        PassError: A value of the first capture has no counterpart.
    """
    found = {a: n.name for n, a in facts.anchors(program.graph_module.graph.nodes).items()}
    names = facts.by_name(program.graph_module)

    def there(anchor: Any, name: str) -> str:
        node = found.get(anchor) if anchor is not None else name if name in names else None
        if node is None:
            raise PassError("a value that a router needs is not in the other capture", where=name, got=str(anchor))
        return node

    moved = []
    for r in routes:
        old = (r.reads, r.x, r.y) if r.ways else (r.reads,)
        reads, *ends = (there(a, n) for a, n in zip(r.anchors, old, strict=True))
        ways = tuple(
            replace(w, sides=tuple(there(a, s) for a, s in zip(w.side_anchors, w.sides, strict=True))) for w in r.ways
        )
        x, y = ends or ("", "")
        moved.append(replace(r, reads=reads, x=x, y=y, ways=ways))
    return program.replace(routes=tuple(moved), facts=program.facts | {"routes placed"})
