"""Which memory a value of a graph is, and what a graph writes to that is not its own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def memory(node: fx.Node) -> fx.Node:
    """The node whose memory a value is a view of: itself where it is none."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            viewed: Any = node.args[0]
        elif isinstance(node.target, torch._ops.OpOverload):
            arguments = node.target._schema.arguments
            given = dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
            viewed = next((given.get(a.name) for a in arguments if a.alias_info is not None), None)
        else:
            return node
        if not isinstance(viewed, fx.Node):
            return node
        node = viewed
    return node


def written(node: fx.Node) -> list[fx.Node]:
    """The values that an in-place operator writes to; none of any other node."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    found = [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [w for w in found if isinstance(w, fx.Node)]


def written_attributes(graph_module: fx.GraphModule) -> list[str]:
    """Names of the parameters and buffers that a graph writes to, each once."""
    roots = [memory(w) for n in graph_module.graph.nodes for w in written(n)]
    return list(dict.fromkeys(str(r.target) for r in roots if r.op == "get_attr"))
