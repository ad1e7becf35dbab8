"""Writes a part of the graph again with fewer channels: the same layers on the first rows and columns of their weights.

Weights are sliced, not copied and not masked, so the narrower layers compute less and are trained with the whole ones. A
batch norm sees other numbers at every width, so each width below the full one has norms of its own (Yu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.gates import WidthNorms, norms_at
from eecompile.passes import facts
from eecompile.passes.find_channels import CONVOLUTIONS, VIEWS, Channels, depthwise, layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """A part of the graph with channels that can be left out.

    Attributes:
        nodes: All that it computes, in graph order.
        channels: Its groups of channels.
        y: The value that it hands on.
    """

    gm: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    channels: tuple[Channels, ...]
    y: fx.Node

    def dependent(self) -> list[fx.Node]:
        """Nodes that compute other numbers at another width; the others serve all widths."""
        found = {m for c in self.channels for m in c.makers}
        for n in self.nodes:
            if any(a in found for a in n.all_input_nodes):
                found.add(n)
        return [n for n in self.nodes if n in found]

    def norms(self) -> list[fx.Node]:
        """Batch norms among them."""
        return [n for n in self.dependent() if n.target is aten.batch_norm.default]

    def sizes_of_norms(self, fraction: float) -> list[int]:
        """Channels of each batch norm at a width."""
        found = []
        for n in self.norms():
            own = next((c for c in self.channels if n in c.axes), None)
            found.append(int(facts.value(n).shape[1]) if own is None else own.kept(fraction))
        return found

    def flops(self, flops: Mapping[str, float], fraction: float) -> float:
        """Cost of the part for one row at a width."""
        total = 0.0
        for n in self.nodes:
            cost = flops.get(n.name, 0.0)
            for c in self.channels:
                if cost and (n in c.axes) and (n in c.makers or depthwise(self.gm, n)):
                    cost *= c.kept(fraction) / c.size
                if cost and n in c.readers:
                    cost *= c.kept(fraction) / c.size
            total += cost
        return total


def new_norms(part: Part, fractions: Sequence[float]) -> WidthNorms | None:
    """Norms for the widths below the full one, as those of the whole part; None where it has none."""
    nodes = part.norms()
    if not nodes:
        return None
    norms = WidthNorms([part.sizes_of_norms(f) for f in fractions[:-1]])
    with torch.no_grad():
        for k in range(len(fractions) - 1):
            for n, norm in zip(nodes, norms_at(norms, k), strict=True):
                own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                for a, t in zip(n.args[1:5], own, strict=True):
                    if isinstance(a, fx.Node):
                        t.copy_(facts.attribute(part.gm, str(a.target))[: len(t)])
    return norms


class Narrower:
    """Writes the part at one width.

    Args:
        fraction: Share of the channels of every group.
        norms: Path of the width's own norms, None where it has none.
        tag: Part of the names of the new nodes.
    """

    def __init__(self, part: Part, fraction: float, norms: str | None, tag: str) -> None:
        self.part, self.fraction, self.norms, self.tag = part, fraction, norms, tag
        self.graph = part.gm.graph
        self.axes = {n: (axis, c.kept(fraction)) for c in part.channels for n, axis in c.axes.items()}
        self.makers = {n: c.kept(fraction) for c in part.channels for n in c.makers}
        self.readers = {n: c.kept(fraction) for c in part.channels for n in c.readers}
        self.env: dict[fx.Node, fx.Node] = {}
        self.count = 0

    def write(self) -> fx.Node:
        """Writes all nodes where the graph's insertion point is; gives the part's value."""
        for n in self.part.dependent():
            self.env[n] = self._copy(n)
        return self.env[self.part.y]

    def _copy(self, n: fx.Node) -> fx.Node:
        args: list[Any] = list(fx.node.map_arg(n.args, lambda a: self.env.get(a, a)))
        if n.target is aten.batch_norm.default:
            for k, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
                args[k] = self.graph.get_attr(f"{self.norms}.{self.count}.{name}")
            self.count += 1
        elif n in self.makers or n in self.readers or (n in self.axes and n.target in CONVOLUTIONS):
            self._slice(n, args)
        elif n.target in VIEWS and n in self.axes:
            sizes: Any = args[1]
            args[1] = [*sizes[:-1], self.axes[n][1]]
        kwargs = dict(fx.node.map_arg(n.kwargs, lambda a: self.env.get(a, a)))
        new = self.graph.create_node(n.op, n.target, tuple(args), kwargs, f"{n.name}_{self.tag}")
        new.meta = {key: v for key, v in n.meta.items() if key == "val"}
        new.meta["stack"] = (*facts.stack(n), (self.tag, 0, "width"))  # anchors of the whole part stay as they are
        if n in self.axes:
            axis, kept = self.axes[n]
            new.meta["val"] = _resized(facts.value(n), axis, kept)
        return new

    def _slice(self, n: fx.Node, args: list[Any]) -> None:
        at = layer(self.part.gm, n)
        assert at is not None
        kept = self.makers.get(n)
        if depthwise(self.part.gm, n):
            kept = self.axes[n][1]
            args[6] = kept
        if kept is not None:
            args[at.weight] = self._first(args[at.weight], at.makes, kept)
            if len(args) > at.bias and args[at.bias] is not None:
                args[at.bias] = self._first(args[at.bias], 0, kept)
        if n in self.readers:
            args[at.weight] = self._first(args[at.weight], at.reads, self.readers[n])

    def _first(self, value: fx.Node, axis: int, kept: int) -> fx.Node:
        return self.graph.call_function(aten.slice.Tensor, (value, axis, 0, kept))


def _resized(v: Tensor, axis: int, size: int) -> Any:
    sizes: list[Any] = list(v.shape)
    sizes[axis] = size
    with v.fake_mode:  # type: ignore[attr-defined]
        return v.new_empty(sizes)
