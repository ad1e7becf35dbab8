"""Parts of a forward under `torch.no_grad()`: torch.export makes each one opaque node, in which no exit has a place.

They are written in line. A part without gradients keeps them out: what it gives to the rest is detached; in a graph for
training what it reads is detached too, parameters included, so that a head within does not train them.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_grad_regions(module: fx.GraphModule, training: bool = False) -> None:
    """Writes every region of the graph in line, regions within regions too."""
    graph, found = module.graph, False
    while regions := graph.find_nodes(op="call_function", target=_REGION):
        for node in regions:
            _inline(module, node, training)
        found = True
    if found:
        module.recompile()


def _inline(module: fx.GraphModule, node: fx.Node, training: bool) -> None:
    graph = module.graph
    enabled, body, *operands = node.args
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    for k in inner.graph.find_nodes(op="get_attr"):  # the body of a region within
        if isinstance(part := inner.get_submodule(str(k.target)), fx.GraphModule):
            k.target = f"{body.target}_{k.target}"
            module.add_submodule(k.target, part)
    with graph.inserting_before(node):

        def detached(value: Any) -> fx.Node:
            out = graph.call_function(torch.ops.aten.detach.default, (value,))
            out.meta = {k: v for k, v in value.meta.items() if k != "stack"}
            return out

        read = [detached(v) if training and not enabled and _floats(v) else v for v in operands]
        env = dict(zip(inner.graph.find_nodes(op="placeholder"), read, strict=True))
        result = graph.graph_copy(inner.graph, env)
        values: list[Any] = list(result if isinstance(result, tuple | list) else (result,))
        if not enabled:
            values = [detached(v) if _floats(v) else v for v in values]
    for use in list(node.users):
        assert use.target is operator.getitem
        use.replace_all_uses_with(values[cast(int, use.args[1])])
        graph.erase_node(use)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _floats(value: object) -> bool:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, torch.Tensor) and (found.is_floating_point() or found.is_complex())
