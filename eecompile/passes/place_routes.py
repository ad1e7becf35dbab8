"""Chooses what a router reads and where branches lie, and refuses routers that cost more than they can save."""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from eecompile.errors import StrategyError, near
from eecompile.heads import Site
from eecompile.ir.recipes import FULL, RouteRecipe
from eecompile.ir.records import Route, Way
from eecompile.passes import facts, sites
from eecompile.passes.annotate import ROWS, counting_sizes, flops_of, module_flops
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.branches import Part
from eecompile.program import Program
from eecompile.routers import unit_class

ROUTES = "eecompile_routes"
ROUTE = "route"
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class PlaceRoutes(Pass):
    """Fills `program.choices.route` from the recipe; the graph stays as it is. After `place_exits` where rows go to exits.

    Args:
        recipe: What the strategy wants.
        example: Flat inputs, for the sizes of dynamic axes.
    """

    name: ClassVar[str] = "place_routes"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "cuts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"routes placed"})

    recipe: RouteRecipe
    example: tuple[torch.Tensor, ...] | None = None

    def run(self, program: Program) -> PassResult:
        places = Places(program, self.example)
        reads = places.named(self.recipe.at, "at=")
        site, mask = places.site(reads, self.recipe.mask, self.recipe.at)
        depth = places.depth(reads)
        count = len(self.recipe.branches) + 1 if self.recipe.branches else len(program.exits) + 1
        unit = unit_class(self.recipe.unit, site, self.recipe.at)(site, count)
        cost = module_flops(unit, places.sizes(reads), getattr(torch, site.dtype))
        route = Route(
            name=ROUTE, at=self.recipe.at, reads=reads.name, mask=mask, unit=f"{ROUTES}.unit", weights="", choice="",
            admitted="", node="", x="", y="", batch_axis=0, ways=(), over=("", ""), depth=depth, unit_flops=cost,
            anchors=(places.anchors.get(reads),),
        )  # fmt: skip
        route = self._branches(places, route, reads) if self.recipe.branches else self._exits(program, places, route, reads)
        to = f"{len(program.exits)} exits" if route.to_exits else ", ".join(w.name for w in route.ways)
        return PassResult(program.replace(route=route), False, summary=f"at {route.at}, to {to}")

    def _exits(self, program: Program, places: Places, route: Route, reads: fx.Node) -> Route:
        late = [e for e in program.exits if places.position[places.names[e.after]] < places.position[reads]]
        if late:
            raise StrategyError(
                "an exit lies before the router that would send rows to it",
                where=f"{late[0].name}, after {late[0].cut}",
                got=f"a router at {self.recipe.at}",
                wanted="exits after the router",
                hint='at="input", or exits= that lie after it',
            )
        if route.unit_flops >= (1 - program.exits[0].depth) * program.total_flops:
            raise _dear(route, program)
        return route

    def _branches(self, places: Places, route: Route, reads: fx.Node) -> Route:
        over = self.recipe.over or (self.recipe.at, places.last())
        x, y = (places.named(name, "over=") for name in over)
        where = " to ".join(over)
        program, gm = places.program, facts.copy(places.program.graph_module)
        if places.position[x] < places.position[reads]:
            raise StrategyError(
                "branches begin before the router that chooses between them",
                where=where,
                got=f"a router at {self.recipe.at}",
                wanted="a router at or before the place where they begin",
            )
        part = Part(program, gm, x.name, y.name, where)
        taken = {n.name for n in part.inside}
        for kind, nodes in (
            ("gate", [(g.name, g.node) for g in program.choices.gates]),
            ("chain that halts", [(h.name, h.output) for h in program.choices.chains]),
        ):
            among = [name for name, node in nodes if node in taken]
            if among:
                raise StrategyError(
                    f"a {kind} lies in the part that has branches",
                    where=f"{among[0]}, {where}",
                    wanted="one or the other decides there",
                    hint="choose over= and the gated blocks apart",
                )
        axis = places.batch.axis(y)
        if not isinstance(axis, int):
            raise StrategyError("the value where branches end has no rows", where=over[1], got=str(axis or "no batch axis"))
        ways = tuple(self._way(places, part, name, what, y) for name, what in self.recipe.branches)
        full = Way(FULL, "", y.name, (), (), part.flops)
        saves = full.flops - min(w.flops for w in ways)
        route = Route(**{**vars(route), "x": x.name, "y": y.name, "batch_axis": axis, "over": over, "ways": (*ways, full)})
        if route.unit_flops >= saves:
            raise _dear(route, program, saves)
        anchors = places.anchors
        return Route(**{**vars(route), "anchors": (*route.anchors, anchors.get(x), anchors.get(y))})

    def _way(self, places: Places, part: Part, name: str, what: Any, y: fx.Node) -> Way:
        module = f"{ROUTES}.branch_{name}"  # "half" and "train" are names that a module has itself
        if not isinstance(what, nn.Module):
            light = part.light(part.chosen(what))
            anchors = tuple(places.anchors.get(places.names[s]) for s in light.sides)
            return Way(name, module, "", light.sides, anchors, light.flops, light.left_out)
        x = places.names[part.x.name]
        given = torch.zeros(places.sizes(x), dtype=facts.value(x).dtype)
        cost, out = _tried(what, given, name)
        wanted = tuple(places.sizes(y))
        if tuple(out.shape) != wanted or out.dtype != facts.value(y).dtype:
            raise StrategyError(
                "a branch gives another value than the part of the model that it stands in for",
                where=f"{name}, {part.where}",
                got=f"{out.dtype} {list(out.shape)} for {ROWS} rows",
                wanted=f"{facts.value(y).dtype} {list(wanted)}",
                hint="end the branch with a layer that gives this shape",
            )
        return Way(name, module, "", (), (), cost, custom=True)


