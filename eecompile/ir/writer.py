"""The writer that every insertion uses: new nodes with names and values, what they replace, and where cuts are then."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from eecompile.ir.functional import make_functional
from eecompile.ir.graph import by_name, value
from eecompile.ir.records import Cut, Refusal


@dataclass(frozen=True)
class Span:
    """A part of the graph as it was that runs on some rows only: a cut inside it is refused.

    Attributes:
        start: Position of its first node; `stop` that of its value, where a cut may lie.
        reason: Why there is no cut.
        between: Values inside that may be cut at all the same, and the node that such a cut then lies after.
    """

    start: int
    stop: int
    reason: str
    between: Mapping[str, str] = field(default_factory=dict)


class GraphWriter:
    """Writes nodes into a graph, each after the one before: after `at`. `nodes`, `names` and `position` are those of the
    graph as it was.

    Args:
        graph_module: It is changed in place.
        stack: Modules that new nodes count as a part of; so the model's own calls are counted as before.
    """

    def __init__(self, graph_module: fx.GraphModule, stack: tuple[tuple[str, int, str], ...] = ()) -> None:
        self.gm, self.graph, self.stack = graph_module, graph_module.graph, stack
        self.nodes = list(self.graph.nodes)
        self.names = by_name(graph_module)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.first, self.last_input = next(n for n in self.nodes if n.op != "placeholder"), inputs[-1]
        self.at = self.last_input
        self.mode = next((v.fake_mode for n in inputs if isinstance(v := value(n), FakeTensor)), None)
        self.written: set[fx.Node] = set()
        self.swap: dict[str, fx.Node] = {}
        self.spans: list[Span] = []

    # ------------------------------------------------------------------ new nodes

    def note(self, node: fx.Node, name: str, val: Any = None) -> fx.Node:
        """Names a new node, which the next one follows.

        Args:
            val: Its fake value, None where it is not needed.
        """
        node._rename(name)
        if val is not None:
            node.meta["val"] = val
        if self.stack:
            node.meta["stack"] = self.stack
        self.written.add(node)
        self.at = node
        return node

    def setting(self, buffer: str, name: str) -> fx.Node:
        """Reads a tensor of the settings, before all else."""
        with self.graph.inserting_before(self.first):
            node = self.graph.get_attr(buffer)
        there: torch.Tensor = getattr(self.gm, buffer)
        val = None
        if self.mode is not None:
            with self.mode:
                val = torch.empty(there.shape, dtype=there.dtype, device=there.device)
        return self.note(node, name, val)

    def attribute(self, target: str, name: str) -> fx.Node:
        with self.graph.inserting_after(self.at):
            return self.note(self.graph.get_attr(target), name)

    def call(self, name: str, target: Any, *args: Any) -> fx.Node:
        """Calls an operator; its value is what it gives on fake tensors."""
        assert self.mode is not None
        with self.mode:
            val = target(*fx.node.map_arg(args, value))
        return self.call_like(name, val, target, *args)

    def call_like(self, name: str, val: Any, target: Any, *args: Any, **options: Any) -> fx.Node:
        """Calls an operator with a value that is known."""
        with self.graph.inserting_after(self.at):
            return self.note(self.graph.call_function(target, args, options), name, val)

    def module(self, name: str, target: str, args: tuple[Any, ...], val: Any = None) -> fx.Node:
        with self.graph.inserting_after(self.at):
            return self.note(self.graph.call_module(target, args), name, val)

    def item(self, name: str, source: fx.Node, k: int) -> fx.Node:
        """Value k of several."""
        val = value(source)
        return self.call_like(name, None if val is None else val[k], operator.getitem, source, k)

    def choose(self, name: str, index: fx.Node, values: Sequence[fx.Node], axis: int) -> fx.Node:
        """Each row from one of several values, the last of which is the model's own: see `kernels/choose.py`."""
        node = self.call_like(name, value(values[-1]), torch.ops.eecompile.choose.default, index, list(values), axis)
        if "stack" in values[-1].meta:
            node.meta["stack"] = values[-1].meta["stack"]
        return node

    def empty(self, like: fx.Node, sizes: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
        """A fake tensor of other sizes."""
        v = value(like)
        with v.fake_mode:
            return v.new_empty(tuple(sizes), dtype=dtype or v.dtype)

    def add_modules(self, container: str, modules: Mapping[str, nn.Module]) -> None:
        """Adds modules to those of a submodule."""
        add_modules(self.gm, container, modules)

    # ------------------------------------------------------------------ what they replace

    def keep(self, *reads: fx.Node) -> None:
        """Values that are read later, or handed on as they are: nothing overwrites them."""
        for read in reads:
            make_functional(read, self.position)

    def now(self, name: str) -> fx.Node:
        """What stands for a node of the graph as it was."""
        return self.swap.get(name, self.names[name])

    def replace(self, y: fx.Node, node: fx.Node) -> None:
        """What the model reads of y is `node` from now on."""
        if node is not y:
            y.replace_all_uses_with(node, delete_user_cb=lambda u: u not in self.written)
            self.keep(node)
            self.swap[y.name] = node

    def finish(self) -> None:
        """Checks the graph. It is not tidied: nothing reads what will be reported yet."""
        self.graph.lint()
        self.gm.recompile()

    def moved_cuts(self, cuts: Iterable[Cut], rule: str) -> tuple[tuple[Cut, ...], tuple[Refusal, ...]]:
        """The cuts with new values in place of those that they replace; cuts inside spans are refused."""
        at = {n.name: i for n, i in self.position.items()}
        new = {old: node.name for old, node in self.swap.items()}
        kept, refusals = [], []
        for cut in cuts:
            after = new.get(cut.after, cut.after)
            span = next((s for s in self.spans if s.start <= at[cut.after] < s.stop), None)
            if span is not None and cut.value not in span.between:
                refusals.append(Refusal(cut.name, rule, span.reason))
                continue
            if span is not None and at[cut.after] <= at[cut.value]:
                after = span.between[cut.value]
            live = tuple(replace(v, node=new.get(v.node, v.node)) for v in cut.live)
            kept.append(replace(cut, after=after, value=new.get(cut.value, cut.value), live=live))
        return tuple(kept), tuple(refusals)


def add_modules(graph_module: fx.GraphModule, container: str, modules: Mapping[str, nn.Module]) -> None:
    """Adds modules to those of a graph module's submodule, which is made where there is none."""
    found, new = getattr(graph_module, container, nn.Module()), nn.Module()
    for name, module in {**dict(found.named_children()), **modules}.items():
        new.add_module(name, module)
    graph_module.add_module(container, new)
