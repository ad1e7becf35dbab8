"""Cuts the marked graph into stages at the exits: the staged graph, a page long.

It computes what the marked graph computes, in the same order; each stage is a submodule from one live set to the next.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from eecompile.errors import PassError
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.extract import Extractor
from eecompile.passes.regions import Possible, Regions
from eecompile.program import Live, Program, Stage


def inserted(node: fx.Node) -> bool:
    """Whether a pass put this node there."""
    return "eecompile" in node.meta


@dataclass(frozen=True)
class StagePass(Pass):
    """Fills `program.stages` and builds the staged graph."""

    name: ClassVar[str] = "stage"
    requires: ClassVar[frozenset[str]] = frozenset({"marked"})
    ensures: ClassVar[frozenset[str]] = frozenset({"staged"})

    def run(self, program: Program) -> PassResult:
        layout = Layout(program)
        choices, by_exit = program.choices, layout.only_for()
        begins = {node: layout.stage_of(node) for node in choices.places}
        # whether a row takes a step is known before an exit that lies in between: a row that exits there does not take it
        steps = {c.name: begins[c.node] for c in choices.charges}
        program = program.replace(
            reports=tuple(replace(r, stage=steps.get(r.name, layout.stage_of(r.node))) for r in choices.reports),
            begins=begins,
            only_for={n.name: exits for n, exits in by_exit.items()},
        )
        stages = layout.stages()
        staged = _staged_graph(program, layout, stages)
        done = program.replace(graph_module=staged, level="staged", marked=program.graph_module, stages=stages)
        return PassResult(done, True, summary=f"{len(stages)} stages")


class Layout:
    """The trunk's nodes between the exits of a marked graph, and what crosses each boundary.

    Args:
        live_only: Whether position-wise parts of halting steps are lowered to run at live positions only.
    """

    def __init__(self, program: Program, live_only: bool = False) -> None:
        self.program = program
        self.gm = program.graph_module if program.level == "marked" else program.marked
        if self.gm is None:
            raise PassError("no marked graph yet", hint="run insert_exits first")
        self.names = facts.by_name(self.gm)
        self.trunk = [n for n in self.gm.graph.nodes if not inserted(n) and n.op != "output"]
        self.position = {n: i for i, n in enumerate(self.trunk)}
        self.batch = facts.Batch(self.gm, program.signature)
        self.learned = facts.trunk_nodes(self.gm, self.batch)
        self.regions = Regions(program, self.gm, self.batch, live_only)
        shape = program.prediction_leaf.shape
        self.positions = len(shape) == 3
        self.bounds = [self.position[self.names[e.after]] for e in program.exits]
        count = len(program.signature.outputs)
        given = list(self.gm.graph.output_node().args[0])[:count]  # type: ignore[arg-type]
        # the leaves as the trunk gives them, before selection and blanking
        self.leaves = [self._trunk_leaf(g) for g in given]
        # where rows go between branches: `choose` reads it off what is admitted, and lowering groups rows by it
        own = [c for c in program.choices if any(arm.module for arm in c.arms)]
        self.choices = {self.names[c.index[0]]: self.names[c.merges[0].node] for c in own}
        self.own = self._whole(facts.needed_for([*self.leaves, self.prediction(), *self.choices]), None)

    def _trunk_leaf(self, given: Any) -> fx.Node:
        node = given
        while inserted(node):
            if node.target is not torch.ops.eecompile.blank.default:  # the selected prediction
                return self.prediction()
            node = node.args[0]
        return node  # type: ignore[no-any-return]

    def prediction(self) -> fx.Node:
        """The model's own prediction, as the trunk gives it."""
        node = self.names.get("prediction_rows")
        if node is not None:
            return node.args[0]  # type: ignore[return-value]
        outputs = self.names["selection"].args[0]
        return outputs[-1]  # type: ignore[index,return-value]

    def stage_of(self, name: str) -> int:
        """How many exits lie before a node of the trunk."""
        position = self.position[self.names[name]]
        return sum(b < position for b in self.bounds)

    def interval(self, start: int, stop: int) -> list[fx.Node]:
        """Trunk nodes after exit `start` (-1: from the input) up to exit `stop` (len(exits): to the end)."""
        low = 0 if start < 0 else self.bounds[start] + 1
        high = len(self.trunk) if stop >= len(self.bounds) else self.bounds[stop] + 1
        return self.trunk[low:high]

    def needed(self, exits: Iterable[int], arms: Possible | None = None) -> set[fx.Node]:
        """Trunk nodes that the model's own output or one of these exits needs.

        Args:
            arms: What rows can take: chains whose halting is closed need no scores.
        """
        plain = {} if arms is None else self.regions.plain(arms)
        own = self.own if not plain else facts.needed_for([*self.leaves, self.prediction(), *self.choices], plain)
        heads = [self.names[n] for k in exits for n in self.program.exits[k].reads]
        further = [n for n in heads if n not in own]  # none, but in a cascade of models
        return self._whole(own | facts.needed_for(further, plain), arms) if further or plain else own

    def _whole(self, needed: set[fx.Node], arms: Possible | None) -> set[fx.Node]:
        """With all that a halting step carries on where it runs on some rows, if only a report reads it."""
        for i, c in enumerate(self.regions.choices):
            if len(c.merges) > 1 and (arms is None or len(arms[i]) > 1) and self.regions.serves(i, needed):
                needed = needed | facts.needed_for(self.names[v] for v in c.arms[-1].values)
        return needed

    def copy_interval(
        self, part: Extractor, start: int, stop: int, arms: Possible | None = None, needed: set[fx.Node] | None = None
    ) -> None:
        """Copies the work between two exits into `part`.

        Args:
            arms: What rows can take; None shows gated regions as submodules that compute every row.
            needed: Leave out what is not among these; None copies everything.
        """
        regions = self.regions
        plain = {} if arms is None else regions.plain(arms)
        for n in self.interval(start, stop):
            if n in part.env or n in regions.inside:
                continue
            if (
                needed is not None
                and n not in needed
                and not (n in regions.ends and regions.serves(regions.ends[n], needed))
            ):
                continue
            if n in plain:
                part.env[n] = part.resolve(plain[n])
                continue
            if n in regions.ends:
                i = regions.ends[n]
                if arms is None:
                    regions.show_in(part, i)
                else:
                    regions.copy_into(part, i, arms[i], needed)
                continue
            part.copy_unless_outer(n)

    def needed_at(self, node: fx.Node) -> int:
        """Position at which a node reads its inputs: all of a gated region is computed at the region's end."""
        i = self.regions.inside.get(node)
        return self.position.get(node, -1) if i is None else self.position[self.regions.end(i)]

    def live(self, exit_index: int, later: tuple[int, ...] | None = None, arms: Possible | None = None) -> list[fx.Node]:
        """Tensors that cross the boundary at an exit; `later` are the open exits after it (None: all)."""
        p = self.bounds[exit_index]
        wanted = range(exit_index + 1, len(self.bounds)) if later is None else later
        exits = self.program.exits
        heads = {self.names[n] for k in wanted for n in exits[k].reads}
        # predictions per position leave padding out of the confidence, to the very end
        heads |= {self.names[e.mask_input] for e in exits if e.mask_input and self.positions}
        heads |= {choice for choice, node in self.choices.items() if self.position[node] > p}
        needed = self.needed(wanted, arms)  # work of a closed exit does not run: what only it reads need not survive
        out = []
        for n in self.trunk[: p + 1]:
            if n.op == "get_attr" or not facts.is_tensor(n) or n in self.regions.inside:
                continue
            used = any(self.needed_at(u) > p and u in needed for u in n.users) or n in heads
            if used:
                out.append(n)
        sizes = [
            n
            for n in self.trunk[: p + 1]
            if facts.is_symbolic_number(n) and any(self.needed_at(u) > p and u in needed for u in n.users)
        ]
        further = facts.size_sources(sizes, out)
        return sorted([*out, *further], key=self.position.__getitem__) if further else out

    def produced(self, start: int, stop: int) -> list[int]:
        """Indices of the output leaves that are computed between two exits, the prediction left out."""
        inside = set(self.interval(start, stop))
        prediction = self.prediction()
        return [i for i, n in enumerate(self.leaves) if n in inside and n is not prediction]

    def reported(self, start: int, stop: int) -> list[fx.Node]:
        """Nodes of the reports that are computed between two exits."""
        inside = set(self.interval(start, stop))
        return [n for r in self.program.choices.reports if (n := self.names[r.node]) in inside]

    def as_live(self, nodes: list[fx.Node]) -> tuple[Live, ...]:
        return tuple(self.batch.live(n, n in self.learned) for n in nodes)

    def inputs(self) -> list[fx.Node]:
        return [n for n in self.trunk if n.op == "placeholder"]

    def stages(self) -> tuple[Stage, ...]:
        count = len(self.bounds)
        found = []
        incoming = self.as_live(self.inputs())
        by_exit = self.only_for()
        for k in range(count + 1):
            nodes = [n for n in self.interval(k - 1, k) if n.op not in ("placeholder", "get_attr")]
            outgoing = self.as_live(self.live(k)) if k < count else self.as_live(_tensors(self.leaves))
            flops, only = 0.0, dict[tuple[int, ...], float]()
            for n in nodes:
                cost = self.program.costs.flops.get(n.name, 0.0)
                if n in self.own:
                    flops += cost
                elif cost:
                    only[by_exit.get(n, ())] = only.get(by_exit.get(n, ()), 0.0) + cost
            exit_index = k if k < count else None
            found.append(Stage(f"stage_{k}", incoming, outgoing, exit_index, flops, len(nodes), tuple(only.items())))
            incoming = outgoing
        return tuple(found)

    def only_for(self) -> dict[fx.Node, tuple[int, ...]]:
        """The exits for which each node is needed that the model's own output does not need."""
        found: dict[fx.Node, tuple[int, ...]] = {}
        for k in range(len(self.program.exits)):
            for n in self.needed((k,)) - self.own:
                found[n] = (*found.get(n, ()), k)
        return found


