"""Facts of a captured graph: symbolic shapes, batch axes, module paths, last uses, anchors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from eecompile.capture.axes import counts_rows
from eecompile.capture.memory import memory as memory
from eecompile.capture.tensors import share_tensors
from eecompile.errors import PassError
from eecompile.ir.graph import anchors as anchors
from eecompile.ir.graph import by_name as by_name
from eecompile.ir.graph import operator_name as operator_name
from eecompile.ir.graph import stack as stack
from eecompile.ir.graph import target_name as target_name
from eecompile.ir.graph import value as value
from eecompile.ir.records import Anchor, Live
from eecompile.program import Program
from eecompile.signature import Signature

aten = torch.ops.aten


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def device_of(module: torch.nn.Module) -> torch.device:
    """Where its parameters are; the CPU where there are none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_symbolic_number(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt | torch.SymFloat | torch.SymBool)


def shape(node: fx.Node) -> tuple[sympy.Expr, ...]:
    v = value(node)
    return tuple(expression(d) for d in v.shape) if isinstance(v, torch.Tensor) else ()


class Batch:
    """The batch symbol of a graph and how values carry it."""

    def __init__(self, graph_module: fx.GraphModule, signature: Signature) -> None:
        self.names: dict[sympy.Expr, str] = {}
        symbol: sympy.Expr | None = None
        for node, leaf in zip(placeholders(graph_module), signature.inputs, strict=True):
            for d, name in zip(shape(node), leaf.shape, strict=False):
                if isinstance(name, str) and d.is_Symbol:
                    self.names.setdefault(d, name)
                    if name == "batch":
                        symbol = d
        if symbol is None:
            raise PassError("the graph has no batch symbol", hint="capture it with a free batch axis")
        self.symbol = symbol

    def axis(self, node: fx.Node) -> int | str | None:
        """The batch axis of a value, None without one, or why it has no single one."""
        hits = [(i, e) for i, e in enumerate(shape(node)) if self.symbol in e.free_symbols]
        if not hits:
            return None
        if len(hits) > 1:
            return f"carries the batch on {len(hits)} axes"
        i, e = hits[0]
        return i if self.counts_rows(e) else f"folds the batch into axis {i} (size {self.text(e)})"

    def counts_rows(self, e: sympy.Expr) -> bool:
        """Whether a size is the batch."""
        return counts_rows(e, self.symbol)

    def carries(self, node: fx.Node) -> bool:
        return any(self.symbol in e.free_symbols for e in shape(node))

    def text(self, e: sympy.Expr) -> str | int:
        if self.symbol in e.free_symbols and self.counts_rows(e):
            e = self.symbol
        return int(e) if e.is_Integer else str(e.subs({s: sympy.Symbol(n) for s, n in self.names.items()}))

    def sizes(self, node: fx.Node) -> tuple[int | str, ...]:
        return tuple(self.text(e) for e in shape(node))

    def live(self, node: fx.Node, trunk: bool) -> Live:
        axis = self.axis(node)
        if isinstance(axis, str):
            raise PassError("this value cannot cross a cut", where=node.name, got=axis)
        dtype = str(value(node).dtype).removeprefix("torch.")
        return Live(node.name, axis, self.sizes(node), dtype, trunk)


class View:
    """A program's graph in execution order, with what searches ask for again and again computed once."""

    def __init__(self, program: Program) -> None:
        self.program, self.gm = program, program.graph_module
        self.nodes: list[fx.Node] = list(self.gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.names = by_name(self.gm)

    @cached_property
    def batch(self) -> Batch:
        return Batch(self.gm, self.program.signature)

    @cached_property
    def trunk(self) -> set[fx.Node]:
        return trunk_nodes(self.gm, self.batch)

    @cached_property
    def anchors(self) -> dict[fx.Node, Anchor]:
        return anchors(self.nodes)


def placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "placeholder"]


