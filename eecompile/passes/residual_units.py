"""Residual branches found in the graph, where no module marks a block: `x = x + f(x)` in a loop of the forward.

A unit goes from one bottleneck of the graph to the next that is an addition with the first among its terms. What follows
the additions of all units alike, activations and norms in a straight line, belongs to the units.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from eecompile.passes import facts

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
LEAST_COVERAGE = 0.2  # of the model's cost


@dataclass(frozen=True)
class Unit:
    """`y` is `x + f(x)` and what always follows; positions in the graph."""

    name: str
    x: int
    y: int


def residual_units(
    nodes: list[fx.Node], trunk: set[fx.Node], flops: Mapping[str, float], prediction: fx.Node | None
) -> list[Unit]:
    """Two units or more, in order; none where they cover little of the cost."""
    chain = bottlenecks(nodes, trunk, prediction)
    ends = [
        k
        for k, (x, y) in enumerate(zip(chain, chain[1:], strict=False), 1)
        if y.target in ADDITIONS and x in y.all_input_nodes and facts.shape(x) == facts.shape(y)
    ]
    if len(ends) < 2:
        return []
    tails = []
    for k, stop in zip(ends, [*ends[1:], len(chain)], strict=True):
        straight = itertools.takewhile(lambda n: _straight(n, trunk, flops), chain[k + 1 : stop])
        tails.append([facts.target_name(n) for n in straight])
    alike = _common(tails)
    position = {n: i for i, n in enumerate(nodes)}
    spans = [(position[chain[k - 1]], position[chain[k + alike]]) for k in ends]
    work = [[n for n in nodes[x + 1 : y + 1] if flops.get(n.name, 0.0) > 0] for x, y in spans]
    spans = [s for s, w in zip(spans, work, strict=True) if w]
    covered = sum(flops[n.name] for w in work for n in w)
    if len(spans) < 2 or covered < LEAST_COVERAGE * sum(flops.values()):
        return []
    stacks = [facts.stack(max(w, key=lambda n: flops[n.name])) for w in work if w]
    depth = _common(stacks)  # the outermost modules by which the units differ name them
    names = [facts.block_name(*s[depth][:2]) if len(s) > depth else "" for s in stacks]
    if "" in names or len(set(names)) < len(names):
        names = [nodes[y].name for _, y in spans]
    return [Unit(name, x, y) for name, (x, y) in zip(names, spans, strict=True)]


def _common(sequences: Sequence[Sequence[object]]) -> int:
    """Length of what all sequences begin with."""
    return sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*sequences, strict=False)))


def _straight(n: fx.Node, trunk: set[fx.Node], flops: Mapping[str, float]) -> bool:
    return sum(a in trunk for a in n.all_input_nodes) == 1 and not flops.get(n.name, 0.0)


def bottlenecks(nodes: list[fx.Node], trunk: set[fx.Node], prediction: fx.Node | None) -> list[fx.Node]:
    """Values that every path from the inputs to the prediction goes through, in order."""
    graph = nx.DiGraph()
    for n in nodes:
        if n not in trunk:
            continue
        inputs = [a for a in n.all_input_nodes if a in trunk or a.op == "placeholder"]
        graph.add_edges_from((a, n) for a in inputs)
        graph.add_edges_from(("source", a) for a in inputs or [n] if a not in trunk or not inputs)
    if prediction is None or prediction not in graph or not nx.has_path(graph, "source", prediction):
        return []
    immediate, chain = nx.immediate_dominators(graph, "source"), [prediction]
    while immediate[chain[-1]] != "source":
        chain.append(immediate[chain[-1]])
    return [n for n in reversed(chain) if facts.is_tensor(n)]
