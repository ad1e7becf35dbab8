"""Common subexpression elimination: layers that models of a cascade share run once on the same inputs.

Common subexpressions of one graph: the same operator on the same values and the same parameters gives the same bits.
A stem that two models share runs once; so does the shorter of two stacks of layers, one of which goes on from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from eecompile.ir.functional import functional
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Share(Pass):
    """Merges equal computations; random operators, and values that are written in place afterwards, stay apart.

    In-place operators of shared layers become functional, so that neither model sees the other's writes.
    """

    name: ClassVar[str] = "share"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized"})

    def run(self, program: Program) -> PassResult:
        trial = facts.copy(program.graph_module)
        _functionalize(trial, None)
        names = _merge(trial, facts.Batch(trial, program.signature))
        if not names:
            return PassResult(program, False, summary="the models share no work")
        gm = facts.copy(program.graph_module)
        before = len(gm.graph.nodes)
        _functionalize(gm, names)
        _merge(gm, facts.Batch(gm, program.signature))
        facts.tidy(gm)
        count = before - len(gm.graph.nodes)
        return PassResult(program.replace(graph_module=gm), True, summary=f"{count} nodes computed once instead of again")


def _functionalize(gm: fx.GraphModule, names: set[str] | None) -> None:
    """In-place operators without views of what they write become functional; None: all of them."""
    nodes = list(gm.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    for n in nodes:
        plain = functional(n.target) if n.op == "call_function" and (names is None or n.name in names) else None
        if plain is None or not n.args or not isinstance(n.args[0], fx.Node):
            continue
        written = n.args[0]
        if written.op == "placeholder" or _is_view(written) or any(_is_view(u) for u in written.users):
            continue
        n.target = plain
        at = position[n]
        written.replace_all_uses_with(n, delete_user_cb=lambda u, at=at: position[u] > at)  # type: ignore[misc]


def _is_view(n: fx.Node) -> bool:
    """Whether what it gives may be the memory of an argument."""
    if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
        return False
    return any(a.alias_info is not None and not a.alias_info.is_write for a in n.target._schema.arguments)


def _merge(gm: fx.GraphModule, batch: facts.Batch) -> set[str]:
    """Replaces every later copy of a computation by the first; the names of all that were equal.

    Values that fold the batch into another axis stay apart: they cannot be gathered, so they cannot be handed on. So do
    those made from the size of the batch alone, such as the offsets of bags: row 3 of 4 is not that of 9.
    """
    rows = _from_rows(gm)
    first: dict[Any, fx.Node] = {}
    equal: set[str] = set()
    for n in list(gm.graph.nodes):
        if n.op == "get_attr":
            key: Any = ("attribute", id(facts.attribute(gm, str(n.target))))
        elif n.op == "call_function" and _pure(n):
            if isinstance(batch.axis(n), str) or (batch.carries(n) and n not in rows):
                continue
            key = _key(n)
        else:
            continue
        leader = first.get(key)
        if leader is None:
            first[key] = n
            continue
        n.replace_all_uses_with(leader)
        gm.graph.erase_node(n)
        if n.op == "call_function" and not facts.is_symbolic_number(n):
            equal |= {leader.name, n.name}
    return equal


def _from_rows(gm: fx.GraphModule) -> set[fx.Node]:
    """Values that depend on what is in the inputs, not on their sizes alone."""
    found: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op == "placeholder" or (not facts.is_symbolic_number(n) and any(a in found for a in n.all_input_nodes)):
            found.add(n)
    return found


def _pure(n: fx.Node) -> bool:
    """Whether the value depends on the arguments alone, and stays as it is."""
    target = n.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    if target._schema.is_mutable or facts.writers(n):
        return False
    if any(facts.writers(a) for a in n.all_input_nodes):
        return False
    if target is SDPA:
        dropout = n.args[4] if len(n.args) > 4 else n.kwargs.get("dropout_p", 0.0)
        return bool(dropout == 0.0)
    return torch.Tag.nondeterministic_seeded not in target.tags


def _key(n: fx.Node) -> Any:
    def plain(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return tuple(plain(x) for x in a)
        if isinstance(a, dict):
            return tuple((k, plain(v)) for k, v in sorted(a.items()))
        return (type(a).__name__, a) if isinstance(a, bool | int | float) else a

    return (n.target, plain(n.args), plain(n.kwargs))
