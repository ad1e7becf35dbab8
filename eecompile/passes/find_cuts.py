"""Finds the positions where the work can stop: after blocks, and at the bottlenecks of the dataflow.

A cut is a position with its live set, everything that later nodes still need. Bottlenecks are the dominators of the
prediction on the graph of values that depend on both the parameters and the batch (masks and tables bypass blocks and
would hide every bottleneck). One sweep over the nodes and one dominator tree: linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch import fx

from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Anchor, Block, Cut, Program, Refusal


@dataclass(frozen=True)
class FindCuts(Pass):
    """Fills `program.structure.cuts`, in graph order.

    Args:
        bottlenecks: Also offer dominators that are no block boundary. Needed by models without repeated blocks.
    """

    name: ClassVar[str] = "find_cuts"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "blocks"})
    ensures: ClassVar[frozenset[str]] = frozenset({"cuts"})

    bottlenecks: bool = True

    def run(self, program: Program) -> PassResult:
        sweep = Sweep(program)
        positions: dict[int, tuple[str, fx.Node | None, bool]] = {}
        refusals: list[Refusal] = []
        dominators = sweep.dominators()
        if self.bottlenecks:
            for n in sweep.thin(dominators):
                positions[sweep.position[n]] = (sweep.module_ending_at(n), n, False)
        for p, block, after in sweep.block_ends(program.structure.blocks):
            values = sweep.handed_on(block, p)
            if values is None:
                refusals.append(Refusal(block.name, "find_cuts", "no tensor of the batch leaves this block"))
                continue
            positions = {q: v for q, v in positions.items() if v[2] or not p <= q < after}
            positions[p] = (block.name, values, True)
        for name, n in sweep.earlier():
            positions = {q: v for q, v in positions.items() if v[0] != name}
            positions[sweep.position[n]] = (name, n, True)
        for place in program.capture.places:
            value, last = sweep.at(place.value), sweep.at(place.after)
            if value is None or last is None:
                refusals.append(Refusal(place.name, "find_cuts", "this place is not in the captured graph"))
                continue
            positions[max(sweep.position[value], sweep.position[last])] = (place.name, value, True)
        cuts = []
        given = sweep.prediction()
        for p, live in sweep.live_at(sorted(positions)):
            name, value, is_block = positions[p]
            if given is not None and p > sweep.position[given]:
                refusals.append(Refusal(name, "find_cuts", "the prediction is computed before this place"))
                continue
            cut = sweep.cut(p, live, name, value, is_block, dominators)
            if isinstance(cut, Refusal):
                refusals.append(cut)
            else:
                cuts.append(cut)
        blocks = sum(c.is_block for c in cuts)
        summary = f"{len(cuts)} cuts, {blocks} of them after blocks"
        return PassResult(program.replace(cuts=tuple(cuts)), False, tuple(refusals), summary)


class Sweep(facts.View):
    """The search for cuts in one graph."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.last = facts.last_uses(self.nodes)
        costs = program.costs.seconds or program.costs.flops
        total = sum(costs.values())
        if program.capture.models:
            own = facts.needed_for(facts.own_leaves(self.gm, program.signature))
            total = sum(costs.get(n.name, 0.0) for n in own)
        total = total or 1.0
        done, self.depth = 0.0, []
        for n in self.nodes:
            done += costs.get(n.name, 0.0)
            self.depth.append(done / total)
        self.index = {n.name: i for i, n in enumerate(self.nodes)}
        self._tail_reads: set[tuple[str, str, int]] | None = None
        self._ends: dict[int, str] = {}
        last_of: dict[str, int] = {}
        for i, n in enumerate(self.nodes):
            for path, call, _ in facts.stack(n):
                last_of[facts.block_name(path, call)] = i
        for name, i in last_of.items():  # the outermost module that ends at a position names it
            self._ends.setdefault(i, name)

    def earlier(self) -> list[tuple[str, fx.Node]]:
        """The predictions of a cascade's models before the last, by name."""
        given = facts.output_leaves(self.gm)[len(self.program.signature.outputs) :]
        return list(zip(self.program.capture.models, given, strict=False))

    def at(self, anchor: Anchor) -> fx.Node | None:
        """The node that an anchor names, if it is there."""
        return next((n for n, a in self.anchors.items() if a == anchor), None)

    def prediction(self) -> fx.Node | None:
        leaves = facts.output_leaves(self.gm)
        i = self.program.prediction.index
        return leaves[i] if i is not None else None

    def dominators(self) -> list[fx.Node]:
        """Trunk values through which every path to the prediction goes, in graph order."""
        source, sink = "source", "sink"
        graph = nx.DiGraph()
        for n in self.nodes:
            if n not in self.trunk:
                continue
            inputs = [a for a in n.all_input_nodes if a in self.trunk]
            graph.add_edges_from((a, n) for a in inputs) if inputs else graph.add_edge(source, n)
        wanted = self.prediction()
        for leaf in [wanted] if wanted is not None else facts.output_leaves(self.gm):
            if leaf in self.trunk:
                graph.add_edge(leaf, sink)
        if sink not in graph or source not in graph or not nx.has_path(graph, source, sink):
            return []
        immediate = nx.immediate_dominators(graph, source)
        chain = []
        at = immediate[sink]
        while at != source:
            chain.append(at)
            at = immediate[at]
        return [n for n in reversed(chain) if facts.is_tensor(n)]

    def thin(self, dominators: Iterable[fx.Node]) -> list[fx.Node]:
        """Of bottlenecks with the same cost before them, the one that hands on the fewest elements, the last of those."""
        best: dict[float, fx.Node] = {}
        for n in dominators:
            if n is self.prediction():
                continue
            key = self.depth[self.position[n]]
            if key not in best or self._elements(n) <= self._elements(best[key]):
                best[key] = n
        return list(best.values())

    def _elements(self, n: fx.Node) -> float:
        count = 1.0
        for d in facts.shape(n):
            count *= float(d) if d.is_Integer else 1.0
        return count

    def module_ending_at(self, n: fx.Node) -> str:
        """The outermost module whose work ends with `n`, else the node's own name."""
        return self._ends.get(self.position[n], n.name)

    def block_ends(self, blocks: Iterable[Block]) -> list[tuple[int, Block, int]]:
        """For each block the best position after it and where the next one starts.

        Between two blocks the position with the fewest trunk values wins; a sequence-first model transposes there.
        """
        members = list(blocks)
        found = []
        for i, b in enumerate(members):
            low = self.index[b.last]
            high = self.index[members[i + 1].first] - 1 if i + 1 < len(members) else low
            found.append((self.narrowest(low, max(low, high)), b, max(low, high)))
        return found

    def narrowest(self, low: int, high: int) -> int:
        best, key = low, None
        for p, live in self.live_at(range(low, high + 1)):
            tuples = sum(not facts.is_tensor(n) and not facts.is_symbolic_number(n) for n in live)
            trunk = sum(n in self.trunk for n in live)
            k = (tuples, trunk, len(live))
            if key is None or k < key:
                best, key = p, k
        return best

    def live_at(self, positions: Iterable[int]) -> list[tuple[int, list[fx.Node]]]:
        """What is defined at or before each position and used after it. One sweep for all of them."""
        wanted = sorted(set(positions))
        out: list[tuple[int, list[fx.Node]]] = []
        live: dict[fx.Node, None] = {}
        ends: dict[int, list[fx.Node]] = {}
        start = 0
        for p in wanted:
            for i in range(start, p + 1):
                n = self.nodes[i]
                if n.op not in ("get_attr", "output") and self.last[n] > i:
                    live[n] = None
                    ends.setdefault(self.last[n], []).append(n)
                for dead in ends.pop(i, ()):
                    live.pop(dead, None)
            start = p + 1
            out.append((p, list(live)))
        return out

    def handed_on(self, block: Block, p: int) -> fx.Node | None:
        """What a head reads after a block.

        Where a block hands on several values (a recurrent cell's h and c, the scales of a multi-scale net) it is the
        one that the model's own tail reads after the last block.
        """
        inside = self._produced(block, p)
        if len(inside) > 1:
            if self._tail_reads is None:
                final = self.program.structure.blocks[-1]
                self._tail_reads = {facts.relative(self.anchors[n], final.name) for n in self._produced(final, None)}
            same = [n for n in inside if facts.relative(self.anchors[n], block.name) in self._tail_reads]
            inside = same or inside
        return inside[-1] if inside else None

    def _produced(self, block: Block, p: int | None) -> list[fx.Node]:
        first, end = self.index[block.first], self.index[block.last] if p is None else p
        return [
            n
            for n in self.nodes[first : end + 1]
            if n in self.trunk and facts.is_tensor(n) and self.last[n] > end and facts.value(n).is_floating_point()
        ]

    def cut(
        self,
        p: int,
        live: list[fx.Node],
        name: str,
        value: fx.Node | None,
        is_block: bool,
        dominators: list[fx.Node],
    ) -> Cut | Refusal:
        def refuse(reason: str) -> Refusal:
            return Refusal(name, "find_cuts", reason)

        if value is None or value not in live:
            return refuse("its value is not needed afterwards")
        if not facts.value(value).is_floating_point():
            return refuse(f"its value is {facts.value(value).dtype}, not a floating-point state")
        crossing = []
        sizes = [n for n in live if facts.is_symbolic_number(n)]
        tensors = [n for n in live if facts.is_tensor(n)]
        for n in [*(n for n in live if n not in sizes), *facts.size_sources(sizes, tensors)]:  # sizes are read again
            if not isinstance(facts.value(n), torch.Tensor):
                return refuse(f"{n.name} is no tensor and is needed afterwards")
            axis = self.batch.axis(n)
            if isinstance(axis, str):
                return refuse(f"{n.name} {axis}")
            crossing.append(self.batch.live(n, n in self.trunk))
        axis = self.batch.axis(value)
        if axis is None:
            return refuse(f"{value.name} has no batch axis")
        return Cut(
            name=name,
            after=self.nodes[p].name,
            value=value.name,
            live=tuple(crossing),
            depth=self.depth[p],
            is_block=is_block,
            dominates=value in dominators,
            anchor=self.anchors.get(value, Anchor("", 0, value.name, 0)),
        )


def cuts_before(program: Program) -> dict[str, Cut | Refusal]:
    """For every choice with gates that is in the graph, the cut between what goes into its region and its first score."""
    sweep, names = Sweep(program), facts.by_name(program.graph_module)
    work = next(i for i, n in enumerate(sweep.nodes) if n.op != "placeholder")
    found = {}
    for c in (c for c in program.choices if c.gates):
        x = names[c.arms[0].values[0] if c.arms[0].skips else c.reads[0]]
        low = max(work, sweep.position[x])
        p = sweep.narrowest(low, max(low, sweep.position[names[c.scores[0]]] - 1))
        ((_, live),) = sweep.live_at([p])
        found[c.name] = sweep.cut(p, live, f"before {c.region}", x, False, [])
    return found
