"""The marked graph as it is trained: heads alone, without gradients in the trunk whatever its flags say, or all of it."""

from __future__ import annotations

import torch
from torch import fx, nn

from eecompile.capture.memory import written
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
    read_copies(gm)
    facts.tidy(gm)
    return gm


def read_copies(gm: fx.GraphModule) -> None:
    """What was inserted reads copies of values that the model overwrites later: autograd keeps what a head has read."""
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    last_write: dict[fx.Node, int] = {}
    for n in position:
        for w in written(n):
            last_write[facts.memory(w)] = position[n]
    for n in position:
        if n.op != "call_module" and not str(n.target).startswith("eecompile."):
            continue
        for read in dict.fromkeys(n.all_input_nodes):
            if last_write.get(facts.memory(read), -1) > position[n]:
                with gm.graph.inserting_before(n):
                    copied = gm.graph.call_function(torch.ops.aten.clone.default, (read,))
                copied.meta = dict(read.meta)
                n.replace_input_with(read, copied)
