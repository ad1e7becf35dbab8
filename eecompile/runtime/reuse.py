"""Which operators and gated regions of a segment may write over a value that is not needed again.

A captured graph is functional where the model's source was: `relu(norm(x))` allocates twice. Writing the result over the
dying operand moves less memory, and on the CPU it spares the pages that the allocator gives back and takes again, which
on a ResNet-20 at batch 64 are a third of the time. Numbers do not change: the same kernels run, with another target.

A gated region writes what it gives over what goes past it. The open rows alone are written where that value dies there;
else all of it is copied first, which is more than half of a gate's overhead in a ResNet-20, its score excluded.

An operand dies where it was freshly allocated by the operator that made it, has no other user and is no output of the
segment. Inputs, parameters and views of anything are never written to. Only right without gradients: autograd may have
kept the operand.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from eecompile import ops
from eecompile.gates import PolicyGate
from eecompile.passes import facts
from eecompile.passes.partition import Partition

aten = torch.ops.aten
COMMUTE = (aten.add.Tensor, aten.mul.Tensor)
IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.silu.default: aten.silu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}
# Operators whose result is memory of its own, whatever their arguments.
FRESH = frozenset(IN_PLACE) | {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.embedding.default,
    aten.mean.dim,
    aten.pow.Tensor_Scalar,
    aten.softmax.int,
    aten.maximum.default,
    ops.gate,
}


def reusable(module: fx.GraphModule) -> dict[fx.Node, tuple[Any, tuple[Any, ...]]]:
    """For each node that may run in place: the operator, and its arguments with the dying operand first."""
    found = {}
    for n in module.graph.nodes:
        if n.op != "call_function" or n.target not in IN_PLACE:
            continue
        args = tuple(n.args)
        if _dies(n, args[0]):
            found[n] = (IN_PLACE[n.target], args)
        elif n.target in COMMUTE and not n.kwargs and _dies(n, args[1]):
            found[n] = (IN_PLACE[n.target], (args[1], args[0]))
    return found


def overwriting(module: fx.GraphModule) -> set[fx.Node]:
    """The calls of gated regions that may write over what goes past them.

    That is memory of its own, made in this segment by an operator or by such a call, which no output is and which nothing
    reads later, through a view neither. What the region gives must be memory of its own too.
    """
    position = {n: i for i, n in enumerate(module.graph.nodes)}
    policies = {n for n in position if n.op == "call_module" and isinstance(module.get_submodule(str(n.target)), PolicyGate)}
    found: set[fx.Node] = set()
    for n in position:
        region = module.get_submodule(str(n.target)) if n.op == "call_module" else None
        past: tuple[fx.Node, ...] | None = n.args[1] if isinstance(region, Partition) else None
        if past is None or len(set(past)) < len(past):
            continue
        assert isinstance(region, Partition)
        given = [facts.output_leaves(body) for body in region.graphs()]
        if not all(len(set(leaves)) == len(leaves) and all(map(_fresh, leaves)) for leaves in given):
            continue
        if all((_fresh(x) or _of(x, found)) and _last_read(x, n, position, policies) for x in past):
            found.add(n)
    return found


def _fresh(n: fx.Node) -> bool:
    return n.op == "call_function" and n.target in FRESH


def _of(n: fx.Node, calls: set[fx.Node]) -> bool:
    return n.target is operator.getitem and n.args[0] in calls


def _last_read(x: fx.Node, n: fx.Node, position: dict[fx.Node, int], policies: set[fx.Node]) -> bool:
    """Whether nothing after `n` reads `x`; what is not known to be memory of its own, as the scores of policies are, may be
    a view of what it reads."""
    may_be, seen = [x], {x}
    for value in may_be:  # grows
        for user in value.users:
            if position[user] > position[n]:
                return False
            if user is not n and user not in seen and user not in policies and not _fresh(user):
                seen.add(user)
                may_be.append(user)
    return True


def _dies(n: fx.Node, operand: Any) -> bool:
    """Whether `operand` is memory of its own, laid out as the result is, that only `n` reads."""
    if not isinstance(operand, fx.Node) or operand.op != "call_function" or operand.target not in FRESH:
        return False
    if len(operand.users) != 1 or sum(a is operand for a in n.args) != 1:
        return False
    before, after = facts.value(operand), facts.value(n)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    return _layout(before) == _layout(after)


def _layout(t: Tensor) -> tuple[Any, ...]:
    """Sizes and strides, symbolic ones by their expression."""
    return (*map(facts.expression, t.shape), *map(facts.expression, t.stride()))
