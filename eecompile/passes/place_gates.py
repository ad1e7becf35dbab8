"""Chooses the regions that get a gate, and refuses gates that cost more than they can save."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from eecompile.errors import NoPlaceError, PassError, StrategyError, near
from eecompile.gates import GateUnit, PolicyGate, RecurrentCore, unit_class
from eecompile.heads import Site
from eecompile.ir.recipes import GateRecipe, HaltRecipe
from eecompile.ir.records import Carry, Gate, Width
from eecompile.passes import facts, sites
from eecompile.passes.annotate import counting_sizes, module_flops
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.narrow import Part
from eecompile.passes.place_widths import chain, place_widths
from eecompile.program import Program, Refusal, Region
from eecompile.untrained import untrained

GATES = "eecompile_gates"


@dataclass(frozen=True)
class PlaceGates(Pass):
    """Fills `program.choices.gates` from the recipe; the graph stays as it is.

    Args:
        recipe: What the strategy wants.
        example: Flat inputs, for the sizes of dynamic axes.
    """

    name: ClassVar[str] = "place_gates"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "regions"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gates placed"})

    recipe: GateRecipe
    example: tuple[torch.Tensor, ...] | None = None

    def run(self, program: Program) -> PassResult:
        refusals: list[Refusal] = []
        found, kept = self._chosen(program, refusals)
        chosen = self._without_overlap(found, refusals)
        first = self.recipe.ungated
        refusals += [Refusal(r.name, self.name, f"one of the first {first}, which every row runs") for r in chosen[:first]]
        chosen = chosen[first:]
        parts: dict[str, Part] = {}
        if self.recipe.widths:
            if self.recipe.monotone:
                raise StrategyError("gates that close all later ones have no widths", got=f"widths={self.recipe.widths}")
            placed = place_widths(program, self.recipe.widths, chosen, kept, self.recipe.always_on)
            chosen, parts = placed.regions, placed.parts
            refusals += placed.refusals
            more = tuple(r for r in chosen if r not in program.structure.regions)
            program = program.replace(regions=(*program.structure.regions, *more))
        count = sum(len(self.recipe.widths) - (r.kind == "width") if r.name in parts else 1 for r in chosen)
        gates: list[Gate] = []
        widths: list[Width] = []
        for region in chosen:
            gate = self._judge(program, region, count, len(gates), refusals)
            if gate is None:
                continue
            if region.name not in parts:
                gates.append(self._named(gate, len(gates)))
                continue
            width, links = chain(program, region, parts[region.name], self.recipe.widths, gate)
            named = [self._named(g, len(gates) + k) for k, g in enumerate(links)]
            named = [replace(g, needs=named[k - 1].name if k else "") for k, g in enumerate(named)]
            gates += named
            widths.append(replace(width, name=f"width_{len(widths)}", gates=tuple(g.name for g in named)))
        if not gates:
            reasons = [f"{r.node}: {r.reason}" for r in (*program.refusals, *refusals) if r.rule in RULES]
            raise sites.own_autocast(program) or NoPlaceError(
                "no region for a gate",
                got="; ".join(reasons[:12]) or "no block of the model hands on what it was given",
                wanted="a block whose input and output have the same shape",
                hint="eecompile inspect MODEL shows the blocks; exits need no such block",
            )
        summary = f"{len(gates)} gates over {program.share(sum(g.flops for g in gates)):.0%} of the cost"
        if widths:
            summary += f", {len(widths)} parts of {len(self.recipe.widths)} widths"
        return PassResult(program.replace(gates=tuple(gates), widths=tuple(widths)), False, tuple(refusals), summary)

    def _named(self, gate: Gate, i: int) -> Gate:
        return replace(gate, name=f"gate_{i}", unit=self._unit(i))

    def _unit(self, i: int) -> str:
        common = self.recipe.unit in ("policy", "depth")
        return f"{GATES}.policy" if common else f"{GATES}.gate_{i}"

    def _chosen(self, program: Program, refusals: list[Refusal]) -> tuple[list[Region], list[Region]]:
        """The regions that the recipe names, and those of them that it keeps on, in graph order."""
        where, regions = self.recipe.where, program.structure.regions
        names = [where] if isinstance(where, str) else list(where)
        found: dict[str, Region] = {}
        for name in names:
            matched = named(regions, name)
            if not matched and name not in KEYWORDS:
                reasons = [r.reason for r in program.refusals if r.node == name]
                raise StrategyError(
                    "no region has this name",
                    got=name,
                    wanted=near(name, [r.name for r in regions]) if regions else "this model has no region to skip",
                    hint=f"it was refused: {reasons[0]}" if reasons else "eecompile inspect MODEL shows the regions",
                )
            for r in matched:
                if not r.residual and name in KEYWORDS:
                    reason = "its input does not reach its output by additions: skipping it would replace the value"
                    refusals.append(Refusal(r.name, self.name, reason))
                else:
                    found[r.name] = r
        always: list[Region] = []
        for pattern in self.recipe.always_on:
            kept = [n for n, r in found.items() if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(r.block, pattern)]
            if not kept and not self.recipe.widths:
                raise StrategyError("always_on= names no gated region", got=pattern, wanted=near(pattern, list(found)))
            for n in kept:
                refusals.append(Refusal(n, self.name, f"always on: {pattern}"))
                always.append(found.pop(n))
        order = {r.name: i for i, r in enumerate(regions)}
        return sorted(found.values(), key=lambda r: order[r.name]), always

    def _without_overlap(self, chosen: list[Region], refusals: list[Refusal]) -> list[Region]:
        whole = {r.block for r in chosen if r.kind == "block"}
        kept = []
        for r in chosen:
            if r.kind != "block" and r.block in whole:
                refusals.append(Refusal(r.name, self.name, f"{r.block} has a gate as a whole"))
            else:
                kept.append(r)
        return kept

    def _judge(self, program: Program, region: Region, count: int, index: int, refusals: list[Refusal]) -> Gate | None:
        site, _ = site_of(program, region, self.recipe.mask)
        kind = unit_class(self.recipe.unit, site, region.name)
        cost = 0.0
        if not kind.common or index == 0:
            unit = make_unit(kind, site, self.recipe.open_bias, count, None)
            cost = module_flops(unit, sizes_of(program, region, self.example), getattr(torch, site.dtype))
        if not kind.common and cost > region.flops * self.recipe.max_unit_share:
            reason = f"its score costs {cost / max(region.flops, 1):.0%} of what it could save"
            refusals.append(Refusal(region.name, self.name, reason))
            return None
        return Gate(
            name="",
            node="",
            region=region.name,
            kind=region.kind,
            depth=region.depth,
            unit="",
            score="",
            decision="",
            flops=region.flops,
            unit_flops=cost,
            carries=(Carry(region.y, region.x, "", region.batch_axis),),
            anchors=region.anchors,
        )


RULES = ("find_regions", "place_gates", "place_widths")
KEYWORDS = ("every-block", "halves", "attention", "mlp")


def named(regions: Sequence[Region], name: str) -> list[Region]:
    """The regions that a name, a pattern or a keyword means."""
    if name == "every-block":
        branches = {r.block for r in regions if r.kind == "branch"}
        return [r for r in regions if r.kind == "branch" or (r.kind == "block" and r.block not in branches)]
    if name == "halves":
        split = {r.block for r in regions if r.kind != "block"}
        return [r for r in regions if (r.kind != "block") == (r.block in split)]
    if name in ("attention", "mlp"):
        return [r for r in regions if r.kind == name]
    return [r for r in regions if fnmatch.fnmatchcase(r.name, name)]


def site_of(program: Program, region: Region, mask: str | None) -> tuple[Site, str | None]:
    """What a unit finds at the region's input, and the name of the input that marks padding there, if any."""
    gm = program.graph_module
    node = facts.by_name(gm)[region.x]
    batch = facts.Batch(gm, program.signature)
    sizes = batch.sizes(node)
    dtype = str(facts.value(node).dtype).removeprefix("torch.")
    return sites.made_site(program, node, (sizes, dtype), region.batch_axis, mask)


