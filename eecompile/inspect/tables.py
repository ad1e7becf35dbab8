"""The program as tables: blocks, exits, gates, halting, routes, cuts, refusals, passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eecompile.inspect import text as write
from eecompile.inspect.outline import Outline
from eecompile.ir.settings import HALTING
from eecompile.runtime.live_settings import NOT_TRAINED

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def tables(fast: CompiledModule, outline: Outline, whole: bool) -> RenderableType:
    """`format="table"`: the level's blocks and, for the whole program, everything else that is known."""
    parts: list[RenderableType] = [blocks(outline)]
    if whole:
        parts += [exits(fast), *gates(fast), *halts(fast), *routes(fast), cuts(fast), *refusals(fast), passes(fast)]
    return Group(*parts)


def blocks(outline: Outline) -> Table:
    level = outline.level
    made = _table(f"{level.name}: {outline.total} nodes, {level.about}", "stage", "block", "kind", "nodes", "cost")
    for part in outline.parts:
        for i, r in enumerate(part.regions):
            made.add_row(part.name if i == 0 else "", Text(r.name), r.kind, str(len(r.nodes)), write.percent(r.share))
    return made


def exits(fast: CompiledModule) -> Table:
    made = _table("exits", "exit", "after", "head", "criterion", "threshold", "head cost", "cost of leaving")
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


def gates(fast: CompiledModule) -> list[Table]:
    """One table, none without gates."""
    if not fast.gates:
        return []
    made = _table("gates", "gate", "region", "kind", "unit", "threshold", "unit cost", "saves when shut")
    for g in fast.gates:
        threshold = "always open" if g.threshold <= 0 else "always shut" if g.threshold > 1 else f"{g.threshold:.4g}"
        threshold += "" if g.trained else f", {NOT_TRAINED}"
        cells = (g.kind, g.head_kind, threshold, write.percent(g.head_cost), write.percent(g.saves))
        made.add_row(g.name, Text(g.region), *cells)
    return [made, *widths(fast)]


def widths(fast: CompiledModule) -> list[Table]:
    """One table, none without widths."""
    if not fast.widths:
        return []
    made = _table("widths", "width", "region", "shares", "channels", "gates", "saves at most")
    for w in fast.widths:
        shares = write.shares(w)
        channels = ", ".join("/".join(map(str, sizes)) for sizes in w.channels)
        made.add_row(w.name, Text(w.region), shares, channels, f"{w.gates[0]} to {w.gates[-1]}", write.percent(w.saves))
    return [made]


def halts(fast: CompiledModule) -> list[Table]:
    """One table, none where nothing halts; with the mean steps that `evaluate` saw last, if it has been called."""
    if not fast.halts:
        return []
    seen = "" if fast.seen.steps is None else f", {fast.seen.steps:.3g} steps in the mean of the rows evaluated"
    untrained = fast.untrained
    made = _table(f"halting{seen}", "step", "block", "unit", "threshold", "cost", "unit cost")
    for h in fast.halts:
        threshold = "never halts" if h.threshold > 1 else f"{h.threshold:.4g}"
        threshold += f", {NOT_TRAINED}" if HALTING in untrained else ""
        for s in h.steps:
            made.add_row(s.name, Text(s.region), s.unit, threshold, write.percent(s.cost), write.percent(s.unit_cost))
    return [made]


def routes(fast: CompiledModule) -> list[Table]:
    """One table, none without a router; with the load that `evaluate` saw last, if it has been called."""
    if not fast.routes:
        return []
    (route,) = fast.program.routes
    untrained = fast.untrained
    where = "" if route.to_exits else f", branches over {route.region}"
    made = _table(f"routes: a router at {route.at}{where}", "route", "to", "margin", "cost", "leaves out", "rows", "right")
    seen = {share["name"]: share for share in fast.seen.routes}
    for r in fast.routes:
        margin = "closed" if not r.is_open else "-" if r.margin is None else f"{r.margin:.4g}"
        margin += f", {NOT_TRAINED}" if r.name in untrained and not route.to_exits else ""
        share = seen.get(r.name)
        load = "-" if share is None else write.percent(share["share"])
        right = "-" if share is None or share["accuracy"] is None else write.percent(share["accuracy"])
        cells = (r.to, margin, write.percent(r.cost), f"{len(r.left_out)} blocks" if r.left_out else "", load, right)
        made.add_row(Text(r.name), *cells)
    return [made]


def cuts(fast: CompiledModule) -> Table:
    taken = {e.after: e.name for e in fast.program.exits}
    made = _table("cuts: where the work can stop", "cut", "before it", "exit", "survives")
    for c in fast.program.cuts:
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
    made = _table("passes", "pass", "level", "time", "nodes", "what")
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
