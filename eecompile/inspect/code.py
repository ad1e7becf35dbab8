"""The graph as FX code with the module of every line, and the difference between two graphs."""

from __future__ import annotations

import difflib
import operator
import re
from typing import TYPE_CHECKING

from torch import fx

from eecompile.inspect.outline import level
from eecompile.inspect.text import Raw
from eecompile.passes import facts
from eecompile.passes.stage import inserted

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

DIFF_STYLES = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))
CODE_STYLES = (("        #", "dim"), ("class", "bold"), ("    def", "bold"))


def code(fast: CompiledModule, after: str | None = None) -> Raw:
    """`format="code"`: what the graph at a level runs, line for line; submodules are called, not listed."""
    shown = level(fast, after)
    title = f"# {shown.name}: {shown.about}"
    head = f"class {type(shown.graph_module).__name__}(torch.nn.Module):"
    return Raw("\n".join([title, head, *body(shown.graph_module)]), CODE_STYLES)


def diff(fast: CompiledModule, after: str | None = None, context: int = 2) -> Raw:
    """`format="diff"`: the captured graph against a later level, the marked graph unless said otherwise.

    Lines differ where code differs, renumbered values included; statistics that nothing reads are left out.
    """
    old, new = level(fast, "source"), level(fast, after or "marked")
    lines = difflib.unified_diff(
        body(old.graph_module, places=False),
        body(new.graph_module, places=False),
        f"{old.name} ({old.about})",
        f"{new.name} ({new.about})",
        lineterm="",
        n=context,
    )
    text = "\n".join(lines)
    return Raw(text or f"{old.name} and {new.name} are the same graph", DIFF_STYLES)


def body(gm: fx.GraphModule, places: bool = True) -> list[str]:
    """The lines of `forward`, shapes as comments, without the clean-up of variables.

    Args:
        places: Say in a comment where each module begins.
    """
    source = gm.graph.python_code("self", verbose=True).src
    nodes = {n.name: n for n in gm.graph.nodes}
    unused = {n.name for n in gm.graph.nodes if n.op == "get_attr" and not n.users}
    found: list[str] = []
    place = ""
    for line in source.splitlines():
        text = re.sub(r";\s+(\w+ = )+None\s*$", "", line).rstrip()
        stripped = text.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name = re.split(r"[:\s=]", stripped, maxsplit=1)[0]
        if name in unused:
            continue  # statistics that eval mode does not read
        here = _place(nodes.get(name))
        if places and here and here != place:
            found.append(f"        # {here}")
        place = here or place
        found.append(f"    {text}")
    return found


def _place(node: fx.Node | None) -> str:
    if node is None or node.op in ("get_attr", "placeholder", "output"):
        return ""
    if inserted(node):
        mark = node.meta["eecompile"]
        return "inserted: selection" if mark < 0 else f"inserted: exit_{mark}"
    if node.target is operator.getitem:
        return ""
    stack = facts.stack(node)
    return f"{facts.block_name(*stack[-1][:2])} ({stack[-1][2]})" if stack and stack[-1][0] else ""
