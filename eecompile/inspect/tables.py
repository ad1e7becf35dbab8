"""Tables of a program: blocks, exits, what decides inside, cuts, refusals, passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eecompile.inspect import text as write
from eecompile.inspect.decisions import sections
from eecompile.inspect.outline import Outline
from eecompile.runtime.live_settings import NOT_TRAINED

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def tables(fast: CompiledModule, outline: Outline, whole: bool) -> RenderableType:
    """`format="table"`: the level's blocks and, for the whole program, everything else that is known."""
    parts: list[RenderableType] = [blocks(outline)]
    if whole:
        parts += [exits(fast), *decisions(fast), cuts(fast), *refusals(fast), passes(fast)]
    return Group(*parts)


def blocks(outline: Outline) -> Table:
    level = outline.level
    made = _table(f"{level.name}: {outline.total} nodes, {level.about}", "stage", "block", "kind", "nodes", "cost")
    for part in outline.parts:
        for i, r in enumerate(part.regions):
            made.add_row(part.name if i == 0 else "", Text(r.name), r.kind, str(len(r.nodes)), write.percent(r.share))
    return made


def exits(fast: CompiledModule) -> Table:
    made = _table("exits", "exit", "after", "head", "criterion", "threshold", "head cost", "cost of exiting")
    made.columns[1].no_wrap = True
    costs = fast.costs([e.is_open for e in fast.exits]).tolist()
    for e, cost in zip(fast.exits, costs, strict=False):
        threshold = f"{e.threshold:.4g}" if e.is_open else "closed"
        threshold += "" if e.trained else f", {NOT_TRAINED}"
        made.add_row(
            e.name,
            Text(e.cut),
            e.head_kind,
            write.criterion(e.criterion),
            threshold,
            write.percent(e.head_cost),
            write.percent(cost),
        )
    made.add_row("model", "", "", "", "-", "", write.percent(costs[-1]))
    return made


def decisions(fast: CompiledModule) -> list[Table]:
    """A table for each kind of what decides: gates, widths, chains that halt, routes."""
    made = []
    for section in sections(fast):
        made.append(_table(f"{section.count}: {section.about}", *section.columns))
        for entry in section.entries:
            for name, place, state, *cells in entry.rows:
                note = "" if entry.trained else f", {NOT_TRAINED}"
                made[-1].add_row(Text(name), Text(place), f"{state}{note}", *cells)
    return made


def cuts(fast: CompiledModule) -> Table:
    taken = {e.after: e.name for e in fast.program.exits}
    made = _table("cuts: where an exit can be", "cut", "cost before it", "exit", "survives")
    for c in fast.program.structure.cuts:
        survives = "\n".join(write.live(v) for v in c.live)
        # Text, not str: rich would read the brackets of a shape as markup
        made.add_row(Text(c.name), write.percent(c.depth), taken.get(c.after, ""), Text(survives))
    for column in (0, 2, 3):
        made.columns[column].justify = "left"
    return made


def refusals(fast: CompiledModule) -> list[Table]:
    if not fast.program.refusals:
        return []
    made = _table("refused", "places", "rule", "reason")
    every: dict[tuple[str, str], list[str]] = {}
    for r in fast.program.refusals:
        every.setdefault((r.rule, r.reason), []).append(r.node)
    for (rule, reason), nodes in every.items():
        places = ", ".join(nodes[:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
        made.add_row(Text(places), rule, Text(reason))
    for column in made.columns:
        column.justify = "left"
    return [made]


def passes(fast: CompiledModule) -> Table:
    made = _table("passes", "pass", "level", "time", "nodes", "summary")
    for s in fast.history:
        nodes = f"{s.nodes_before} to {s.nodes_after}"
        made.add_row(s.name, s.level, write.seconds(s.seconds), nodes, Text(s.summary))
    made.columns[4].justify = "left"
    return made


def _table(title: str, *columns: str) -> Table:
    made = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i <= 1 else "right", overflow="fold")
    return made
