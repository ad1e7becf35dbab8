"""A gated region, or the branches of a router, taken out of the graph to run on their own rows.

All open: the region runs on what it is given, nothing is copied. All shut: nothing runs. Else its inputs are gathered
along their batch axes, and what it gives is written over what goes past it. Of branches each runs on the rows that were
sent there; one that has them all runs on what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

import eecompile.ops as ops
from eecompile.errors import PassError
from eecompile.ir.settings import BRANCHES, BUFFERS, GATES, Settings
from eecompile.kernels.choose import is_open
from eecompile.passes import facts
from eecompile.passes.extract import Extractor, extract
from eecompile.passes.find_regions import exclusive
from eecompile.passes.live_positions import extract_at_live
from eecompile.passes.routed import Routed
from eecompile.passes.widened import Chains, Widened
from eecompile.program import Gate, HaltStep, Program, Route, Way

Conditional = Gate | HaltStep | Route
SKIP, RUN = frozenset({0}), frozenset({1})
EITHER = SKIP | RUN

Possible = tuple[frozenset[int], ...]
"""Of each conditional, the arms that rows can still take, whatever the input: 0 and 1 for skipped and run, else the index of
a router's way."""


# Operators that run as their definitions once a program is lowered: the definitions are quicker to call.
DEFINITIONS = {torch.ops.eecompile.gate.default: ops.gate, torch.ops.eecompile.halt.default: ops.halt}


def defined(graph: fx.Graph) -> None:
    """Puts the definitions in place of the operators of gates and halting."""
    for n in graph.nodes:
        n.target = DEFINITIONS.get(n.target, n.target)


