"""Rewrites what would be wrong or wasteful once rows leave: `-1` views, bare squeezes, folded masks, eval-mode no-ops.

None of it changes a number: outputs stay equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from eecompile.capture.memory import memory, written
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.recurrent import split_layers
from eecompile.program import Program

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")


@dataclass(frozen=True)
class Normalize(Pass):
    """Prepares a captured graph for running on part of its batch.

    - `view(B, S, -1, h)` gets its size written out: -1 is ambiguous when no row is left.
    - `squeeze()` names its axes: it would drop the batch axis when one row is left.
    - Masks that are all true, or causal, whatever the input, become what eager models pass: none, or a flag.
    - Stacks of recurrent layers become one call for each layer (`recurrent`).
    - What is computed from weights alone, such as a quantized weight in floats, comes right before its first reader, so
      that rows which leave early neither wait for it nor carry it along.
    - Dropout in eval mode and run-time checks that the signature makes anyway go away.
    - So does work that no output needs, in-place operators on it included.
    """

    name: ClassVar[str] = "normalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"normalized"})

    def run(self, program: Program) -> PassResult:
        graph_module = facts.copy(program.graph_module)
        batch = facts.Batch(graph_module, program.signature)
        counts = {
            "recurrent layers": split_layers(graph_module),
            "views": _concrete_views(graph_module),
            "masks": _fold_masks(graph_module, batch),
            "no-ops": _drop_noops(graph_module),
            "dead nodes": _drop_dead(graph_module),
            "weights' values": _sink_constants(graph_module),
        }
        facts.tidy(graph_module)
        done = {k: v for k, v in counts.items() if v}
        summary = ", ".join(f"{v} {k}" for k, v in done.items())
        return PassResult(program.replace(graph_module=graph_module), bool(done), summary=summary)


def _concrete_views(graph_module: fx.GraphModule) -> int:
    count = 0
    for n in graph_module.graph.nodes:
        if n.target is aten.squeeze.default and facts.is_tensor(n.args[0]):
            ones = [i for i, d in enumerate(facts.shape(n.args[0])) if d == 1]
            n.target = aten.squeeze.dims
            n.args = (n.args[0], ones)
            count += 1
        elif n.op == "call_function" and n.target in VIEWS and facts.is_tensor(n):
            sizes = list(n.args[1])
            if -1 in sizes:
                i = sizes.index(-1)
                size = facts.value(n).shape[i]
                if isinstance(size, int):
                    sizes[i] = size
                    n.args = (n.args[0], sizes, *n.args[2:])
                    count += 1
    return count


def _drop_noops(graph_module: fx.GraphModule) -> int:
    count = 0
    for n in list(graph_module.graph.nodes):
        if n.op != "call_function":
            continue
        if n.target in DROPOUTS and len(n.args) > 2 and n.args[2] is False:
            n.replace_all_uses_with(n.args[0])
        elif not any(c in str(n.target) for c in CHECKS) or n.users:
            continue
        graph_module.graph.erase_node(n)
        count += 1
    return count


def _drop_dead(graph_module: fx.GraphModule) -> int:
    """FX keeps every in-place operator; one that writes to a value that nothing reads again is dead all the same."""
    effects = [n for n in graph_module.graph.nodes if n.is_impure() and not _writes_own(n)]
    needed = facts.needed_for([*facts.output_leaves(graph_module), *effects])
    dead = [n for n in graph_module.graph.nodes if n not in needed and n.op not in ("placeholder", "output")]
    for n in reversed(dead):
        graph_module.graph.erase_node(n)
    return sum(n.op == "call_function" for n in dead)


def _writes_own(node: fx.Node) -> bool:
    """Whether an in-place operator writes to memory of the graph's own, not to an input or a buffer of the model."""
    found = written(node)
    return bool(found) and all(facts.memory(w).op == "call_function" for w in found)


def _sink_constants(graph_module: fx.GraphModule) -> int:
    """Moves values that depend on weights alone, through operators without effects, to before their first reader."""
    nodes = list(graph_module.graph.nodes)
    changed = {memory(w) for n in nodes for w in written(n)}
    constant: set[fx.Node] = set()
    for n in nodes:
        sources = n.all_input_nodes
        known = _is_plain(graph_module, n) or (_is_pure(n) and bool(sources) and all(s in constant for s in sources))
        if known and memory(n) not in changed:
            constant.add(n)
    count = 0
    for n in reversed(nodes):
        if n.op != "call_function" or n not in constant or not n.users:
            continue
        first = min(n.users)
        between = n.next
        while between is not first and between in constant:
            between = between.next
        if between is not first:
            first.prepend(n)
            count += 1
    return count


def _is_plain(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a tensor of torch's own class; conditions of exported programs take no other as an operand."""
    return node.op == "get_attr" and not is_traceable_wrapper_subclass(facts.attribute(graph_module, str(node.target)))


def _is_pure(node: fx.Node) -> bool:
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not drawn and not written(node) and not node.is_impure()


class _Unknown(Exception):
    """The mask depends on data or on a size other than the batch."""


def _fold_masks(graph_module: fx.GraphModule, batch: facts.Batch) -> int:
    sdpa = aten.scaled_dot_product_attention.default
    cache: dict[fx.Node, Any] = {}

    def evaluate(n: fx.Node) -> Any:
        if n not in cache:
            v = facts.value(n)
            if isinstance(v, torch.SymInt):
                e = facts.expression(v)
                if e.free_symbols - {batch.symbol}:
                    raise _Unknown
                cache[n] = int(e.subs(batch.symbol, sympy.Integer(3)))
            elif n.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
                raise _Unknown
            else:
                args = fx.node.map_arg(n.args, evaluate)
                cache[n] = n.target(*args, **fx.node.map_arg(n.kwargs, evaluate))  # type: ignore[operator]
        return cache[n]

    count = 0
    for n in graph_module.graph.nodes:
        if n.target is not sdpa:
            continue
        mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        try:
            known = evaluate(mask)
        except _Unknown:
            continue
        if known.dtype is not torch.bool:
            continue
        square = known.shape[-1] == known.shape[-2]
        if bool(known.all()):
            causal = False
        elif square and bool((known == torch.ones_like(known).tril()).all()):
            causal = True
        else:
            continue
        dropout = n.args[4] if len(n.args) > 4 else n.kwargs.get("dropout_p", 0.0)
        n.args = (*n.args[:3], None, dropout, causal)
        n.kwargs = {k: v for k, v in n.kwargs.items() if k in ("scale", "enable_gqa")}
        count += 1
    return count
