"""Values that fold the batch with heads into one axis go past ends of blocks unfolded, so that rows can be gathered there.

    before:  f = alibi(mask)  [B * k, 1, S]                          ... end of a block ...  baddbmm(f, q, k)
    after:   f = alibi(mask); u = unflatten(f, 0, [-1, k])  [B, k, 1, S]  ...  r = flatten(u, 0, 1); baddbmm(r, q, k)

Both are views, so every number stays the same. Which of the two counts first is read off the operators that fold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Program

aten = torch.ops.aten
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
)  # fmt: skip


@dataclass(frozen=True)
class Unfold(Pass):
    """Rewrites what is folded before the end of a block and read after it; what cannot be read off stays as it is."""

    name: ClassVar[str] = "unfold"
    requires: ClassVar[frozenset[str]] = frozenset({"blocks"})
    ensures: ClassVar[frozenset[str]] = frozenset({"unfolded"})

    def run(self, program: Program) -> PassResult:
        batch = facts.Batch(program.graph_module, program.signature)
        if not any(isinstance(batch.axis(n), str) for n in program.graph_module.graph.nodes):
            return PassResult(program, False)
        gm = facts.copy(program.graph_module)
        nodes = list(gm.graph.nodes)
        position = {n: i for i, n in enumerate(nodes)}
        names = facts.by_name(gm)
        ends = [p for b in program.structure.blocks for p in (position[names[b.first]] - 1, position[names[b.last]])]
        first = {b.first: b for b in program.structure.blocks}
        moved: dict[str, str] = {}
        count = 0
        for n in nodes:
            far = [u for u in n.users if any(position[n] <= p < position[u] for p in ends)]
            fold = _fold(n, batch) if far and not facts.writers(n) else None
            if fold is None:
                continue
            axis, sizes = fold
            with gm.graph.inserting_after(n):
                whole = _new(gm, aten.unflatten.int, (n, axis, sizes), n)
            for u in far:
                with gm.graph.inserting_before(u):
                    again = _new(gm, aten.flatten.using_ints, (whole, axis, axis + 1), u)
                u.replace_input_with(n, again)
                if u.name in first:
                    moved[u.name] = again.name
            count += 1
        if not count:
            return PassResult(program, False)
        facts.tidy(gm)
        blocks = tuple(replace(b, first=moved.get(b.first, b.first)) for b in program.structure.blocks)
        return PassResult(program.replace(graph_module=gm, blocks=blocks), True, summary=f"{count} values unfolded")


def _new(gm: fx.GraphModule, target: Any, args: tuple[Any, ...], near: fx.Node) -> fx.Node:
    node = gm.graph.call_function(target, args)
    node.meta["stack"] = facts.stack(near)
    source = facts.value(args[0])
    with source.fake_mode:
        node.meta["val"] = target(source, *args[1:])
    return node


def _fold(n: fx.Node, batch: facts.Batch) -> tuple[int, list[int]] | None:
    """The axis that holds the batch and something else, and the sizes that it is made of, -1 for the batch."""
    if not facts.is_tensor(n) or not isinstance(batch.axis(n), str):
        return None
    hits = [i for i, e in enumerate(facts.shape(n)) if batch.symbol in e.free_symbols]
    share = sympy.cancel(facts.shape(n)[hits[0]] / batch.symbol)
    if len(hits) > 1 or not share.is_Integer:
        return None
    before = _batch_first(n, hits[0], batch, int(share))
    return None if before is None else (hits[0], [-1, int(share)] if before else [int(share), -1])


def _batch_first(n: fx.Node, axis: int, batch: facts.Batch, share: int) -> bool | None:
    """Whether the batch counts before the rest in a folded axis; None where it cannot be read off."""
    size = facts.shape(n)[axis]
    while isinstance(source := next(iter(n.args), None), fx.Node) and facts.is_tensor(source):
        sizes = facts.shape(source)
        if n.target in RESHAPES:
            at = _same_before(facts.shape(n)[:axis], sizes)
            while at is not None and at < len(sizes) and sizes[at] == 1:
                at += 1
            if at is None or at == len(sizes):
                return None
            if sizes[at] == size:
                n, axis = source, at
                continue
            inner, rest = at, sympy.Integer(1)
            while inner < len(sizes) and rest != share and sizes[inner] != batch.symbol:
                rest, inner = rest * sizes[inner], inner + 1
            if inner == at:
                return True if sizes[at] == batch.symbol else None
            return False if rest == share and inner < len(sizes) and sizes[inner] == batch.symbol else None
        if n.target is aten.repeat_interleave.self_int:
            return True if sizes[axis] == batch.symbol else None
        if n.target is aten.repeat.default:
            return False if len(sizes) == len(facts.shape(n)) and sizes[axis] == batch.symbol else None
        if n.target in (aten.transpose.int, aten.permute.default):
            order = list(range(len(sizes)))
            if n.target is aten.permute.default:
                order = [int(d) % len(sizes) for d in n.args[1]]  # type: ignore[union-attr,arg-type]
            else:
                a, b = (int(d) % len(sizes) for d in n.args[1:3])  # type: ignore[arg-type]
                order[a], order[b] = order[b], order[a]
            n, axis = source, order[axis]
            continue
        alike = [a for a in n.all_input_nodes if len(facts.shape(a)) == len(facts.shape(n)) and facts.shape(a)[axis] == size]
        if not alike:
            return None
        n = alike[0]
    return None


def _same_before(before: tuple[sympy.Expr, ...], sizes: tuple[sympy.Expr, ...]) -> int | None:
    """Index in `sizes` after as many elements as `before` has."""
    wanted, found = sympy.prod(before), sympy.Integer(1)
    for i, size in enumerate(sizes):
        if sympy.expand(found - wanted) == 0:
            return i
        found *= size
    return None
