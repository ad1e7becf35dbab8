"""Shows a compiled module: as a tree, tables, code, a diff, a drawing or JSON, at any level of its history.

`print(fast)` uses the tree: importing this package makes it the renderer of `fast.explain()`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from eecompile.errors import check_name
from eecompile.explain import Explanation, explain
from eecompile.inspect.code import code, diff
from eecompile.inspect.graphs import dot, mermaid
from eecompile.inspect.outline import Outline, levels, outline
from eecompile.inspect.tables import tables
from eecompile.inspect.text import Raw, written
from eecompile.inspect.tree import ProgramTree
from eecompile.inspect.why import Departure, Departures, where
from eecompile.passes import facts
from eecompile.passes.stage import inserted
from eecompile.training.report import json_safe

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

FORMATS = ("tree", "table", "code", "diff", "dot", "mermaid", "json")


def render(fast: CompiledModule, format: str = "tree", after: str | None = None) -> RenderableType:
    """A compiled module for a rich console.

    Args:
        fast: The compiled module.
        format: One of `FORMATS`.
        after: Name of a pass in `fast.history`, or "source", "marked", "staged". None: the program as it
            runs, with everything that is known about it (for "diff": the marked graph against the source).

    Raises:
        EecompileError: Unknown format or level; the message lists the valid ones.
    """
    check_name("format", format, FORMATS)
    if format == "code":
        return code(fast, after)
    if format == "diff":
        return diff(fast, after)
    if format == "json":
        return Raw(json.dumps(to_dict(fast, after), indent=2, allow_nan=False))
    found = outline(fast, after, collapse=format != "table")
    if format == "tree":
        return ProgramTree(fast, found, after is None)
    if format == "table":
        return tables(fast, found, after is None)
    return dot(fast, found) if format == "dot" else mermaid(fast, found)


def to_text(
    fast: CompiledModule, format: str = "tree", after: str | None = None, *, width: int = 110, ascii_only: bool = False
) -> str:
    """`render` as plain text without colour, `ascii_only` for outputs that take no Unicode."""
    return written(render(fast, format, after), width, ascii_only)


def to_dict(fast: CompiledModule, after: str | None = None) -> dict[str, Any]:
    """`format="json"` as a dict: the explanation of the program, or the nodes and blocks of one level."""
    found = outline(fast, after, collapse=False)
    data: dict[str, Any] = {} if after is not None else explain(fast).to_dict()
    data["level"] = {"name": found.level.name, "about": found.level.about, "nodes": found.total}
    data["parts"] = [
        {
            "name": p.name,
            "exit": p.exit,
            "share": p.share,
            "regions": [{"name": r.name, "kind": r.kind, "share": r.share, "nodes": list(r.nodes)} for r in p.regions],
        }
        for p in found.parts
    ]
    data["graph"] = [_node(n) for n in found.level.graph_module.graph.nodes]
    safe: dict[str, Any] = json_safe(data)
    return safe


def _node(n: Any) -> dict[str, Any]:
    stack = facts.stack(n)
    value = facts.value(n)
    return {
        "name": n.name,
        "op": n.op,
        "target": facts.target_name(n) if n.op == "call_function" else str(n.target),
        "inputs": [a.name for a in n.all_input_nodes],
        "module": stack[-1][0] if stack else "",
        "shape": [str(s) for s in value.shape] if facts.is_tensor(n) else None,
        "inserted": inserted(n),
    }


def _explained(explanation: Explanation) -> RenderableType:
    return render(explanation.fast)


Explanation.renderer = _explained

__all__ = [
    "FORMATS",
    "Departure",
    "Departures",
    "Outline",
    "explain",
    "levels",
    "outline",
    "render",
    "to_dict",
    "to_text",
    "where",
]
