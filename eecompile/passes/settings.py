"""What decides inside a graph and can be set later: thresholds of gates, margins of routes, the scale of halting scores, the
temperatures of exits.

Setting one puts another tensor in its place. A lowered graph does not look it up but is handed it, so that a call goes by
those that it has begun with, to its end, whatever another thread sets meanwhile.
"""

from __future__ import annotations

from torch import Tensor, fx

from eecompile.passes import facts
from eecompile.passes.insert_exits import TEMPERATURES
from eecompile.passes.insert_gates import GATE_THRESHOLDS
from eecompile.passes.insert_halting import HALT_SCALE
from eecompile.passes.insert_routes import ROUTE_MARGINS

SETTINGS = (TEMPERATURES, GATE_THRESHOLDS, HALT_SCALE, ROUTE_MARGINS)


def settings_of(marked: fx.GraphModule | None) -> dict[str, Tensor]:
    """The tensors as they are now, by name; those that the graph has."""
    return {name: t for name in SETTINGS if isinstance(t := getattr(marked, name, None), Tensor)}


def with_settings(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The module with the settings that it reads as leading inputs, and their names; itself where it reads none."""
    read = [n for n in module.graph.nodes if n.op == "get_attr" and n.target in SETTINGS]
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
    new = fx.GraphModule(module, graph, class_name=module.__class__.__name__)
    facts.tidy(new)
    return new, names
