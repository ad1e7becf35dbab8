"""Settings as inputs of lowered graphs: a call uses those that it began with, whatever is set meanwhile."""

from __future__ import annotations

from torch import fx

from eecompile.ir.settings import BUFFERS
from eecompile.passes import facts


def with_settings(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The module with the settings that it reads as leading inputs, and their names; itself where it reads none."""
    read = [n for n in module.graph.nodes if n.op == "get_attr" and n.target in BUFFERS]
    names = tuple(dict.fromkeys(str(n.target) for n in read))
    if not names:
        return module, ()
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in names}
    env: dict[fx.Node, fx.Node] = {}
    for n in module.graph.nodes:
        if n in read:
            env[n] = given[str(n.target)]
            env[n].meta = dict(n.meta)
        else:
            env[n] = graph.node_copy(n, lambda a: env[a])
    return facts.tidy_module_of(module, graph, module.__class__.__name__), names
