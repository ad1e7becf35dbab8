"""What can be read off one node of a captured graph: its value, the modules around it, a name that other captures share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import fx

from eecompile.errors import PassError
from eecompile.ir.records import Anchor


def value(node: fx.Node) -> Any:
    """The fake value that was captured for a node."""
    return node.meta.get("val")


def by_name(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    return {n.name: n for n in graph_module.graph.nodes}


def stack(node: fx.Node) -> tuple[tuple[str, int, str], ...]:
    """Modules around a node, outermost first: (path, call, class)."""
    found: tuple[tuple[str, int, str], ...] = node.meta.get("stack", ())
    return found


def target_name(node: fx.Node) -> str:
    """An operator's name; in-place and functional forms count as one, so that captures of both modes agree."""
    name = str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__
    return re.sub(r"_(\.\w+)$", r"\1", name)


def operator_name(node: fx.Node) -> str:
    """Its name without namespace and overload: "conv1d"."""
    return target_name(node).removeprefix("aten.").partition(".")[0]


def anchors(nodes: Iterable[fx.Node]) -> dict[fx.Node, Anchor]:
    """Names for values that hold in every capture of the same model: n-th call of an operator in its module."""
    counts: dict[tuple[str, int, str], int] = {}
    found = {}
    for n in nodes:
        if n.op != "call_function":
            continue
        path, call = stack(n)[-1][:2] if stack(n) else ("", 0)
        key = (path, call, target_name(n))
        counts[key] = counts.get(key, -1) + 1
        found[n] = Anchor(*key, counts[key])
    return found


class Counterparts:
    """Nodes of one capture in another capture of the same model.

    Args:
        graph_module: The other capture.
        what: Whose nodes they are, in messages.
    """

    def __init__(self, graph_module: fx.GraphModule, what: str) -> None:
        self.what, self.names = what, by_name(graph_module)
        self.found = {a: n for n, a in anchors(graph_module.graph.nodes).items()}

    def name(self, anchor: Anchor | None, name: str, where: str) -> str:
        """The name that a node has there; an input of the model has no anchor, and the same name everywhere.

        Raises:
            PassError: It has no counterpart.
        """
        node = self.names.get(name) if anchor is None else self.found.get(anchor)
        if node is None:
            got = str(anchor or name)
            raise PassError(f"a value that {self.what} needs is not in the other capture", where=where, got=got)
        return node.name