def _tensors(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in dict.fromkeys(nodes) if n.op != "get_attr"]


def _staged_graph(program: Program, layout: Layout, stages: tuple[Stage, ...]) -> fx.GraphModule:
    """The marked graph with the trunk between two exits as one submodule."""
    gm = layout.gm
    assert gm is not None
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    parts: dict[str, Any] = {}
    values: dict[str, fx.Node] = {}
    for n in layout.inputs():
        env[n] = graph.node_copy(n)
        values[n.name] = env[n]
    marks = [n for n in gm.graph.nodes if inserted(n) and n.op == "get_attr"]
    for n in marks:
        env[n] = graph.node_copy(n)
    output = gm.graph.output_node()
    exit_nodes = _inserted_by_boundary(gm, layout)
    for k, stage in enumerate(stages):
        taken = [layout.names[v.node] for v in stage.inputs]
        leaves = [layout.leaves[i] for i in layout.produced(k - 1, k)]
        if k == len(stages) - 1:
            leaves.append(layout.prediction())
        handed = [layout.names[v.node] for v in stage.outputs] if stage.exit is not None else []
        if stage.exit is not None:  # a head may read what is not needed afterwards
            handed += [layout.names[n] for n in program.exits[stage.exit].reads]
        given = list(dict.fromkeys([*handed, *leaves, *layout.reported(k - 1, k)]))
        passed = [n for n in given if n in taken]
        given = [n for n in given if n not in taken]
        part = Extractor(gm)
        for n in taken:
            part.placeholder(n)
        layout.copy_interval(part, k - 1, k)
        module = part.finish([part.resolve(n) for n in given], f"Stage{k}")
        parts[stage.name] = module
        call = graph.call_module(stage.name, tuple(values[n.name] for n in taken))
        call._rename(f"{stage.name}_out")
        for i, n in enumerate(given):
            item = graph.call_function(operator.getitem, (call, i))
            item._rename(n.name)
            item.meta = {k2: v for k2, v in n.meta.items() if k2 in ("val", "stack")}
            env[n] = values[n.name] = item
        for n in passed:
            env[n] = values[n.name]
        for n in exit_nodes[k]:
            env[n] = graph.node_copy(n, lambda a: _value(a, env, gm, graph))
    graph.output(fx.node.map_arg(output.args[0], lambda a: _value(a, env, gm, graph)))
    return facts.tidy_module_of(gm, graph, "Staged", parts)


def _value(node: fx.Node, env: dict[fx.Node, fx.Node], gm: fx.GraphModule, graph: fx.Graph) -> fx.Node:
    if node not in env:
        if node.op != "get_attr":
            raise PassError("a value is lost between stages", where=node.name)
        env[node] = graph.node_copy(node)
    return env[node]


def _inserted_by_boundary(gm: fx.GraphModule, layout: Layout) -> list[list[fx.Node]]:
    """Inserted nodes after each boundary, the selection after the last."""
    groups: list[list[fx.Node]] = [[] for _ in range(len(layout.bounds) + 1)]
    for n in gm.graph.nodes:
        if not inserted(n) or n.op == "get_attr":
            continue
        mark = n.meta["eecompile"]
        groups[mark if mark >= 0 else len(layout.bounds)].append(n)
    return groups
