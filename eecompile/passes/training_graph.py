"""The marked graph for training heads only: no gradient reaches the trunk, whatever its parameters' flags say."""

from __future__ import annotations

import torch
from torch import fx, nn

from eecompile.passes import facts
from eecompile.passes.place_gates import GATES
from eecompile.passes.place_routes import ROUTES
from eecompile.passes.stage import inserted


def frozen_trunk(marked: fx.GraphModule, trunk: set[int]) -> fx.GraphModule:
    """`marked` with every trunk parameter read through `detach`; `requires_grad` of the user's model stays as it is.

    Args:
        trunk: ids of the trunk's parameters.
    """
    gm = facts.copy(marked)
    for n in list(gm.graph.nodes):
        if n.op == "call_module" and not inserted(n) and not str(n.target).startswith((GATES, ROUTES)):  # captured as blocks
            setattr(gm, str(n.target), gm.get_submodule(str(n.target)).freeze())  # type: ignore[operator]
        if n.op != "get_attr" or inserted(n):
            continue
        value = facts.attribute(gm, str(n.target))
        if isinstance(value, nn.Parameter) and id(value) in trunk:
            with gm.graph.inserting_after(n):
                detached = gm.graph.call_function(torch.ops.aten.detach.default, (n,))
            detached.meta["val"] = n.meta.get("val")
            n.replace_all_uses_with(detached, delete_user_cb=lambda u, d=detached: u is not d)
    facts.tidy(gm)
    return gm
