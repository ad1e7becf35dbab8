"""A graph at one level as stages of blocks: what every format shows."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from eecompile.errors import EecompileError, near
from eecompile.passes import facts
from eecompile.passes.place_gates import GATES
from eecompile.passes.place_routes import ROUTES
from eecompile.passes.stage import inserted
from eecompile.program import Block, Live, Program

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

FEWEST_COLLAPSED = 4
NO_WORK = ("placeholder", "get_attr", "output")
HALTS = re.compile(r"halt_\d+_(step_\d+|output)")  # names of what halting adds


@dataclass(frozen=True)
class Region:
    """A run of nodes: one block, several alike in a row, or what lies between blocks.

    Attributes:
        name: Module path of the block, `first ... last` for several, or the modules between blocks.
        kind: Class of the block's module; empty for what lies between blocks.
        nodes: Names of its nodes.
        share: Its fraction of the model's cost.
        count: How many blocks it stands for.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    share: float
    count: int = 1

    @property
    def title(self) -> str:
        if not self.kind:
            return self.name
        return f"{self.name} ({self.kind if self.count == 1 else f'{self.count} x {self.kind}'})"


@dataclass(frozen=True)
class Part:
    """The work up to an exit, or the whole graph where it has no exits.

    Attributes:
        exit: Index of the exit at its end, None for the model's own end.
        inserted: Nodes of the exit's head and decision, or of the selection at the end.
        live: What survives it.
    """

    name: str
    regions: tuple[Region, ...]
    exit: int | None
    inserted: int = 0
    live: tuple[Live, ...] = ()

    @property
    def share(self) -> float:
        return sum(r.share for r in self.regions)

    @property
    def nodes(self) -> int:
        return sum(len(r.nodes) for r in self.regions)


@dataclass(frozen=True)
class Level:
    """One graph of the history: its name, what it is, and the graph."""

    name: str
    about: str
    graph_module: fx.GraphModule


@dataclass(frozen=True)
class Outline:
    """A level, its parts, and which region reads what from which.

    Attributes:
        edges: (from, to, value) with the numbers of regions, counted through all parts; -1 is the input.
    """

    level: Level
    parts: tuple[Part, ...]
    edges: tuple[tuple[int, int, str], ...]
    total: int

    def regions(self) -> Iterator[tuple[int, Part, Region]]:
        """All regions with their numbers and parts."""
        number = 0
        for part in self.parts:
            for region in part.regions:
                yield number, part, region
                number += 1


def levels(fast: CompiledModule) -> list[str]:
    """Names that `after=` takes, in order."""
    return ["source", *dict.fromkeys(s.name for s in fast.history), "marked", "staged"]


def level(fast: CompiledModule, after: str | None) -> Level:
    """The graph after a pass, or "source", "marked", "staged"; None is the last.

    Raises:
        EecompileError: No such pass or level.
    """
    program: Program = fast.program
    if after is None or after == "staged":
        about = (
            "stages between the exits" if program.capture.front_end == "export" else "the marked graph: no stages of its own"
        )
        return Level("staged", about, program.graph_module)
    if after == "source":
        return Level("source", "as captured", program.source)
    if after == "marked":
        assert program.marked is not None  # a compiled module has it
        return Level("marked", "with heads, decisions and the selection", program.marked)
    names = [s.name for s in fast.history]
    if after not in names:
        raise EecompileError("no such pass or level", got=repr(after), wanted=near(after, levels(fast)))
    snapshot = fast.history[after]
    return Level(after, snapshot.summary or f"level {snapshot.level}", snapshot.graph_module)