class Gated(nn.Module):
    """Runs `body` on the open rows.

    Args:
        body: `body(*inputs)` gives one value per carry.
        axes: Batch axis of each input, None without one.
        out_axes: Batch axis of each carry.
    """

    def __init__(self, body: fx.GraphModule, axes: Sequence[int | None], out_axes: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.axes, self.out_axes = tuple(axes), tuple(out_axes)
        self.call: Callable[..., tuple[Tensor, ...]] = body.forward  # an executor may put a quicker one here

    def forward(self, gate: Tensor, past: tuple[Tensor, ...], *inputs: Tensor, over: bool = False) -> tuple[Tensor, ...]:
        """`past` goes by the region, one value per carry; `inputs` go in.

        Args:
            over: Writes the open rows over `past` itself, not over a copy.
        """
        rows = torch.nonzero(is_open(gate)).view(-1)
        count = rows.numel()
        if count == 0:
            return past
        if count == gate.shape[0]:
            return self.call(*inputs)
        taken = [t if axis is None else t.index_select(axis, rows) for t, axis in zip(inputs, self.axes, strict=True)]
        values = self.call(*taken)
        write = Tensor.index_copy_ if over else Tensor.index_copy
        return tuple(write(x, axis, rows, y) for x, y, axis in zip(past, values, self.out_axes, strict=True))


def conditionals(program: Program) -> tuple[Conditional, ...]:
    """Everything that runs on some rows only: gated regions, then all steps of chains that halt but the first, then the
    branches of a router."""
    steps = (s for h in program.halts for s in h.steps if s.carries)
    return (*program.gates, *steps, *(r for r in program.routes if r.ways))


class GatedRegions:
    """The gated regions of a marked graph: which nodes are inside which.

    Args:
        live_only: Whether position-wise parts of halting steps run at live positions only.
    """

    def __init__(self, program: Program, gm: fx.GraphModule, batch: facts.Batch, live_only: bool = False) -> None:
        self.live_only = live_only
        self.gates, self.halts, self.gm, self.batch = conditionals(program), program.halts, gm, batch
        nodes = list(gm.graph.nodes)
        position = {n: i for i, n in enumerate(nodes)}
        names = facts.by_name(gm)
        self.names = names
        self.inside: dict[fx.Node, int] = {}
        self.ends: dict[fx.Node, int] = {}
        self.nodes: list[list[fx.Node]] = []
        self.chains = Chains(program, names)
        for i, g in enumerate(self.gates):
            if isinstance(g, Route):
                ys, stops, ends = [names[w.value] for w in g.ways], {names[g.x], names[g.reads]}, [g.node]
            else:
                ys, ends = [names[c.y] for c in g.carries], [c.node for c in g.carries]
                stops = {names[c.x] for c in g.carries} | {names[g.decision]}
            if g.name in self.chains.part_of:  # all widths are computed where the last gate's value is chosen
                chain = self.chains.part_of[g.name]
                if g.name != chain.gates[-1].name:
                    self.nodes.append([])
                    continue
                ys, stops = [names[ends[0]]], set(chain.stops)
            found = exclusive(nodes, position, ys, stops)
            if g.name in self.chains.part_of:
                found.remove(ys[0])
            self.nodes.append(found)
            self.inside |= dict.fromkeys(found, i)
            self.ends |= {names[end]: i for end in ends}

    def plain(self, arms: Possible) -> dict[fx.Node, fx.Node]:
        """Outputs of chains whose halting is closed, and the value that the model as it was has there."""
        steps = dict(zip((g.name for g in self.gates), arms, strict=True)) if self.halts else {}
        return {
            self.names[h.output]: self.names[h.ys[0 if h.repeated else -1]]
            for h in self.halts
            if len(steps[h.steps[-1].name]) == 1
        }

    def end(self, i: int) -> fx.Node:
        """The first node that hands on something of region i: all of the region is computed there."""
        g = self.gates[i]
        return self.names[g.node if isinstance(g, Route) else g.carries[0].node]

    def body(
        self, i: int, part: Extractor, name: str, outputs: Sequence[fx.Node] | None = None
    ) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Region i as a module, without what `part` has already, and the nodes that it takes.

        Args:
            outputs: What it gives instead of the values that gate i carries on.
        """
        gate = self.gates[i]
        if outputs is None:
            assert not isinstance(gate, Route)  # of which each way is a body of its own
            ys = [self.names[c.y] for c in gate.carries]
        else:
            ys = list(outputs)
        needed = set(self.nodes[i]) if outputs is None else facts.needed_for(ys)
        mine = [n for n in self.nodes[i] if n not in part.env and n in needed]
        within = set(mine)
        inputs = dict.fromkeys(
            a
            for n in mine
            for a in n.all_input_nodes
            if a not in within and (a.op != "get_attr" or a.target in BUFFERS) and not facts.is_symbolic_number(a)
        )
        sizes = [a for n in mine for a in n.all_input_nodes if a not in within and facts.is_symbolic_number(a)]
        inputs |= dict.fromkeys(facts.size_sources(sizes, [*inputs]))
        if self.live_only and isinstance(gate, HaltStep) and gate.parts:
            return extract_at_live(self.gm, mine, list(inputs), ys, name, gate), list(inputs)
        return extract(self.gm, mine, list(inputs), ys, name), list(inputs)

    def serves(self, i: int, needed: set[fx.Node]) -> bool:
        """Whether anything in region i is needed, if only as the value of a chain that does not halt."""
        return any(n in needed for n in self.nodes[i])

    def copy_into(self, part: Extractor, i: int, arms: Possible, needed: set[fx.Node] | None = None) -> None:
        """Writes region i into `part`: in line, past it, or as a conditional submodule; the carries are there then.

        Args:
            needed: In line, what is not among these is left out.
        """
        gate = self.gates[i]
        if isinstance(gate, Route):
            self._copy_route(part, i, gate, arms[i])
            return
        skips = [self.names[c.node] for c in gate.carries]
        if gate.name in self.chains.part_of:
            part.env[skips[0]] = self._copy_chain(part, i, arms)
            return
        if arms[i] == SKIP:
            for node, c in zip(skips, gate.carries, strict=True):
                if needed is None or node in needed:
                    part.env[node] = part.resolve(self.names[c.x])
            return
        if arms[i] == RUN:
            for n in self.nodes[i]:
                if needed is None or n in needed:
                    part.copy_unless_outer(n)
            for node, c in zip(skips, gate.carries, strict=True):
                if self.names[c.y] in part.env:
                    part.env[node] = part.env[self.names[c.y]]
            return
        # What a chain tells of itself at its end is carried where somebody asks.
        read = [c for c in gate.carries if needed is None or self.names[c.node] in needed]
        carries = read or list(gate.carries)
        skips = [self.names[c.node] for c in carries]
        body, inputs = self.body(i, part, f"Region{i}", [self.names[c.y] for c in carries])
        defined(body.graph)
        body.recompile()
        axes = [self._axis(n, gate) for n in inputs]
        target = f"{gate.name}_region"
        part.modules[target] = Gated(body, axes, [c.batch_axis for c in carries])
        past = tuple(part.resolve(self.names[c.x]) for c in carries)
        decision = part.resolve(self.names[gate.decision])
        call = part.graph.call_module(target, (decision, past, *(part.resolve(n) for n in inputs)))
        for k, node in enumerate(skips):
            part.env[node] = part.item(call, k, node)

    def _copy_chain(self, part: Extractor, i: int, arms: Possible) -> fx.Node:
        """The value of a region with widths: at one width for all rows, or at each row's own."""
        gate = self.gates[i]
        assert not isinstance(gate, Route)  # only gates have widths
        chain = self.chains.part_of[gate.name]
        steps = arms[i - len(chain.gates) + 1 : i + 1]
        lowest, highest = steps.count(RUN), len(steps) - steps.count(SKIP)
        if lowest == highest:
            needed = facts.needed_for([chain.values[lowest]])
            for n in self.nodes[i]:
                if n in needed:
                    part.copy_unless_outer(n)
            return part.resolve(chain.values[lowest])
        x = chain.values[0] if chain.skips and lowest == 0 else None
        bodies: list[fx.GraphModule | None] = [] if x is None else [None]
        taken: list[list[fx.Node]] = [[] for _ in bodies]
        for value in chain.values[lowest + len(bodies) : highest + 1]:
            body, inputs = self.body(i, part, f"Region{i}", [value])
            defined(body.graph)
            body.recompile()
            bodies.append(body)
            taken.append(inputs)
        inputs = list(dict.fromkeys(n for given in taken for n in given))
        target = f"{chain.name}_region"
        part.modules[target] = Widened(
            bodies,
            [[inputs.index(n) for n in given] for given in taken],
            [self._axis(n, gate) for n in inputs],
            gate.carries[0].batch_axis,
        )
        decisions = tuple(part.resolve(self.names[g.decision]) for g in chain.gates[lowest:highest])
        past = None if x is None else part.resolve(x)
        call = part.graph.call_module(target, (decisions, past, *(part.resolve(n) for n in inputs)))
        return part.item(call, 0, self.names[gate.carries[0].node])

    def _copy_route(self, part: Extractor, i: int, route: Route, arms: frozenset[int]) -> None:
        """Writes branches into `part`: the only open one in line, or all of them as one conditional submodule."""
        node = self.names[route.node]
        if len(arms) == 1:
            (way,) = arms
            value = self.names[route.ways[way].value]
            needed = facts.needed_for([value])
            for n in self.nodes[i]:
                if n in needed:
                    part.copy_unless_outer(n)
            part.env[node] = part.resolve(value)
            return
        made = [
            self._light(i, route, w) or self.body(i, part, f"Branch_{w.name}", [self.names[w.value]]) for w in route.ways
        ]
        inputs = list(dict.fromkeys(n for _, given in made for n in given))
        takes = [[inputs.index(n) for n in given] for _, given in made]
        target = f"{route.name}_branches"
        axes = [self._axis(n, route) for n in inputs]
        part.modules[target] = Routed([body for body, _ in made], takes, axes, route.batch_axis)
        given = (part.resolve(self.names[route.choice]), *(part.resolve(n) for n in inputs))
        part.env[node] = part.item(part.graph.call_module(target, given), 0, node)

    def _light(self, i: int, route: Route, way: Way) -> tuple[fx.GraphModule, list[fx.Node]] | None:
        """A light version is a body as it is, unless what it reads is computed among the branches."""
        module = facts.attribute(self.gm, way.module) if way.module else None
        inputs = [self.names[route.x], *(self.names[s] for s in way.sides)]
        if not isinstance(module, fx.GraphModule) or way.custom or set(inputs) & set(self.nodes[i]):
            return None
        return module, inputs

    def show_in(self, part: Extractor, i: int) -> None:
        """Writes region i into `part` as a submodule that computes every row, followed by its `choose`s."""
        gate = self.gates[i]
        if isinstance(gate, Route):
            for way in gate.ways:
                value = self.names[way.value]
                body, inputs = self.body(i, part, f"Branch_{way.name}", [value])
                part.modules[f"{gate.name}_{way.name}"] = body
                call = part.graph.call_module(f"{gate.name}_{way.name}", tuple(part.resolve(n) for n in inputs))
                part.env[value] = part.item(call, 0, value)
            part.copy(self.names[gate.node])
            return
        chain = self.chains.part_of.get(gate.name)
        values = [self.names[c.y] for c in gate.carries] if chain is None else chain.computed
        body, inputs = self.body(i, part, f"Region{i}", None if chain is None else values)
        target = f"{gate.name}_region"
        part.modules[target] = body
        call = part.graph.call_module(target, tuple(part.resolve(n) for n in inputs))
        for k, y in enumerate(values):
            part.env[y] = part.item(call, k, y)
        for g in (gate,) if chain is None else chain.gates:
            for c in g.carries:
                part.copy(self.names[c.node])

    def _axis(self, n: fx.Node, gate: Conditional) -> int | None:
        axis = None if n.op == "get_attr" else self.batch.axis(n)
        if isinstance(axis, str):
            raise PassError(
                "a gated region reads a value that cannot be gathered", where=gate.region, got=f"{n.name} {axis}"
            )
        return axis


def possible(program: Program, settings: Settings | None) -> Possible:
    """Of all `conditionals`: the arms that rows can take under these settings; all of them without settings."""
    if settings is None:
        routes = tuple(frozenset(range(len(r.ways))) for r in program.routes if r.ways)
        return (EITHER,) * (len(conditionals(program)) - len(routes)) + routes
    gates: dict[str, frozenset[int]] = {"": RUN}
    for g, t in zip(program.gates, settings[GATES], strict=True):
        own, before = RUN if t <= 0 else SKIP if t > 1 else EITHER, gates[g.needs]
        gates[g.name] = SKIP if SKIP in (own, before) else own if before == RUN else EITHER
    found = [gates[g.name] for g in program.gates]
    for h in program.halts:
        step = EITHER if settings.halts or h.per_token else SKIP if h.repeated else RUN
        found += [step] * sum(bool(s.carries) for s in h.steps)
    open_ways = frozenset(k for k, m in enumerate(settings[BRANCHES]) if m <= 1)
    return (*found, *(open_ways for r in program.routes if r.ways))
