"""Takes a part of a graph out as a module of its own, so that it runs on fewer rows than the graph was traced with.

Sizes are the trap: a number computed from the whole batch must not reach a part that runs on the survivors. Every
symbolic size is read again from one of the part's own inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

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
            "a value is needed behind a cut that does not carry it",
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
        module = fx.GraphModule(self.source, self.graph, class_name=name)
        facts.tidy(module)
        return module


def extract(
    source: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    name: str,
) -> fx.GraphModule:
    """`nodes` of `source` as a module from `inputs` to `outputs`; parameters stay shared."""
    part = Extractor(source)
    for n in inputs:
        part.placeholder(n)
    for n in nodes:
        if n.op in ("placeholder", "output", "get_attr") or n in part.env:
            continue
        if facts.is_symbolic_number(n) and any(a not in part.env and a.op != "get_attr" for a in n.all_input_nodes):
            continue  # a size of something outside: read again by whoever needs it
        part.copy(n)
    return part.finish([part.resolve(n) for n in outputs], name)
