"""Groups of channels inside a part of the graph that can be left out from the last one on: those of a slimmable network.

A group begins at one or more layers that make the channels (a linear layer, a convolution), goes through operators that
treat each channel by itself (activations, batch norm, depthwise convolutions, the product of a gated MLP), and ends at
the layers that read them. Nothing else may read them: with the first k channels alone, the layers at both ends have k rows
or columns of their weights less to do (Yu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from eecompile.passes import facts

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (aten.linear.default, aten.addmm.default, *CONVOLUTIONS)
POINTWISE = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "elu", "leaky_relu", "mish",
    "softplus", "relu6", "selu", "celu", "dropout", "clone", "contiguous", "to", "clamp", "pow", "square", "neg", "exp",
    "erf", "detach", "alias", "_to_copy", "mul", "add", "sub", "div", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
)  # fmt: skip
VIEWS = (aten.view.default, aten.reshape.default)


@dataclass(eq=False)
class Channels:
    """One group of channels.

    Attributes:
        size: How many there are.
        makers: Layers that make them.
        readers: Layers that read them.
        axes: The axis of the channels in every value of the group, counted from the front; makers included.
    """

    size: int
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    axes: dict[fx.Node, int] = field(default_factory=dict)

    def kept(self, fraction: float) -> int:
        """How many of the channels a width keeps: at least one."""
        return max(1, round(self.size * fraction))

    @property
    def name(self) -> str:
        """Module paths of its layers, for people."""
        return f"{_path(self.makers[0])} to {_path(self.readers[0])}"


def find_channels(gm: fx.GraphModule, nodes: Sequence[fx.Node], ends: Iterable[fx.Node] = ()) -> tuple[list[Channels], str]:
    """All groups that lie within `nodes`, in graph order, and why the first layer without one has none.

    Args:
        ends: Values that are read outside of `nodes`.
    """
    within, given = set(nodes), set(ends)
    groups: list[Channels] = []
    reason = ""
    done: set[fx.Node] = set()
    for n in nodes:
        if n in done or _made(gm, n) is None:
            continue
        found = _group(gm, n, within, given)
        if isinstance(found, Channels):
            groups.append(found)
            done.update(found.makers)
        else:
            reason = reason or found
    return groups, reason or "it has no linear layer or convolution"


def _group(gm: fx.GraphModule, first: fx.Node, within: set[fx.Node], ends: set[fx.Node]) -> Channels | str:
    made = _made(gm, first)
    assert made is not None
    group = Channels(made[0])
    todo = [(first, made[1])]
    while todo:
        n, axis = todo.pop()
        if group.axes.get(n) == axis:
            continue
        if reason := _unfit(group, n, axis, within, ends):
            return reason.format(name=n.name, first=first.name)
        group.axes[n] = axis
        own = _made(gm, n)
        if own is not None and not depthwise(gm, n):
            if own != (group.size, axis):
                return f"{n.name} makes other channels than {first.name}"
            group.makers.append(n)
        else:  # what it reads must have the channels too, so that all of them are narrowed
            for a in _operands(n):
                if facts.is_tensor(a) and _has_channels(a, n, axis):
                    if a.op in ("get_attr", "placeholder"):
                        return f"{n.name} combines the channels of {first.name} with {a.name}"
                    todo.append((a, axis + facts.value(a).ndim - facts.value(n).ndim))
        for user in n.users:
            follow = _follow(gm, n, user, axis)
            if isinstance(follow, str):
                return f"{user.name} reads the channels of {first.name}: {follow}"
            if follow is not None:
                todo.append((user, follow[0]))
            elif user not in group.readers:
                group.readers.append(user)
    if not group.readers or any(r not in within for r in group.readers):
        return f"no layer of the part reads the channels of {first.name}"
    if any(r in group.axes for r in group.readers):
        return f"the channels of {first.name} come back to where they are made"
    order = {n: i for i, n in enumerate(first.graph.nodes)}
    group.makers.sort(key=order.__getitem__)
    group.readers.sort(key=order.__getitem__)
    return group


def _unfit(group: Channels, n: fx.Node, axis: int, within: set[fx.Node], ends: set[fx.Node]) -> str:
    """Why a value cannot have its channels on `axis` narrowed, with names to fill in; empty where it can."""
    if n in group.axes:
        return "{name} has the channels of {first} on two axes"
    if n not in within:
        return "{name}, which has the channels of {first}, lies outside of the part"
    if n in ends:
        return "the channels of {first} are what the part hands on"
    if not facts.is_tensor(n) or facts.value(n).shape[axis] != group.size:
        return "{name} is no value with the channels of {first}"
    return ""


def _made(gm: fx.GraphModule, n: fx.Node) -> tuple[int, int] | None:
    """How many channels a layer makes and on which axis; None for other nodes, or where its weights are not parameters."""
    if n.op != "call_function" or n.target not in LAYERS or not facts.is_tensor(n):
        return None
    at = layer(gm, n)
    if at is None or (at.groups != 1 and not depthwise(gm, n)):
        return None
    return at.out, 1 if n.target in CONVOLUTIONS else facts.value(n).ndim - 1


@dataclass(frozen=True)
class Layer:
    """A layer's weight and bias as arguments of its node.

    Attributes:
        weight: Index of the weight among the arguments; `bias` likewise.
        makes: Axis of the weight with the channels that it makes, `reads` with those that it reads.
    """

    weight: int
    bias: int
    makes: int
    reads: int
    out: int
    groups: int = 1


def layer(gm: fx.GraphModule, n: fx.Node) -> Layer | None:
    """Weight and bias of a layer; None where they are computed, or it is none."""
    if n.kwargs or n.target not in LAYERS:
        return None
    weight, bias, makes = (2, 0, 1) if n.target is aten.addmm.default else (1, 2, 0)
    given = [n.args[weight], n.args[bias] if len(n.args) > bias else None]
    if not all(a is None or (isinstance(a, fx.Node) and a.op == "get_attr") for a in given) or given[0] is None:
        return None
    shape = facts.attribute(gm, str(given[0].target)).shape  # type: ignore[union-attr]
    groups: Any = n.args[6] if n.target in CONVOLUTIONS and len(n.args) > 6 else 1
    return Layer(weight, bias, makes, 1 - makes, int(shape[makes]), groups)


def depthwise(gm: fx.GraphModule, n: fx.Node) -> bool:
    """Whether a convolution treats each channel by itself."""
    at = layer(gm, n) if n.target in CONVOLUTIONS else None
    return at is not None and 1 < at.groups == at.out == facts.value(n.args[0]).shape[1]  # type: ignore[arg-type]


def _operands(n: fx.Node) -> list[fx.Node]:
    """Values that an operator of a group combines channel by channel; of a batch norm or convolution its input alone."""
    if n.target is aten.batch_norm.default or n.target in CONVOLUTIONS:
        return [n.args[0]]  # type: ignore[list-item]
    return n.all_input_nodes


def _has_channels(a: fx.Node, n: fx.Node, axis: int) -> bool:
    """Whether an operand of `n` varies along its channels, rather than being broadcast over them."""
    at = axis + facts.value(a).ndim - facts.value(n).ndim
    return n.target in VIEWS or (at >= 0 and facts.value(a).shape[at] != 1)


def _follow(gm: fx.GraphModule, n: fx.Node, user: fx.Node, axis: int) -> tuple[int] | str | None:
    """Where the channels of `n` are in `user`, None where it is a layer that reads them, else why they end there."""
    if user.op != "call_function":
        return "it is no operator"
    if user.target in LAYERS:
        source = 1 if user.target is aten.addmm.default else 0
        at = layer(gm, user)
        if at is None or user.args[source] is not n or sum(a is n for a in user.all_input_nodes) != 1:
            return "its weights are not parameters"
        if axis != (1 if user.target in CONVOLUTIONS else facts.value(n).ndim - 1):
            return "along another axis"
        if depthwise(gm, user):
            return (1,)
        return None if at.groups == 1 else f"a convolution of {at.groups} groups"
    if user.target is aten.batch_norm.default:
        plain = user.args[0] is n and axis == 1 and user.args[3] is not None and user.args[4] is not None
        return (1,) if plain else "a batch norm without statistics, or along another axis"
    if user.target in VIEWS:
        return _view(n, user, axis)
    name = facts.operator_name(user)
    if name in ("pad", "constant_pad_nd") and 2 * (facts.value(n).ndim - axis) > len(user.args[1]):  # type: ignore[arg-type]
        return (axis,)
    if name in POINTWISE and facts.is_tensor(user):
        return (axis + facts.value(user).ndim - facts.value(n).ndim,)
    return f"{name} is not pointwise"


def _view(n: fx.Node, user: fx.Node, axis: int) -> tuple[int] | str:
    """A view that only folds or unfolds the axes before the channels, which are the last."""
    sizes: Any = user.args[1]
    before, after = facts.value(n), facts.value(user)
    last = axis == before.ndim - 1 and isinstance(sizes[-1], int) and sizes[-1] in (before.shape[-1], -1)
    return (after.ndim - 1,) if last and after.shape[-1] == before.shape[-1] else "a view that divides them"


def _path(n: fx.Node) -> str:
    return facts.stack(n)[-1][0] if facts.stack(n) else n.name
