"""The program as a drawing for Graphviz and Mermaid: a cluster for each stage, a box for each block."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eecompile.inspect import text as write
from eecompile.inspect.outline import Outline, Part
from eecompile.inspect.text import Raw
from eecompile.runtime.live_settings import NOT_TRAINED

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


@dataclass(frozen=True)
class Box:
    """A node of the drawing; `shape` is "box", "exit" or "end"."""

    id: str
    lines: tuple[str, ...]
    shape: str = "box"


@dataclass(frozen=True)
class Arrow:
    start: str
    end: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Drawing:
    """Clusters (title, boxes), boxes outside of them, and arrows."""

    title: str
    clusters: tuple[tuple[str, str, tuple[Box, ...]], ...]
    loose: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def drawing(fast: CompiledModule, outline: Outline) -> Drawing:
    """Boxes and arrows of a level: data between blocks, what exits read, and where rows exit."""
    clusters: dict[str, list[Box]] = defaultdict(list)
    where: dict[str, int] = {}
    for number, part, region in outline.regions():
        lines = (region.title, write.percent(region.share))
        clusters[part.name].append(Box(f"r{number}", lines))
        where.update(dict.fromkeys(region.nodes, number))
    inputs = tuple(leaf.describe() for leaf in fast.program.signature.inputs)
    loose = [Box("input", ("input", *inputs), "end"), Box("output", ("output",), "end")]
    arrows = [*_data(outline)]
    for part in outline.parts:
        if part.exit is None:
            continue
        box = _exit(fast, part)
        clusters[part.name].append(box)
        e = fast.program.exits[part.exit]
        arrows.append(Arrow(f"r{where[e.node]}" if e.node in where else "input", box.id, "head reads"))
        if fast.exits[part.exit].is_open:
            arrows.append(Arrow(box.id, "output", "leave", True))
    last = sum(len(p.regions) for p in outline.parts) - 1
    arrows.append(Arrow("input" if last < 0 else f"r{last}", "output"))
    titled = tuple(
        (f"s{i}", f"{p.name}, {write.percent(p.share)}", tuple(clusters[p.name])) for i, p in enumerate(outline.parts)
    )
    model = fast.title
    return Drawing(f"{model}, {outline.level.name}", titled, tuple(loose), tuple(arrows))


def _exit(fast: CompiledModule, part: Part) -> Box:
    assert part.exit is not None
    e = fast.exits[part.exit]
    state = f"{e.criterion.name} at {e.threshold:.4g}" if e.is_open else "closed"
    state += "" if e.trained else f", {NOT_TRAINED}"
    return Box(f"e{part.exit}", (e.name, state, f"head {e.head_kind}, {write.percent(e.head_cost)}"), "exit")


def _data(outline: Outline) -> list[Arrow]:
    """One arrow for each pair of regions, with the value's name where it is one."""
    values: dict[tuple[int, int], list[str]] = defaultdict(list)
    for start, end, value in outline.edges:
        values[start, end].append(value)
    found = []
    for (start, end), names in values.items():
        label = names[0] if len(names) == 1 else f"{len(names)} values"
        found.append(Arrow("input" if start < 0 else f"r{start}", f"r{end}", "" if start < 0 else label))
    return found


def dot(fast: CompiledModule, outline: Outline) -> Raw:
    """`format="dot"`: for Graphviz."""
    made = drawing(fast, outline)
    shapes = {
        "box": "shape=box",
        "exit": 'shape=diamond, style=filled, fillcolor="#f3e5f5"',
        "end": "shape=box, style=rounded",
    }
    lines = [
        f"digraph {_quoted(made.title)} {{",
        "  rankdir=TB;",
        '  node [fontname="Helvetica", fontsize=10];',
    ]
    lines.append('  edge [fontname="Helvetica", fontsize=8];')
    for name, title, boxes in made.clusters:
        lines.append(f"  subgraph cluster_{name} {{")
        lines.append(f"    label={_quoted(title)};")
        lines += [f"    {b.id} [label={_quoted(*b.lines)}, {shapes[b.shape]}];" for b in boxes]
        lines.append("  }")
    lines += [f"  {b.id} [label={_quoted(*b.lines)}, {shapes[b.shape]}];" for b in made.loose]
    for a in made.arrows:
        options = [f"label={_quoted(a.label)}"] * bool(a.label) + ["style=dashed"] * a.dashed
        lines.append(f"  {a.start} -> {a.end}" + (f" [{', '.join(options)}]" if options else "") + ";")
    return Raw("\n".join([*lines, "}"]))


def _quoted(*lines: str) -> str:
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'


def mermaid(fast: CompiledModule, outline: Outline) -> Raw:
    """`format="mermaid"`: for Markdown pages."""
    made = drawing(fast, outline)
    lines = ["flowchart TD"]
    for name, title, boxes in made.clusters:
        lines.append(f"  subgraph {name}[{_label(title)}]")
        lines += [f"    {_box(b)}" for b in boxes]
        lines.append("  end")
    lines += [f"  {_box(b)}" for b in made.loose]
    for a in made.arrows:
        line = "-.->" if a.dashed else "-->"
        middle = f"|{_label(a.label)}|" if a.label else ""
        lines.append(f"  {a.start} {line}{middle} {a.end}")
    return Raw("\n".join(lines))


def _box(box: Box) -> str:
    opening, closing = {"box": ("[", "]"), "exit": ("{{", "}}"), "end": ("([", "])")}[box.shape]
    return f"{box.id}{opening}{_label(*box.lines)}{closing}"


def _label(*lines: str) -> str:
    """A quoted label; characters that Mermaid reads itself become entities."""
    escaped = [re.sub(r'["#<>&;`]', lambda m: f"#{ord(m.group())};", line) for line in lines]
    return '"' + "<br/>".join(escaped) + '"'
