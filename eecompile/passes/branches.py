"""The part of the model that branches are alternatives to: what belongs to it, and lighter versions of it.

A light version leaves blocks out: what a block would have handed on is what it was given. It gets copies of the weights,
so that training it leaves the model as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from eecompile.errors import StrategyError
from eecompile.ir.functional import make_functional
from eecompile.passes import facts
from eecompile.passes.extract import Extractor
from eecompile.passes.find_regions import exclusive
from eecompile.program import Program, Region


@dataclass(frozen=True)
class Light:
    """A light version: called with the value where branches begin, then `sides`."""

    module: fx.GraphModule
    sides: tuple[str, ...]
    flops: float
    left_out: tuple[str, ...]


class Part:
    """The work from one value of the graph to another.

    Raises:
        StrategyError: The later value does not depend on the earlier one, or something between is needed elsewhere.
    """

    def __init__(self, program: Program, gm: fx.GraphModule, x: str, y: str, where: str) -> None:
        self.program, self.gm, self.where = program, gm, where
        names = facts.by_name(gm)
        self.x, self.y = names[x], names[y]
        self.nodes = list(gm.graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        if self.y.op in ("placeholder", "get_attr") or self.x not in facts.needed_for([self.y]) or self.x is self.y:
            raise StrategyError(
                "branches lie between one value and another that is computed from it",
                where=where,
                got=f"{y} does not come from {x}",
                wanted="over=(earlier cut, later cut)",
            )
        self.inside = exclusive(self.nodes, self.position, [self.y], {self.x})
        self._check()

    def _check(self) -> None:
        """Whether everything between the two values serves the later one alone."""
        within, after = set(self.inside), {self.x}
        before = facts.needed_for([self.y])
        for n in self.nodes[self.position[self.x] + 1 : self.position[self.y]]:
            if not any(a in after for a in n.all_input_nodes):
                continue
            after.add(n)
            if n in before and n not in within and not facts.is_symbolic_number(n):
                raise StrategyError(
                    "branches would replace work whose result is needed elsewhere too",
                    where=self.where,
                    got=n.name,
                    wanted="a part of the model that hands on one value",
                    hint="eecompile inspect MODEL shows the cuts; choose others for over=",
                )

    @property
    def flops(self) -> float:
        return sum(self.program.costs.flops.get(n.name, 0.0) for n in self.inside)

    @property
    def first(self) -> int:
        """Position of the first node after the value where branches begin."""
        return min(p for n in self.inside if (p := self.position[n]) > self.position[self.x])

    def blocks(self) -> list[Region]:
        """Blocks inside that could be left out, in order."""
        within = {n.name for n in self.inside}
        return [
            r
            for r in self.program.structure.regions
            if r.kind == "block" and r.y in within and (r.x in within or r.x == self.x.name)
        ]

    def chosen(self, share: float) -> tuple[Region, ...]:
        """The blocks that a light version leaves out: spread evenly, so that `share` of them are kept."""
        blocks = self.blocks()
        if not blocks:
            reasons = [f"{r.node}: {r.reason}" for r in self.program.refusals if r.rule == "find_regions"]
            raise StrategyError(
                "there is no light version of a part without blocks",
                where=self.where,
                got="; ".join(reasons[:6]) or "no block that hands on a value of the shape that it is given",
                wanted="at least one block that could be left out",
                hint="give a module as the branch, or widen over=",
            )
        keep = min(len(blocks) - 1, max(0, round(share * len(blocks))))
        kept = {int(i * len(blocks) / keep) for i in range(keep)}
        return tuple(b for i, b in enumerate(blocks) if i not in kept)

    def light(self, left_out: tuple[Region, ...]) -> Light:
        """The version without these blocks, with weights of its own."""
        names = facts.by_name(self.gm)
        past = {names[r.y]: names[r.x] for r in left_out}
        for y, x in past.items():  # what goes past a block must not be written over
            make_functional(x, self.position)
            make_functional(y, self.position)
        within = set(self.inside)
        needed: set[fx.Node] = set()
        sides: set[fx.Node] = set()
        todo = [self.y]
        while todo:
            n = todo.pop()
            if n in needed or n is self.x or n.op == "get_attr":
                continue
            if n in past:
                needed.add(n)
                todo.append(past[n])
            elif n in within:
                needed.add(n)
                todo += [*n.all_input_nodes, *(w for w in facts.writers(n) if w in within)]
            elif not facts.is_symbolic_number(n):
                sides.add(n)
        part = Extractor(self.gm)
        part.placeholder(self.x)
        ordered = sorted(sides, key=lambda n: self.position[n])
        for n in ordered:
            part.placeholder(n)
        for n in self.inside:
            if n in needed:
                if n in past:
                    part.env[n] = part.resolve(past[n])
                else:
                    part.copy_unless_outer(n)
        flops = sum(self.program.costs.flops.get(n.name, 0.0) for n in needed if n not in past)
        module = owned(self.gm, part.graph, part.resolve(self.y))
        return Light(module, tuple(n.name for n in ordered), flops, tuple(r.name for r in left_out))


def owned(source: fx.GraphModule, graph: fx.Graph, output: fx.Node) -> fx.GraphModule:
    """`graph` as a module that gives a tuple of one, with copies of everything that it takes from `source`."""
    graph.output((output,))
    copies: dict[int, Any] = {}
    attributes: dict[str, Any] = {}
    for n in graph.nodes:
        if n.op != "get_attr":
            continue
        value = facts.attribute(source, str(n.target))
        if id(value) not in copies:  # tied weights stay tied
            copies[id(value)] = _copy(value)
        attributes[str(n.target)] = copies[id(value)]
    module = fx.GraphModule(attributes, graph, class_name="LightVersion")
    facts.tidy(module)
    for n in module.graph.nodes:  # fake values would be copied and saved with it
        n.meta.pop("val", None)
    return module


def _copy(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone())
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
