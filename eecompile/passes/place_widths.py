"""Chooses the parts that run at a width, and writes down each as a chain of gates.

Gate k of a chain opens the k-th slice of channels, and is open only where the one before it is. Where the part may be
skipped, the first gate decides that; else its smallest width always runs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx

from eecompile.errors import StrategyError
from eecompile.ir.records import Gate, Width
from eecompile.passes import facts
from eecompile.passes.find_channels import Channels, find_channels
from eecompile.passes.find_regions import exclusive
from eecompile.passes.narrow import Part
from eecompile.program import Program, Refusal, Region

RULE = "place_widths"
LEAST_SAVED = 0.01  # of the model's cost, by layers that have a width and nothing else to choose


def part_of(gm: fx.GraphModule, x: fx.Node, y: fx.Node) -> tuple[Part, str]:
    """What lies between x and y with its groups of channels, and why there are none."""
    nodes = list(gm.graph.nodes)
    inside = exclusive(nodes, {n: i for i, n in enumerate(nodes)}, [y], {x})
    groups, reason = find_channels(gm, inside, [y])
    return Part(gm, tuple(inside), tuple(groups), y), reason


@dataclass
class Placed:
    """What `place_widths` found.

    Attributes:
        regions: The chosen regions and those that have nothing but a width, in graph order.
        parts: By region name, those with channels.
    """

    regions: list[Region]
    parts: dict[str, Part]
    refusals: list[Refusal]


def place_widths(
    program: Program, fractions: Sequence[float], chosen: Sequence[Region], kept: Sequence[Region], always_on: Sequence[str]
) -> Placed:
    """Widths of the chosen regions, and of pairs of layers elsewhere.

    Args:
        chosen: Regions that get a gate.
        kept: Regions that run for every row, at full width.
        always_on: Patterns; what they name keeps its full width.

    Raises:
        StrategyError: No part of the model has a width to choose.
    """
    gm = program.graph_module
    names = facts.by_name(gm)
    placed = Placed([], {}, [])
    taken: set[fx.Node] = set()
    for region in chosen:
        part, reason = part_of(gm, names[region.x], names[region.y])
        taken.update(part.nodes)
        _keep(placed, region, part, reason, fractions)
        placed.regions.append(region)
    for region in kept:
        taken.update(part_of(gm, names[region.x], names[region.y])[0].nodes)
    for region in _pairs(program, taken, placed.refusals):
        if any(_named(region, pattern) for pattern in always_on):
            placed.refusals.append(Refusal(region.name, RULE, "always on"))
            continue
        part, reason = part_of(gm, names[region.x], names[region.y])
        saved = program.share(region.flops - part.flops(program.costs.flops, fractions[0]))
        if saved < LEAST_SAVED:
            placed.refusals.append(Refusal(region.name, RULE, f"the smallest width saves {saved:.2%} of the model's cost"))
            continue
        _keep(placed, region, part, reason, fractions)
        if region.name in placed.parts:
            placed.regions.append(region)
    if not placed.parts:
        reasons = "; ".join(f"{r.node}: {r.reason}" for r in placed.refusals[:8])
        raise StrategyError(
            "no part of the model has a width to choose",
            got=reasons or "no linear layer or convolution whose channels another one reads",
            wanted="a linear layer or convolution, pointwise operators, and another one",
            hint="widths=() leaves widths as they are",
        )
    position = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    placed.regions.sort(key=lambda r: position[r.y])
    return placed


def _named(region: Region, pattern: str) -> bool:
    return fnmatch.fnmatchcase(region.name, pattern) or fnmatch.fnmatchcase(region.block, pattern)


def _keep(placed: Placed, region: Region, part: Part, reason: str, fractions: Sequence[float]) -> None:
    if not part.channels:
        placed.refusals.append(Refusal(region.name, RULE, f"no channels to leave out: {reason}"))
        return
    for c in part.channels:
        sizes = [c.kept(f) for f in fractions]
        if len(set(sizes)) < len(sizes):
            reason = f"the {c.size} channels of {c.name} make two of the widths equal: {sizes}"
            placed.refusals.append(Refusal(region.name, RULE, reason))
            return
    placed.parts[region.name] = part


def _pairs(program: Program, taken: set[fx.Node], refusals: list[Refusal]) -> list[Region]:
    """Regions from the layer that makes channels to the one that reads them, outside of `taken`."""
    gm = program.graph_module
    nodes = list(gm.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    groups, _ = find_channels(gm, nodes, facts.output_leaves(gm))
    groups = [g for g in groups if not any(n in taken for n in (*g.axes, *g.readers))]
    joined: list[list[Channels]] = []
    for g in groups:  # where the reader of one group makes the next, both go together
        before = next((j for j in joined if any(r in g.makers for other in j for r in other.readers)), None)
        if before is None:
            joined.append([g])
        else:
            before.append(g)
    batch = facts.Batch(gm, program.signature)
    anchors = facts.anchors(nodes)
    found: list[Region] = []
    for together in joined:
        name = _name(together, [r.name for r in found])
        region = _pair(program, batch, together, nodes, position)
        if isinstance(region, str):
            refusals.append(Refusal(name, RULE, region))
            continue
        x, y, axis = region
        inside = exclusive(nodes, position, [y], {x})
        flops = sum(program.costs.flops.get(n.name, 0.0) for n in inside)
        first = min(position[n] for n in inside)
        depth = program.share(sum(program.costs.flops.get(n.name, 0.0) for n in nodes[:first]))
        block = next((b.name for b in program.structure.blocks if _within(b.first, b.last, y, position)), "")
        ends = (anchors.get(x), anchors.get(y))
        found.append(Region(name, "width", block, x.name, y.name, axis, flops, depth, False, ends))
    return found


def _pair(
    program: Program, batch: facts.Batch, groups: list[Channels], nodes: list[fx.Node], position: dict[fx.Node, int]
) -> tuple[fx.Node, fx.Node, int] | str:
    """What goes into the first layers, what comes out of the last, and the axis of the rows; or why it is no region."""
    inner = {n for g in groups for n in g.axes}
    xs = dict.fromkeys(m.all_input_nodes[0 if m.target is not _ADDMM else 1] for g in groups for m in g.makers)
    outside = [x for x in xs if x not in inner]
    last = [r for g in groups for r in g.readers if r not in inner]
    if len(outside) != 1 or len(last) != 1:
        return f"{len(outside)} values go into its layers and {len(last)} come out"
    x, y = outside[0], last[0]
    following = list(y.users)
    if len(following) == 1 and following[0].target is _BATCH_NORM:
        y = following[0]
    axis, at = batch.axis(y), batch.axis(x)
    if not isinstance(axis, int) or axis != at:
        return f"the rows of {x.name} and {y.name} do not lie on one axis"
    inside = set(exclusive(nodes, position, [y], {x}))
    if not all(n in inside for n in inner):
        return "its channels are needed elsewhere too"
    return x, y, axis


_ADDMM, _BATCH_NORM = facts.aten.addmm.default, facts.aten.batch_norm.default


def _within(first: str, last: str, n: fx.Node, position: dict[fx.Node, int]) -> bool:
    at = {m.name: i for m, i in position.items()}
    return at.get(first, len(at)) <= position[n] <= at.get(last, -1)


def _name(groups: list[Channels], others: Sequence[str]) -> str:
    stacks = [facts.stack(n) for g in groups for n in (*g.makers, *g.readers)]
    paths = [s[-1][0].split(".") if s else [] for s in stacks]
    common = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))
    common = common or paths[0][0] if paths[0] else common
    name, k = f"{common}:width", 0
    while name in others:
        k += 1
        name = f"{common}:width_{k}"
    return name


def chain(
    program: Program, region: Region, part: Part, fractions: Sequence[float], single: Gate
) -> tuple[Width, list[Gate]]:
    """The gates of a part with widths, made from the gate that the whole part would have. Names are given later."""
    costs = [part.flops(program.costs.flops, f) for f in fractions]
    skips = region.kind != "width"
    start = 0 if skips else 1
    gates: list[Gate] = []
    for k in range(start, len(fractions)):
        saves = costs[k] - (costs[k - 1] if k else 0.0)
        kind = region.kind if k == 0 else "width"
        gates.append(
            replace(single, kind=kind, flops=saves, width=fractions[k], unit_flops=0.0 if gates else single.unit_flops)
        )
    channels = tuple(tuple(c.kept(f) for f in fractions) for c in part.channels)
    return Width("", region.name, region.x, tuple(fractions), channels, skips, ()), gates
