"""Takes the confidence out of a segment where the decision's kernel can compute it: one launch instead of several.

It can for logits `[n, C]` and every criterion of one exit at a time. Predictions per position, and exits that are combined,
have their confidence computed by the segment, and the kernel is given it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import eecompile.ops as ops
from eecompile.capture.tensors import share_tensors
from eecompile.kernels.confidence import CRITERIA
from eecompile.passes import facts
from eecompile.passes.lower import Segment

GIVEN = "given"


@dataclass(frozen=True)
class Decision:
    """How a segment's decision is taken.

    Attributes:
        module: `module(*live, *states)` gives `(result, logits, *states, *leaves, *reports, *live)`.
        criterion: One that `kernels/decide.py` knows; "given" where `logits` is the confidence.
        takes_states: How many states come in after the live values.
        gives_states: How many go out after `logits`.
    """

    module: fx.GraphModule
    criterion: str
    patience: int
    takes_states: int
    gives_states: int


class Sent(nn.Module):
    """The head of an exit that a router sends rows to, for those rows; what the others have is not looked at.

    Args:
        head: `head(*values)` gives `(logits,)`.
        axes: Batch axis of each value.
    """

    def __init__(self, head: fx.GraphModule, exit_index: int, axes: Sequence[int | None]) -> None:
        super().__init__()
        self.head, self.exit, self.axes = head, exit_index, tuple(axes)

    def forward(self, confidence: Tensor, *values: Tensor) -> tuple[Tensor]:
        found: tuple[Tensor] = self.head(*values)
        return found


def with_head(segment: Segment, every_row: bool) -> Segment:
    """A segment that ends where a router sends rows, with the head in it again.

    Args:
        every_row: Whether all rows need what it says: where all leave, or may be stopped.
    """
    if segment.head is None:
        return segment
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in segment.module.graph.nodes:
        if n.op != "output":
            env[n] = graph.node_copy(n, lambda a: env[a])
    confidence, *rest = (env[a] for a in segment.module.graph.output_node().args[0])  # type: ignore[union-attr, index]
    count = len(segment.head_axes)
    rest, values = rest[: len(rest) - count], rest[len(rest) - count :]
    own = {str(n.target) for n in segment.module.graph.nodes if n.op in ("get_attr", "call_module")}
    root = {t: facts.attribute(segment.module, t) for t in own}
    if every_row:
        inner: dict[fx.Node, fx.Node] = dict(zip(facts.placeholders(segment.head), values, strict=True))
        for n in segment.head.graph.nodes:
            if n.op == "output":
                logits = inner[n.args[0][0]]
            elif n.op != "placeholder":
                inner[n] = graph.node_copy(n, lambda a: inner[a])
        used = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")} - own
        root |= {t: facts.attribute(segment.head, t) for t in used}
    else:
        assert segment.exit is not None
        root["sent"] = Sent(segment.head, segment.exit, segment.head_axes)
        logits = graph.call_function(operator.getitem, (graph.call_module("sent", (confidence, *values)), 0))
    graph.output((logits, confidence, *rest))
    module = fx.GraphModule(root, graph, class_name=segment.module.__class__.__name__)
    for source in (segment.module, segment.head):
        share_tensors(module, source)
    facts.tidy(module)
    return replace(segment, module=module, head=None, head_axes=())


def fused(segment: Segment) -> Decision:
    """The decision at the end of a segment, with its confidence in the kernel where that is possible."""
    plain = Decision(segment.module, GIVEN, 1, segment.takes_states, segment.gives_states)
    outputs = list(segment.module.graph.output_node().args[0])  # type: ignore[arg-type]
    call = _confidence(outputs[1])
    if call is None or call.args[2] not in CRITERIA:
        return plain
    scored = call.args[0]
    shape = facts.value(scored) if isinstance(scored, fx.Node) else None
    if not isinstance(shape, Tensor) or shape.ndim != 2:
        return plain
    stateful = call.args[2] == "patience"
    if stateful and (segment.gives_states != 1 or segment.takes_states > 1):  # a combination carries more: it stays together
        return plain
    return _without(segment, call, stateful)


def _confidence(confidence: Any) -> fx.Node | None:
    """The call of `confidence` that a node is the first value of."""
    if not isinstance(confidence, fx.Node) or confidence.target is not operator.getitem or confidence.args[1] != 0:
        return None
    call = confidence.args[0]
    return call if isinstance(call, fx.Node) and call.target is ops.confidence else None


def _without(segment: Segment, call: fx.Node, stateful: bool) -> Decision:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in segment.module.graph.nodes:
        if n.op == "output":
            result, _, *rest = n.args[0]
            rest = rest[segment.gives_states if stateful else 0 :]
            graph.output(tuple(env[a] for a in (result, call.args[0], *rest)))  # type: ignore[index]
        else:
            env[n] = graph.node_copy(n, lambda a: env[a])
    module = _module(segment, graph)
    if stateful and segment.takes_states:  # the kernel keeps it for each row of the batch
        state = [n for n in module.graph.nodes if n.op == "placeholder"][-segment.takes_states]
        module.graph.erase_node(state)
        module.recompile()
    return Decision(
        module,
        str(call.args[2]),
        int(str(call.kwargs.get("patience", 1))),
        0 if stateful else segment.takes_states,
        0 if stateful else segment.gives_states,
    )


def ended(segment: Segment, axis: int) -> Decision:
    """The last segment of a program: every row leaves, with the confidence that the segment computes.

    Args:
        axis: Batch axis of the model's own prediction; that of an exit comes batch first.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in segment.module.graph.nodes:
        if n.op != "output":
            env[n] = graph.node_copy(n, lambda a: env[a])
            continue
        given = [env[a] for a in n.args[0]]
        if segment.exit is not None:  # stopped at an exit: nothing is handed on
            result, confidence = given[:2]
            at = segment.decision
            reported = given[at : at + len(segment.leaves) + len(segment.reports)]
        else:
            confidence, *reported, result = given
            if axis:
                result = graph.call_function(torch.ops.aten.movedim.int, (result, axis, 0))
        graph.output((result, confidence, *reported))
    return Decision(_module(segment, graph), GIVEN, 1, segment.takes_states, 0)


def _module(segment: Segment, graph: fx.Graph) -> fx.GraphModule:
    return facts.tidy_module_of(segment.module, graph, segment.module.__class__.__name__)