def outline(fast: CompiledModule, after: str | None = None, collapse: bool = True) -> Outline:
    """The regions of a level.

    Args:
        collapse: Four or more blocks of one kind in a row become one region.
    """
    found = level(fast, after)
    program: Program = fast.program
    names = _Names(program)
    if program.capture.front_end == "blocks" and any(inserted(n) for n in found.graph_module.graph.nodes):
        return _python_blocks(found, program)
    cells = list(_cells(found.graph_module, program))
    parts: list[Part] = []
    owner: dict[str, int] = {}
    base = 0
    for key, exit_index, nodes, count in cells:
        regions = _regions(nodes, names, program)
        if collapse:
            regions = collapsed(regions)
        for i, region in enumerate(regions):
            owner.update(dict.fromkeys(region.nodes, base + i))
        base += len(regions)
        live: tuple[Live, ...] = ()
        if exit_index is not None:
            live = survivors(program, exit_index)
        parts.append(Part(key, tuple(regions), exit_index, count, live))
    for carry in (c for g in program.choices.gates for c in g.carries if c.y in owner):
        owner.setdefault(carry.node, owner[carry.y])
    edges = _edges(cells, owner, found.graph_module)
    total = sum(len(cell[2]) + cell[3] for cell in cells)
    return Outline(found, tuple(parts), edges, total)


def _python_blocks(found: Level, program: Program) -> Outline:
    """A model that was captured as blocks: they run one after the other in the model's own Python."""
    ends = {e.after: i for i, e in enumerate(program.exits)}
    parts: list[Part] = []
    regions: list[Region] = []
    for b in program.structure.blocks:
        regions.append(Region(b.name, b.kind, (b.output,), program.share(b.flops)))
        at = ends.get(b.output)
        if at is not None:
            parts.append(Part(f"stage_{len(parts)}", tuple(regions), at, live=survivors(program, at)))
            regions = []
    rest = 1.0 - program.share(sum(b.flops for b in program.structure.blocks))
    regions.append(Region("outside of the blocks", "", (), max(rest, 0.0)))
    parts.append(Part(f"stage_{len(parts)}", tuple(regions), None))
    count = sum(len(p.regions) for p in parts)
    edges = tuple((i - 1, i, "") for i in range(count))
    return Outline(found, tuple(parts), edges, len(found.graph_module.graph.nodes))


def survivors(program: Program, exit_index: int) -> tuple[Live, ...]:
    """What rows that stay take past an exit."""
    live = program.stages[exit_index].outputs if program.stages else ()
    if live:
        return live
    e = program.exits[exit_index]
    return next((c.live for c in program.structure.cuts if c.after == e.after), ())


Cell = tuple[str, int | None, list[fx.Node], int]


def _cells(gm: fx.GraphModule, program: Program) -> Iterator[Cell]:
    """(name, exit at its end, nodes of the trunk, number of inserted nodes) in order."""
    stages = {s.name: s for s in program.stages}
    staged = [n for n in gm.graph.nodes if n.op == "call_module" and n.target in stages]
    marks = [n.meta["eecompile"] for n in gm.graph.nodes if inserted(n) and n.op != "get_attr"]
    if staged:
        for n in staged:
            inner = gm.get_submodule(str(n.target))
            assert isinstance(inner, fx.GraphModule)  # the stage pass made it
            stage = stages[str(n.target)]
            mark = -1 if stage.exit is None else stage.exit
            yield stage.name, stage.exit, _working(inner), marks.count(mark)
        return
    if not marks:
        yield "graph", None, _working(gm), 0
        return
    ends = {e.after: i for i, e in enumerate(program.exits)}
    nodes: list[fx.Node] = []
    passed = 0
    for n in _working(gm):
        nodes.append(n)
        if n.name in ends:
            yield f"stage_{passed}", ends[n.name], nodes, marks.count(ends[n.name])
            nodes, passed = [], passed + 1
    yield f"stage_{passed}", None, nodes, marks.count(-1)