def mask_of(program: Program, region: str, mask: str | None) -> str | None:
    """Name of the input that marks padding at the region of this name; None without one.

    Raises:
        PassError: The region is not in this graph.
    """
    found = next((r for r in program.structure.regions if r.name == region), None)
    if found is None:
        raise PassError("a region with a gate or halting is not in this graph", where=region)
    return site_of(program, found, mask)[1]


def new_units(
    program: Program,
    recipe: GateRecipe | HaltRecipe,
    wanted: Sequence[tuple[str, str, float]],
    shared: RecurrentCore | None = None,
) -> dict[str, nn.Module]:
    """New units by name, in the dtype and on the device of the model.

    Args:
        wanted: Of each gate or step its unit's path, its region and the bias that it starts with.
        shared: What recurrent units share.
    """
    regions, device = {r.name: r for r in program.structure.regions}, facts.device_of(program.graph_module)
    units: dict[str, nn.Module] = {}
    for path, region, bias in wanted:
        name = path.rsplit(".", 1)[1]
        if name not in units:
            site, _ = site_of(program, regions[region], recipe.mask)
            unit = make_unit(unit_class(recipe.unit, site, region), site, bias, len(wanted), shared)
            units[name] = untrained(unit, device, site.dtype)
    return units


def sizes_of(program: Program, region: Region, example: tuple[torch.Tensor, ...] | None) -> list[int]:
    """Sizes of the region's input with ROWS rows and the example's length."""
    shape = facts.Batch(program.graph_module, program.signature).sizes(facts.by_name(program.graph_module)[region.x])
    return counting_sizes(program, shape, region.batch_axis, example)


def make_unit(kind: type[GateUnit], site: Site, open_bias: float, count: int, shared: RecurrentCore | None) -> GateUnit:
    """A new unit; recurrent ones share `shared`, common ones score `count` gates."""
    options: dict[str, object] = {"shared": shared} if kind.recurrent else {}
    if issubclass(kind, PolicyGate):
        options["gates"] = count
    return kind(site, open_bias, **options)
