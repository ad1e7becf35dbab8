"""The training graph with a prediction for each step, as if every row stopped there (PonderNet, Banino et al. 2021).

No row halts in it. What the model does after the chain is written out once more for every step but the last, on the state
there; modules and parameters are shared. The new outputs are the prediction at each of those steps and, last, the
probabilities of stopping `[B, K]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from eecompile.errors import EecompileError
from eecompile.ir.settings import HALTING_BUFFER
from eecompile.passes import facts
from eecompile.passes.insert_halting import ROLE

STEPS = "eecompile_steps"  # key in the graph module's meta: how many outputs were added
aten = torch.ops.aten


def with_every_step(gm: fx.GraphModule, prediction: int) -> fx.GraphModule:
    """`gm` with a prediction for every step; the graph is its own.

    Args:
        prediction: Index of the output with the model's own prediction.

    Raises:
        EecompileError: No chain of steps leads to the prediction, or more than one.
    """
    new = facts.copy(gm)
    graph = new.graph
    (end,) = [n for n in graph.nodes if n.op == "output"]
    own = list(end.args[0])
    found: dict[str, list[fx.Node]] = {"score": [], "state": [], "output": []}
    for n in graph.nodes:
        if ROLE in n.meta:
            found[n.meta[ROLE][0]].append(n)
    for nodes in found.values():
        nodes.sort(key=lambda n: int(n.meta[ROLE][1]))
    if len(found["output"]) != 1:
        raise EecompileError(
            "probabilities of stopping are trained in one chain at a time",
            got=f"{len(found['output'])} chains that halt",
            wanted="one",
        )
    for n in [n for n in graph.nodes if n.op == "get_attr" and n.target == HALTING_BUFFER]:
        with graph.inserting_after(n):
            never = graph.call_function(aten.zeros_like.default, (n,))
        n.replace_all_uses_with(never, delete_user_cb=lambda u, new=never: u is not new)
    added = [_again(graph, end, own[prediction], found["output"][0], state) for state in found["state"][:-1]]
    with graph.inserting_before(end):
        scores = graph.call_function(aten.stack.default, (found["score"], 1))
    end.args = ((*own, *added, scores),)
    new.meta[STEPS] = len(added) + 1
    graph.lint()
    new.recompile()
    return new


def _again(graph: fx.Graph, end: fx.Node, prediction: fx.Node, value: fx.Node, state: fx.Node) -> fx.Node:
    """What lies between `value` and `prediction` once more, on `state`."""
    env = {value: state}
    needed = facts.needed_for([prediction])
    for n in list(graph.nodes):
        if n in needed and n not in env and any(a in env for a in n.all_input_nodes):
            with graph.inserting_before(end):
                env[n] = graph.node_copy(n, lambda a: env.get(a, a))
    if prediction not in env:
        raise EecompileError("the chain that halts does not lead to the prediction", where=value.name)
    return env[prediction]


def split_off(gm: fx.GraphModule, results: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
    """What the graph gave without the outputs that were added, the predictions at every step but the last, and the
    probabilities of stopping; nothing and None where none were added."""
    count = gm.meta.get(STEPS, 0)
    if not count:
        return list(results), (), None
    return list(results[:-count]), tuple(results[-count:-1]), results[-1]