class Places(facts.View):
    """The places of a graph that a router may name."""

    def __init__(self, program: Program, example: tuple[torch.Tensor, ...] | None) -> None:
        super().__init__(program)
        self.example = example

    def named(self, name: str, option: str) -> fx.Node:
        """The value that a name means."""
        inputs = dict(zip((leaf.path for leaf in self.program.signature.inputs), facts.placeholders(self.gm), strict=True))
        if name == INPUT:  # numbers rather than token ids or a mask, where there is a choice
            with_rows = [n for n in facts.placeholders(self.gm) if isinstance(self.batch.axis(n), int)]
            return next((n for n in with_rows if facts.value(n).is_floating_point()), with_rows[0])
        if name == OUTPUT and option == "over=":
            return facts.own_leaves(self.gm, self.program.signature)[self.program.prediction.index or 0]
        if name in inputs:
            return inputs[name]
        cuts = self.program.structure.cuts
        found = [c for c in cuts if name in (c.name, c.value)] or [c for c in cuts if fnmatch.fnmatchcase(c.name, name)]
        if len(found) != 1:
            known = [INPUT, *([OUTPUT] if option == "over=" else []), *(c.name for c in cuts)]
            reasons = [r.reason for r in self.program.refusals if r.node == name]
            raise StrategyError(
                f"no place has the name that a router has in {option}" if not found else "several places have this name",
                got=name,
                wanted=near(name, known) if not found else "one of " + ", ".join(c.name for c in found),
                hint=f"that place was refused: {reasons[0]}" if reasons else "eecompile inspect MODEL shows the cuts",
            )
        return self.names[found[0].value]

    def last(self) -> str:
        """Where branches end by default: after the last block, or at the prediction of a model without blocks."""
        blocks = [c for c in self.program.structure.cuts if c.is_block]
        return blocks[-1].name if blocks else OUTPUT

    def site(self, node: fx.Node, mask: str | None, where: str) -> tuple[Site, str | None]:
        """What a router finds at a node, and the name of the input that marks padding there, if any."""
        axis, v = self.batch.axis(node), facts.value(node)
        if not isinstance(axis, int) or not v.is_floating_point():
            first = next((c.name for c in self.program.structure.cuts), "a cut")
            raise StrategyError(
                "a router reads floating numbers",
                where=where,
                got=f"{str(v.dtype).removeprefix('torch.')} {list(self.batch.sizes(node))}",
                hint=f'at="{first}", the first value that the model computes from it',
            )
        sizes = self.batch.sizes(node)
        return sites.made_site(self.program, node, (sizes, str(v.dtype).removeprefix("torch.")), axis, mask)

    def sizes(self, node: fx.Node) -> list[int]:
        """Sizes of a value with ROWS rows and the example's length."""
        axis = self.batch.axis(node)
        return counting_sizes(self.program, self.batch.sizes(node), axis if isinstance(axis, int) else None, self.example)

    def depth(self, node: fx.Node) -> float:
        """Fraction of the model's cost up to a node, itself included."""
        done = sum(self.program.costs.flops.get(n.name, 0.0) for n in self.nodes[: self.position[node] + 1])
        return self.program.share(done)


def _tried(module: nn.Module, x: torch.Tensor, name: str) -> tuple[float, torch.Tensor]:
    """Runs a copy of a user's module: FLOPs of one row, and what it gives."""
    tried, given = copy.deepcopy(module).to("cpu").eval(), list[Any]()
    try:
        cost = flops_of(lambda: given.append(tried(x))) / ROWS
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise StrategyError(
            "a branch does not run on the value where it begins",
            where=name,
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            wanted=f"a module for {x.dtype} {list(x.shape)}",
        ) from error
    if not isinstance(given[0], torch.Tensor):
        raise StrategyError("a branch gives one tensor", where=name, got=type(given[0]).__name__)
    return cost, given[0]


def _dear(route: Route, program: Program, saves: float | None = None) -> StrategyError:
    total = program.total_flops or 1.0
    saved = (1 - program.exits[0].depth) * total if saves is None else saves
    return StrategyError(
        "the router costs more than it can save",
        where=route.at,
        got=f"{route.unit_flops / total:.1%} of the model for its scores, at most {max(saved, 0) / total:.1%} saved",
        hint='a cheaper unit= ("linear"), or branches that leave out more',
    )
