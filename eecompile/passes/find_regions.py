"""Regions that a row could skip: whole blocks, and the residual parts inside them.

A region takes one value x of the trunk and hands on one value y of the same shape. Its borders are dominators: every
path from x to y inside a block goes through each of them. Where a dominator joins several paths, the paths of a
residual branch, a part ends; operators with one input after it (the norm of a post-norm block, the activation of a
ResNet) belong to the part before them. Masks, tables and other values may come in from the side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch import fx

from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.recurrent import hidden
from eecompile.program import Block, Program, Refusal, Region

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
# What a residual path may go through apart from additions: norms, activations that change no value of their own, scalings,
# copies, permutations.
THROUGH = (
    aten.hardtanh.default, aten.hardtanh_.default,
    aten.relu.default, aten.relu_.default, aten.layer_norm.default, aten.batch_norm.default, aten.dropout.default,
    aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default, aten.to.dtype,
    aten.slice.Tensor, aten.mul.Tensor, aten.clamp.default, aten.transpose.int, aten.permute.default, aten.detach.default,
)  # fmt: skip
LEAST_SHARE = 0.5  # of a block's cost that leaving out its one value must save
ATTENTION = ("scaled_dot_product_attention", "softmax", "bmm")


@dataclass(frozen=True)
class FindRegions(Pass):
    """Fills `program.structure.regions`, in graph order, each block before its parts."""

    name: ClassVar[str] = "find_regions"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "costs", "blocks"})
    ensures: ClassVar[frozenset[str]] = frozenset({"regions"})

    def run(self, program: Program) -> PassResult:
        finder = Finder(program)
        regions: list[Region] = []
        refusals: list[Refusal] = []
        for block in program.structure.blocks:
            found = finder.block(block)
            if isinstance(found, Refusal):
                refusals.append(found)
                continue
            whole, chain = found
            regions.append(whole)
            parts = finder.parts(block, chain)
            if len(parts) > 1:
                regions += parts
            elif not whole.residual and (branch := finder.branch(block, chain)) is not None:
                regions.append(branch)
        kinds = [r.kind for r in regions]
        summary = f"{kinds.count('block')} blocks, {len(kinds) - kinds.count('block')} parts that could be left out"
        return PassResult(program.replace(regions=tuple(regions)), False, tuple(refusals), summary)


class Finder(facts.View):
    """The search for regions in one graph."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        done, self.depth = 0.0, []
        for n in self.nodes:
            self.depth.append(program.share(done))
            done += program.costs.flops.get(n.name, 0.0)

    def block(self, block: Block) -> tuple[Region, list[fx.Node]] | Refusal:
        """The whole block and the dominators between its input and its output."""

        def refuse(reason: str) -> Refusal:
            return Refusal(block.name, "find_regions", reason)

        y = self.names[block.output]
        first, last = self.position[self.names[block.first]], self.position[self.names[block.last]]
        axis = self.batch.axis(y)
        if not isinstance(axis, int) or not facts.value(y).is_floating_point():
            return refuse(f"its value {y.name} {axis if isinstance(axis, str) else 'has no batch of floats'}")
        incoming = [a for n in self.nodes[first : last + 1] for a in n.all_input_nodes if self.position[a] < first]
        alike = [a for a in dict.fromkeys(incoming) if self.alike(a, y)]
        if not alike:
            return refuse(f"no value that comes in has the shape of what it hands on, {list(self.batch.sizes(y))}")
        best = None
        for x in sorted(alike, key=lambda n: -self.position[n]):
            chain = self.chain(x, y)
            residual = self.reaches(x, y) or (hidden(x) and hidden(y))
            if best is None or (residual and not best[2]):
                best = (x, chain, residual)
        assert best is not None
        x, chain, residual = best
        inside = self.exclusive([y], x)
        escaping = self.escaping(x, y, inside)
        if escaping is not None:
            return refuse(f"{escaping.name}, inside it, is needed elsewhere too")
        region = self.region(block.name, "block", block, x, y, axis, residual, inside)
        if region.flops < LEAST_SHARE * block.flops or region.flops <= 0:
            return refuse("most of its work serves more than one value that it hands on")
        return region, chain

    def alike(self, a: fx.Node, y: fx.Node) -> bool:
        v, w = facts.value(a), facts.value(y)
        if not isinstance(v, torch.Tensor) or v.dtype != w.dtype or a.op == "get_attr":
            return False
        return facts.shape(a) == facts.shape(y) and (a in self.trunk or a.op == "placeholder")

    def chain(self, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        """x, the values that every path from x to y goes through, and y."""
        graph = nx.DiGraph()
        graph.add_node(x)
        for n in self.nodes[self.position[x] + 1 : self.position[y] + 1]:
            graph.add_edges_from((a, n) for a in n.all_input_nodes if a in graph)
        if y not in graph:
            return [x, y]
        immediate = nx.immediate_dominators(graph, x)
        found = [y]
        while found[-1] is not x:
            found.append(immediate[found[-1]])
        return found[::-1]

    def reaches(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether x reaches y through at least one addition, norms, activations and the like."""
        stack, seen = [(y, False)], set()
        while stack:
            n, added = stack.pop()
            if n is x:
                if added:
                    return True
                continue
            if (n, added) in seen or self.position[n] < self.position[x]:
                continue
            seen.add((n, added))
            if n.target in ADDITIONS:
                stack += [(a, True) for a in n.all_input_nodes]
            elif n.target in THROUGH:
                stack += [(a, added) for a in n.all_input_nodes[:1]]
        return False

    def exclusive(self, ys: list[fx.Node], x: fx.Node) -> list[fx.Node]:
        """Nodes that serve nothing but `ys`, in order; x is never one of them."""
        return exclusive(self.nodes, self.position, ys, {x})

    def escaping(self, x: fx.Node, y: fx.Node, inside: list[fx.Node]) -> fx.Node | None:
        """A value of the trunk between x and y that something outside reads."""
        within = set(inside)
        after_x = {x}
        between: list[fx.Node] = self.nodes[self.position[x] + 1 : self.position[y]]
        for n in between:
            if not any(a in after_x for a in n.all_input_nodes):
                continue
            after_x.add(n)
            leads = n in self.trunk and facts.is_tensor(n) and self._leads_to(n, y)
            if leads and n not in within:
                return n
        return None

    def _leads_to(self, n: fx.Node, y: fx.Node) -> bool:
        """Whether y depends on n."""
        stack, seen = [n], set()
        while stack:
            at = stack.pop()
            if at is y:
                return True
            for u in at.users:
                if u not in seen and self.position[u] <= self.position[y]:
                    seen.add(u)
                    stack.append(u)
        return False

    def parts(self, block: Block, chain: list[fx.Node]) -> list[Region]:
        """The residual parts of a block, from one dominator to the next that joins several paths."""
        ends: list[fx.Node] = []
        for before, n in zip(chain, chain[1:], strict=False):
            joins = [a for a in n.all_input_nodes if a in self.trunk or a is chain[0]]
            straight = joins == [before]
            if straight and ends:
                ends[-1] = n  # a norm or activation after an addition
            elif not straight:
                ends.append(n)
        found: list[Region] = []
        x = chain[0]
        for k, y in enumerate(ends):
            axis = self.batch.axis(y)
            inside = self.exclusive([y], x)
            if not self.alike(x, y) or not isinstance(axis, int) or not self.reaches(x, y):
                return []
            if self.escaping(x, y, inside) is not None:
                return []
            kind = self._kind(inside)
            name = f"{block.name}:{kind if kind != 'part' else f'part_{k}'}"
            if any(r.name == name for r in found):
                name = f"{name}_{k}"
            found.append(self.region(name, kind, block, x, y, axis, True, inside))
            x = y
        return found

    def branch(self, block: Block, chain: list[fx.Node]) -> Region | None:
        """The residual branch of a block whose last operators would change its input: an activation, as in silu(x + f(x)).

        It ends at the addition; what comes after it runs for every row.
        """
        x, y = chain[0], chain[-1]
        for end in chain[:0:-1]:
            if end.target in ADDITIONS:
                axis, inside = self.batch.axis(end), self.exclusive([end], x)
                fits = isinstance(axis, int) and self.alike(x, end) and self.reaches(x, end)
                if end is y or not fits or self.escaping(x, end, inside) is not None:
                    return None
                assert isinstance(axis, int)
                region = self.region(f"{block.name}:branch", "branch", block, x, end, axis, True, inside)
                return region if region.flops >= LEAST_SHARE * block.flops else None
        return None

    def _kind(self, inside: list[fx.Node]) -> str:
        names = [str(n.target) for n in inside]
        if any(word in name for name in names for word in ATTENTION):
            return "attention"
        return "mlp" if any("linear" in name or "addmm" in name for name in names) else "part"

    def region(
        self, name: str, kind: str, block: Block, x: fx.Node, y: fx.Node, axis: int, residual: bool, inside: list[fx.Node]
    ) -> Region:
        flops = sum(self.program.costs.flops.get(n.name, 0.0) for n in inside)
        first = min((self.position[n] for n in inside if n.name in self.program.costs.flops), default=self.position[y])
        anchors = (self.anchors.get(x), self.anchors.get(y))
        return Region(name, kind, block.name, x.name, y.name, axis, flops, self.depth[first], residual, anchors)


def exclusive(nodes: list[fx.Node], position: dict[fx.Node, int], ys: list[fx.Node], stops: set[fx.Node]) -> list[fx.Node]:
    """`ys` and every node all of whose users are among them, in graph order. Inputs, attributes and `stops` are not.

    One backward sweep: linear in the edges.
    """
    inside = set(ys)
    for n in reversed(nodes[: max(position[y] for y in ys)]):
        if n.op in ("placeholder", "get_attr", "output") or n in stops or n in inside or not n.users:
            continue
        if all(u in inside for u in n.users):
            inside.add(n)
    return [n for n in nodes[: max(position[y] for y in ys) + 1] if n in inside]
