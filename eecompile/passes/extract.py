"""Extracts a part of a graph as a module of its own, so that it runs on fewer rows than the graph was traced with.

Sizes are the trap: a number computed from the whole batch must not reach a part that runs on the survivors. Every
symbolic size is read again from one of the part's own inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from eecompile.errors import PassError
from eecompile.passes import facts

aten = torch.ops.aten


class Extractor:
    """Copies nodes of `source` into a new graph."""

    def __init__(self, source: fx.GraphModule) -> None:
        self.source = source
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.modules: dict[str, nn.Module] = {}  # submodules that `source` does not have

    def placeholder(self, node: fx.Node) -> fx.Node:
        """Makes `node`'s value an input of the part."""
        new = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        self.env[node] = new
        self.inputs.append(node)
        return new

    def copy(self, node: fx.Node) -> fx.Node:
        """Copies one node; its arguments must be there, or be attributes or sizes."""
        if node not in self.env:
            self.env[node] = self.graph.node_copy(node, self.resolve)
        return self.env[node]

    def copy_unless_outer(self, node: fx.Node) -> None:
        """Copies a computation; a size of something outside is read again where it is needed."""
        if node.op in ("placeholder", "output", "get_attr") or node in self.env:
            return
        if facts.is_symbolic_number(node) and any(a not in self.env and a.op != "get_attr" for a in node.all_input_nodes):
            return
        self.copy(node)

    def item(self, call: fx.Node, k: int, node: fx.Node) -> fx.Node:
        """Value k of a submodule's tuple, named and described as `node` of the source."""
        new = self.graph.call_function(operator.getitem, (call, k))
        new._rename(node.name)
        new.meta = {key: v for key, v in node.meta.items() if key in ("val", "stack")}
        return new

    def resolve(self, node: fx.Node) -> fx.Node:
        """The value of `node` inside the part.

        Raises:
            PassError: It is neither an input of the part nor computed in it.
        """
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            return self.copy(node)
        if facts.is_symbolic_number(node):
            read = self._read_size(node)
            if read is None:
                read = self.graph.node_copy(node, self.resolve)
            self.env[node] = read
            return read
        raise PassError(
            "a value is needed after a cut that does not carry it",
            where=node.name,
            got=", ".join(n.name for n in self.inputs),
            hint="this is a bug in find_cuts: the live set of the cut is incomplete",
        )

    def _read_size(self, node: fx.Node) -> fx.Node | None:
        wanted = facts.expression(facts.value(node))
        for tensor in self.inputs:
            for axis, size in enumerate(facts.shape(tensor)):
                if size == wanted:
                    new = self.graph.call_function(aten.sym_size.int, (self.env[tensor], axis))
                    new.meta = dict(node.meta)
                    return new
        return None

    def finish(self, outputs: Sequence[Any], name: str) -> fx.GraphModule:
        """Closes the graph with a flat tuple of outputs."""
        self.graph.output(tuple(outputs))
        return facts.tidy_module_of(self.source, self.graph, name, self.modules)


def extract(
    source: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    name: str,
    instead: Mapping[fx.Node, fx.Node] | None = None,
) -> fx.GraphModule:
    """`nodes` of `source` as a module from `inputs` to `outputs`; parameters stay shared.

    Args:
        instead: Nodes that take the value of another one.
    """
    part = Extractor(source)
    for n in inputs:
        part.placeholder(n)
    for n in nodes:
        if instead and n in instead:
            part.env[n] = part.resolve(instead[n])
        else:
            part.copy_unless_outer(n)
    return part.finish([part.resolve(n) for n in outputs], name)
