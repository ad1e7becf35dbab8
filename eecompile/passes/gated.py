"""A gated region taken out of the graph, to run on the rows whose gate is open.

All open: the region runs on what it is given, nothing is copied. All shut: nothing runs. Else its inputs are gathered
along their batch axes, and what it gives is written over what goes past it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

import eecompile.ops as ops
from eecompile.errors import PassError
from eecompile.kernels.skip import is_open
from eecompile.passes import facts
from eecompile.passes.extract import Extractor, extract
from eecompile.passes.find_regions import exclusive
from eecompile.program import Gate, Halt, HaltStep, Program

OPEN, SHUT, DYNAMIC = "open", "shut", "dynamic"


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

    def forward(self, gate: Tensor, past: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """`past` goes by the region, one value per carry; `inputs` go in."""
        rows = torch.nonzero(is_open(gate)).view(-1)
        count = rows.numel()
        if count == 0:
            return past
        if count == gate.shape[0]:
            return self.call(*inputs)
        taken = [t if axis is None else t.index_select(axis, rows) for t, axis in zip(inputs, self.axes, strict=True)]
        values = self.call(*taken)
        return tuple(x.index_copy(axis, rows, y) for x, y, axis in zip(past, values, self.out_axes, strict=True))


def conditionals(program: Program) -> tuple[Gate | HaltStep, ...]:
    """Everything that runs on some rows only: gated regions, then all steps of chains that halt but the first."""
    return (*program.gates, *(s for h in program.halts for s in h.steps if s.carries))


class GatedRegions:
    """The gated regions of a marked graph: which nodes are inside which."""

    def __init__(self, program: Program, gm: fx.GraphModule, batch: facts.Batch) -> None:
        self.gates, self.halts, self.gm, self.batch = conditionals(program), program.halts, gm, batch
        nodes = list(gm.graph.nodes)
        position = {n: i for i, n in enumerate(nodes)}
        names = facts.by_name(gm)
        self.names = names
        self.inside: dict[fx.Node, int] = {}
        self.ends: dict[fx.Node, int] = {}
        self.nodes: list[list[fx.Node]] = []
        for i, g in enumerate(self.gates):
            ys = [names[c.y] for c in g.carries]
            stops = {names[c.x] for c in g.carries} | {names[g.decision]}
            found = exclusive(nodes, position, ys, stops)
            self.nodes.append(found)
            self.inside |= dict.fromkeys(found, i)
            self.ends |= {names[c.node]: i for c in g.carries}

    def plain(self, how: Sequence[str]) -> dict[fx.Node, fx.Node]:
        """Outputs of chains whose halting is closed, and the value that the model as it was has there."""
        steps = dict(zip((g.name for g in self.gates), how, strict=True))
        return {
            self.names[h.output]: self.names[h.ys[0 if h.repeated else -1]]
            for h in self.halts
            if steps[h.steps[-1].name] != DYNAMIC
        }

    def end(self, i: int) -> fx.Node:
        """The first node that hands on something of region i: all of the region is computed there."""
        return self.names[self.gates[i].carries[0].node]

    def body(self, i: int, part: Extractor, name: str) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Region i as a module, without what `part` has already, and the nodes that it takes."""
        gate = self.gates[i]
        mine = [n for n in self.nodes[i] if n not in part.env]
        within = set(mine)
        inputs = dict.fromkeys(
            a
            for n in mine
            for a in n.all_input_nodes
            if a not in within and a.op != "get_attr" and not facts.is_symbolic_number(a)
        )
        ys = [self.names[c.y] for c in gate.carries]
        return extract(self.gm, mine, list(inputs), ys, name), list(inputs)

    def copy_into(self, part: Extractor, i: int, how: str) -> None:
        """Writes region i into `part`: in line, past it, or as a conditional submodule; the carries are there then."""
        gate = self.gates[i]
        skips = [self.names[c.node] for c in gate.carries]
        if how == SHUT:
            for node, c in zip(skips, gate.carries, strict=True):
                part.env[node] = part.resolve(self.names[c.x])
            return
        if how == OPEN:
            for n in self.nodes[i]:
                part.copy_unless_outer(n)
            for node, c in zip(skips, gate.carries, strict=True):
                part.env[node] = part.env[self.names[c.y]]
            return
        body, inputs = self.body(i, part, f"Region{i}")
        defined(body.graph)
        body.recompile()
        axes = [self._axis(n, gate) for n in inputs]
        target = f"{gate.name}_region"
        part.modules[target] = Gated(body, axes, [c.batch_axis for c in gate.carries])
        past = tuple(part.resolve(self.names[c.x]) for c in gate.carries)
        decision = part.resolve(self.names[gate.decision])
        call = part.graph.call_module(target, (decision, past, *(part.resolve(n) for n in inputs)))
        for k, node in enumerate(skips):
            part.env[node] = part.item(call, k, node)

    def show_in(self, part: Extractor, i: int) -> None:
        """Writes region i into `part` as a submodule that computes every row, followed by its `skip`s."""
        gate = self.gates[i]
        body, inputs = self.body(i, part, f"Region{i}")
        target = f"{gate.name}_region"
        part.modules[target] = body
        call = part.graph.call_module(target, tuple(part.resolve(n) for n in inputs))
        for k, c in enumerate(gate.carries):
            y = self.names[c.y]
            part.env[y] = part.item(call, k, y)
            part.copy(self.names[c.node])

    def _axis(self, n: fx.Node, gate: Gate | HaltStep) -> int | None:
        axis = self.batch.axis(n)
        if isinstance(axis, str):
            raise PassError(
                "a gated region reads a value that cannot be gathered", where=gate.region, got=f"{n.name} {axis}"
            )
        return axis


def halting_pattern(halts: Sequence[Halt], closed: bool) -> tuple[str, ...]:
    """Per step but the first of each chain; `closed` for the model as it was."""
    found: list[str] = []
    for h in halts:
        how = DYNAMIC if not closed or h.per_token else SHUT if h.repeated else OPEN
        found += [how] * sum(bool(s.carries) for s in h.steps)
    return tuple(found)


def pattern(gates: Sequence[Gate], thresholds: Sequence[float]) -> tuple[str, ...]:
    """Per gate: open or shut whatever the input, or dynamic."""
    known: dict[str, str] = {"": OPEN}
    for g, t in zip(gates, thresholds, strict=True):
        own = OPEN if t <= 0 else SHUT if t > 1 else DYNAMIC
        other = known[g.needs]
        known[g.name] = SHUT if SHUT in (own, other) else own if other == OPEN else DYNAMIC
    return tuple(known[g.name] for g in gates)