def output_leaves(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that the graph gives, in order."""
    return list(graph_module.graph.output_node().args[0])  # type: ignore[arg-type]


def attribute(module: torch.nn.Module, target: str) -> Any:
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def size_sources(sizes: Iterable[fx.Node], tensors: Iterable[fx.Node]) -> list[fx.Node]:
    """Further tensors that `sizes` have to be read from, where `tensors` do not have them: a length after padding."""
    found: dict[fx.Node, None] = {}
    known = {e for n in tensors for e in shape(n)}
    todo = list(sizes)
    while todo:
        n = todo.pop()
        number = value(n)
        if isinstance(number, torch.SymInt) and expression(number) in known:
            continue
        if n.target is aten.sym_size.int:  # an input is smaller than what was computed from it
            inputs = n.graph.find_nodes(op="placeholder")
            source = next((p for p in inputs if expression(number) in shape(p)), n.args[0])
            found[source] = None  # type: ignore[index]
            known |= set(shape(source))  # type: ignore[arg-type]
        else:
            todo += [a for a in n.all_input_nodes if is_symbolic_number(a)]
    return list(found)


def needed_for(outputs: Iterable[fx.Node], instead: Mapping[fx.Node, fx.Node] | None = None) -> set[fx.Node]:
    """The given nodes and everything that they are computed from, in-place writes to any of it included.

    Args:
        instead: Nodes that take the value of another one and are computed from nothing else.
    """
    found: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += [instead[n]] if instead and n in instead else n.all_input_nodes
            todo += writers(n)
    return found


def writers(node: fx.Node) -> list[fx.Node]:
    """The in-place operators that write to a value, or to a view of it."""
    found = []
    for u in node.users:
        if u.target is operator.getitem:  # one of several views
            found += writers(u)
        if u.op != "call_function" or not isinstance(u.target, torch._ops.OpOverload):
            continue
        given = dict(zip((a.name for a in u.target._schema.arguments), u.args, strict=False)) | dict(u.kwargs)
        aliases = [a.alias_info for a in u.target._schema.arguments if given.get(a.name) is node]
        if any(a is not None and a.is_write for a in aliases):
            found.append(u)
        if any(a is not None for a in aliases):  # what it gives is the same memory
            found += writers(u)
    return found


def own_leaves(graph_module: fx.GraphModule, signature: Signature) -> list[fx.Node]:
    """The model's own output leaves, without what a captured or marked graph gives after them."""
    return output_leaves(graph_module)[: len(signature.outputs)]


def own_graph(graph_module: fx.GraphModule, signature: Signature) -> fx.GraphModule:
    """The model's own computation alone, under a graph of its own."""
    return graph_of(graph_module, own_leaves(graph_module, signature))


def graph_of(graph_module: fx.GraphModule, outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """What these nodes are computed by alone, under a graph of its own that gives them."""
    gm = copy(graph_module)
    names = by_name(gm)
    leaves = [names[n.name] for n in outputs]
    gm.graph.output_node().args = (tuple(leaves),)
    needed = needed_for(leaves)
    for n in reversed(list(gm.graph.nodes)):  # in-place operators are never dead code to FX
        if n not in needed and n.op not in ("placeholder", "output"):
            gm.graph.erase_node(n)
    tidy(gm)
    return gm


def last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Position of each node's last user; its own where it has none. Linear in the edges."""
    position = {n: i for i, n in enumerate(nodes)}
    last = dict(position)
    for i, n in enumerate(nodes):
        for a in n.all_input_nodes:
            last[a] = i
    return last


def trunk_nodes(graph_module: fx.GraphModule, batch: Batch) -> set[fx.Node]:
    """Values that depend on both a parameter and the batch: the computation proper, without masks and tables."""
    learned: set[fx.Node] = set()
    out: set[fx.Node] = set()
    for n in graph_module.graph.nodes:
        if n.op == "get_attr":
            if isinstance(attribute(graph_module, str(n.target)), torch.nn.Parameter):
                learned.add(n)
        elif n.op not in ("placeholder", "output") and any(a in learned for a in n.all_input_nodes):
            learned.add(n)
            v = value(n)
            if isinstance(v, tuple | list) or (is_tensor(n) and batch.carries(n)):
                out.add(n)
    return out


def block_name(path: str, call: int) -> str:
    return path if call == 0 else f"{path}@{call}"


def relative(anchor: Anchor, block: str) -> tuple[str, str, int]:
    """An anchor as seen from its block: the same for the same value in every repeated block."""
    path = block.partition("@")[0]
    inner = anchor.path[len(path) :] if anchor.path.startswith(path) else f"/{anchor.path}"
    return inner, anchor.target, anchor.ordinal


def tidy(graph_module: fx.GraphModule) -> None:
    """Dead code out, rules of FX checked, code generated again."""
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()


def module_of(source: fx.GraphModule, graph: fx.Graph, name: str, parts: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """A module for a graph over the modules, parameters and buffers of `source`.

    Args:
        parts: Submodules that `source` does not have.
    """
    root: Any = source
    if parts:
        targets = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
        root = {t: attribute(source, t) for t in sorted(targets - set(parts))} | dict(parts)
    new = fx.GraphModule(root, graph, class_name=name)
    share_tensors(new, source)
    return new


def tidy_module_of(
    source: fx.GraphModule, graph: fx.Graph, name: str, parts: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """`module_of` without dead code, the rules of FX checked. Most graphs have none: their code is generated once."""
    new = module_of(source, graph, name, parts)
    if new.graph.eliminate_dead_code():
        new.recompile()
    new.graph.lint()
    return new


def copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same modules and parameters under a graph of its own."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    out = graph.graph_copy(graph_module.graph, env)
    graph.output(out)
    new = module_of(graph_module, graph, graph_module.__class__.__name__)
    new.meta = dict(graph_module.meta)
    return new
