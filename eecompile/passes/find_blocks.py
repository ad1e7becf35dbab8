"""Repeated units of a model: encoder layers, residual blocks, cells called once per step.

Candidates are groups of module calls whose paths agree when digits are starred and whose class is the same. A group
must not overlap itself. Groups that cover much of the graph win, then those with the fewest values crossing between
their members, then the larger group. Where no module repeats, or those that do are the branches of residual additions
that the forward makes itself, the blocks are those branches with their additions (`residual_units`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from eecompile.errors import StrategyError, near
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.recurrent import CELLS
from eecompile.passes.residual_units import Unit, residual_units
from eecompile.program import Block, Program, Refusal

MIN_COVERAGE = 0.2
GOOD_COVERAGE = 0.4


@dataclass
class Instance:
    """One call of one module: its interval of the graph."""

    path: str
    call: int
    kind: str
    first: int
    last: int
    nodes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FindBlocks(Pass):
    """Fills `program.structure.blocks` with the best group of repeated modules, or with nothing where none repeats.

    In a cascade the blocks are its models.

    Args:
        pattern: Take this group, a path with `*` for its numbers (for example `layer*.*`), instead of the best one.

    Raises:
        StrategyError: No group has the name given as `pattern`.
    """

    name: ClassVar[str] = "find_blocks"
    requires: ClassVar[frozenset[str]] = frozenset({"costs"})
    ensures: ClassVar[frozenset[str]] = frozenset({"blocks"})

    pattern: str | None = None

    def run(self, program: Program) -> PassResult:
        program = program.replace(block_pattern=self.pattern)
        nodes = list(program.graph_module.graph.nodes)
        batch = facts.Batch(program.graph_module, program.signature)
        trunk = facts.trunk_nodes(program.graph_module, batch)
        last = facts.last_uses(nodes)
        if program.capture.models:
            every = instances(nodes)
            members = [one for (path, _), one in every.items() if path in program.capture.models]
            members.sort(key=lambda m: program.capture.models.index(m.path))
            for m in members:  # named after the user's class, not after what surrounds it
                inner = every.get((f"{m.path}.model", 0))
                m.kind = m.kind if inner is None else inner.kind
            blocks = tuple(_block(m, nodes, trunk, last, program) for m in members)
            return PassResult(program.replace(blocks=blocks), False, (), f"{len(blocks)} models")
        groups, refusals = candidates(nodes, trunk, last, self.pattern)
        if self.pattern is not None:
            groups = chosen(groups, self.pattern, refusals)
        else:
            leaves = facts.output_leaves(program.graph_module)
            at = program.prediction.index
            units = residual_units(nodes, trunk, program.costs.flops, leaves[at] if at is not None else None)
            best = groups[0][1] if groups else []
            within = [sum(u.x < m.first and m.last < u.y for m in best) for u in units]
            # Those modules are the branches, not the blocks: one in a unit, and most of them are in one.
            if units and max(within) <= 1 and 2 * sum(within) >= len(best):
                groups = [("x + f(x)", [unit_instance(u, nodes) for u in units])]
        if not groups:
            return PassResult(program.replace(blocks=()), False, tuple(refusals), "no repeated block")
        pattern, members = groups[0]
        blocks = tuple(_block(m, nodes, trunk, last, program) for m in members)
        return PassResult(
            program.replace(blocks=blocks),
            False,
            tuple(refusals),
            f"{len(blocks)} blocks {pattern} ({members[0].kind})",
        )


def unit_instance(unit: Unit, nodes: list[fx.Node]) -> Instance:
    """A residual branch of the graph as if a module marked it."""
    inside = [i for i in range(unit.x + 1, unit.y + 1) if nodes[i].op in ("call_function", "call_module")]
    path, _, call = unit.name.partition("@")
    return Instance(path, int(call or 0), "residual", inside[0], inside[-1], inside)


def chosen(
    groups: list[tuple[str, list[Instance]]], pattern: str, refusals: list[Refusal]
) -> list[tuple[str, list[Instance]]]:
    """The groups of that name.

    Raises:
        StrategyError: There is none; the message lists the groups, or says why that one was passed over.
    """
    found = [g for g in groups if g[0] == pattern]
    if not found:
        reasons = [r.reason for r in refusals if r.node == pattern]
        raise StrategyError(
            "no repeated module has this path",
            got=pattern,
            wanted=near(pattern, [g[0] for g in groups]) if groups else "the model has none",
            hint=f"that one was passed over: {reasons[0]}" if reasons else None,
        )
    return found


def instances(nodes: list[fx.Node]) -> dict[tuple[str, int], Instance]:
    """Every module call that left nodes in the graph."""
    found: dict[tuple[str, int], Instance] = {}
    for i, n in enumerate(nodes):
        if n.op not in ("call_function", "call_module"):
            continue
        for path, call, kind in facts.stack(n):
            one = found.setdefault((path, call), Instance(path, call, kind, i, i))
            one.last = i
            one.nodes.append(i)
    return found


def candidates(
    nodes: list[fx.Node], trunk: set[fx.Node], last: dict[fx.Node, int], wanted: str | None = None
) -> tuple[list[tuple[str, list[Instance]]], list[Refusal]]:
    """Groups of repeated modules, best first, and the groups that were passed over. `wanted` may cover little."""
    every = instances(nodes)
    total = sum(n.op == "call_function" for n in nodes)
    # Every path above a call, not only the nearest: a `ModuleList` in between is never called itself.
    parents = {path[: dot.start()] for path, _ in every for dot in re.finditer(r"\.", path)}
    groups: dict[tuple[str, str], list[Instance]] = defaultdict(list)
    for (path, call), one in every.items():
        again = call > 0 or (path, 1) in every
        cell = one.kind.endswith("Cell") and again  # a leaf, but the unit of a recurrent net
        cell = cell or (path not in parents and any(nodes[i].target in CELLS for i in one.nodes))
        if cell or (path in parents and (re.search(r"\d", path) or again)):
            groups[(re.sub(r"\d+", "*", path), one.kind)].append(one)
    ranked = []
    refusals = []
    live = _live_counts(nodes, trunk, last)
    for (pattern, kind), members in groups.items():
        members.sort(key=lambda m: m.first)
        cell = kind.endswith("Cell") or any(nodes[i].target in CELLS for i in members[0].nodes)
        coverage = sum(len(m.nodes) for m in members) / max(total, 1)
        if len(members) < 2:
            continue
        if any(a.last >= b.first for a, b in zip(members, members[1:], strict=False)):
            refusals.append(Refusal(pattern, "find_blocks", "its members overlap in the graph"))
            continue
        if coverage < MIN_COVERAGE and not cell and pattern != wanted:
            refusals.append(Refusal(pattern, "find_blocks", f"covers {coverage:.0%} of the graph"))
            continue
        width = Counter(live[m.last] for m in members).most_common(1)[0][0]
        # Where several values cross anyway, finer units gain nothing: they cut inside a block
        size = len(members) if width > 1 else -len(members)
        share = 3 if cell else min(3, int(4 * coverage))  # in quarters: finer units lose a little to their container
        ranked.append(((coverage < GOOD_COVERAGE and not cell, width, -share, size), pattern, members))
    ranked.sort(key=lambda r: r[0])
    for _, pattern, members in ranked[1:]:
        refusals.append(Refusal(pattern, "find_blocks", f"{len(members)} members, but another group fits better"))
    return [(p, m) for _, p, m in ranked], refusals


def _live_counts(nodes: list[fx.Node], trunk: set[fx.Node], last: dict[fx.Node, int]) -> list[int]:
    """How many trunk values are still needed after each position. One sweep."""
    ends: dict[int, int] = defaultdict(int)
    count, counts = 0, []
    for i, n in enumerate(nodes):
        if n in trunk and last[n] > i:
            count += 1
            ends[last[n]] += 1
        count -= ends.pop(i, 0)
        counts.append(count)
    return counts


def _block(one: Instance, nodes: list[fx.Node], trunk: set[fx.Node], last: dict[fx.Node, int], program: Program) -> Block:
    inside = [nodes[i] for i in one.nodes]
    handed_on = [n for n in inside if last[n] > one.last and n in trunk and facts.is_tensor(n)]
    output = handed_on[-1] if handed_on else inside[-1]
    flops = sum(program.costs.flops.get(n.name, 0.0) for n in inside)
    return Block(
        facts.block_name(one.path, one.call), one.kind, nodes[one.first].name, nodes[one.last].name, output.name, flops
    )