def _working(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes that compute, those of gated regions too; sizes are read where they are needed and belong to no block."""
    found: list[fx.Node] = []
    regions = set()
    for n in gm.graph.nodes:
        if n.op in NO_WORK or inserted(n) or facts.is_symbolic_number(n) or _decides(n):
            continue
        inner = gm.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(inner, fx.GraphModule):
            regions.add(n)
            found += _working(inner)
        elif not (n.target is operator.getitem and n.args[0] in regions):
            found.append(n)
    return found


def _decides(n: fx.Node) -> bool:
    """Whether a node belongs to a gate or a chain that halts: its unit, its decision, the choice after a region."""
    if n.op == "call_module":
        return str(n.target).startswith((f"{GATES}.", f"{ROUTES}."))
    if HALTS.match(n.name):
        return True
    return n.op == "call_function" and str(n.target).startswith("eecompile.")


class _Names:
    """Which block a node belongs to, by name; by module path for graphs from before the blocks were found."""

    def __init__(self, program: Program) -> None:
        self.blocks = program.structure.blocks
        self.by_node: dict[str, Block] = {}
        gm = program.marked if program.marked is not None else program.graph_module
        starts = {b.first: b for b in self.blocks}
        inside: Block | None = None
        for n in gm.graph.nodes:
            inside = starts.get(n.name, inside)
            if inside is not None and not inserted(n):
                self.by_node[n.name] = inside
                if n.name == inside.last:
                    inside = None
        self.by_path = {b.name: b for b in self.blocks}
        self.containers = {b.name.partition("@")[0].rsplit(".", i)[0] for b in self.blocks for i in range(1, 8)}

    def block(self, n: fx.Node) -> Block | None:
        if n.name in self.by_node:
            return self.by_node[n.name]
        for path, call, _ in facts.stack(n):
            found = self.by_path.get(facts.block_name(path, call))
            if found is not None:
                return found
        return None

    def between(self, n: fx.Node) -> str | None:
        """The outermost module around a node that holds no block."""
        return next((path for path, _, _ in facts.stack(n) if path and path not in self.containers), None)


def _regions(nodes: Sequence[fx.Node], names: _Names, program: Program) -> list[Region]:
    runs: list[tuple[Block | None, list[fx.Node]]] = []
    for n in nodes:
        block = names.block(n)
        if not runs or runs[-1][0] is not block:
            runs.append((block, []))
        runs[-1][1].append(n)
    found = []
    for block, members in runs:
        share = program.share(sum(program.costs.flops.get(n.name, 0.0) for n in members))
        name, kind = (block.name, block.kind) if block else (_label(members, names), "")
        found.append(Region(name, kind, tuple(n.name for n in members), share))
    return found


def _label(nodes: Sequence[fx.Node], names: _Names) -> str:
    """The modules of what lies between blocks; operators only where there are no modules."""
    parts = list(dict.fromkeys(m for m in map(names.between, nodes) if m))
    if not parts:
        parts = list(dict.fromkeys(map(facts.operator_name, nodes)))
    return ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")


def collapsed(regions: Sequence[Region]) -> list[Region]:
    """Four or more blocks of one kind in a row as one region."""
    found: list[Region] = []
    i = 0
    while i < len(regions):
        j = i + 1
        while j < len(regions) and _alike(regions[i], regions[j]):
            j += 1
        run = regions[i:j]
        if len(run) >= FEWEST_COLLAPSED and run[0].kind:
            nodes = tuple(n for r in run for n in r.nodes)
            share = sum(r.share for r in run)
            name = f"{run[0].name} ... {_ending(run[0].name, run[-1].name)}"
            found.append(replace(run[0], name=name, nodes=nodes, share=share, count=len(run)))
        else:
            found += run
        i = j
    return found


def _ending(first: str, last: str) -> str:
    """What is new in the second of two module paths."""
    old, new = first.split("."), last.split(".")
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    return ".".join(new[same:])


def _alike(a: Region, b: Region) -> bool:
    return a.kind == b.kind and bool(a.kind) and re.sub(r"\d+", "*", a.name) == re.sub(r"\d+", "*", b.name)


def _edges(cells: Sequence[Cell], owner: dict[str, int], gm: fx.GraphModule) -> tuple[tuple[int, int, str], ...]:
    """Values that go from one region to another, each once."""
    found: dict[tuple[int, int, str], None] = {}
    inputs = {n.name for n in gm.graph.nodes if n.op == "placeholder"}
    for _, _, nodes, _ in cells:
        for n in nodes:
            for a in n.all_input_nodes:
                source = -1 if a.name in inputs else owner.get(a.name)
                if source is not None and source != owner[n.name] and not facts.is_symbolic_number(a):
                    found[source, owner[n.name], a.name] = None
    return tuple(found)
