"""The regions of choices, taken out of the graph so that each arm runs on its own rows; and the arms that are possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

import eecompile.ops as ops
from eecompile.errors import PassError
from eecompile.ir.records import Arm, Choice
from eecompile.ir.settings import BUFFERS, HALTING, Settings
from eecompile.passes import facts
from eecompile.passes.extract import Extractor, extract
from eecompile.passes.find_regions import exclusive
from eecompile.passes.live_positions import extract_at_live
from eecompile.passes.partition import Partition, opened
from eecompile.program import Program

Possible = tuple[frozenset[int], ...]
"""Of each of `program.choices`, the arms that rows can still take, whatever the input."""

SKIP, RUN = frozenset({0}), frozenset({1})
EITHER = SKIP | RUN

# Operators that run as their definitions once a program is lowered: the definitions are quicker to call.
DEFINITIONS = {torch.ops.eecompile.gate.default: ops.gate, torch.ops.eecompile.halt.default: ops.halt}


def defined(graph: fx.Graph) -> bool:
    """Puts the definitions in place of the operators of gates and halting; gives whether there were any."""
    found = [n for n in graph.nodes if n.target in DEFINITIONS]
    for n in found:
        n.target = DEFINITIONS[n.target]
    return bool(found)


class Regions:
    """The regions of a marked graph's choices: which nodes are inside which.

    Args:
        live_only: Whether position-wise parts of halting steps run at live positions only.
    """

    def __init__(self, program: Program, gm: fx.GraphModule, batch: facts.Batch, live_only: bool = False) -> None:
        self.live_only = live_only
        self.choices, self.gm, self.batch = program.choices, gm, batch
        nodes = list(gm.graph.nodes)
        position = {n: i for i, n in enumerate(nodes)}
        self.names = names = facts.by_name(gm)
        self.inside: dict[fx.Node, int] = {}
        self.ends: dict[fx.Node, int] = {}
        self.nodes: list[list[fx.Node]] = []
        for i, c in enumerate(self.choices):
            ys = [names[v] for arm in c.arms if not arm.skips for v in arm.values] + [names[n] for n in c.inner]
            past = [v for arm in c.arms if arm.skips for v in arm.values]
            stops = {names[n] for n in (*past, *c.reads, *c.index)}
            found = exclusive(nodes, position, ys, stops)
            self.nodes.append(found)
            self.inside |= dict.fromkeys(found, i)
            self.ends |= {names[m.node]: i for m in c.merges}

    def plain(self, arms: Possible) -> dict[fx.Node, fx.Node]:
        """Outputs of chains whose halting is closed, and the value that the model as it was has there."""
        if not self.choices.chains:
            return {}
        steps = dict(zip((c.name for c in self.choices), arms, strict=True))
        return {
            self.names[h.output]: self.names[h.ys[0 if h.repeated else -1]]
            for h in self.choices.chains
            if len(steps[h.steps[-1].name]) == 1
        }

    def end(self, i: int) -> fx.Node:
        """The first node that hands on something of region i: all of the region is computed there."""
        return self.names[self.choices[i].merges[0].node]

    def serves(self, i: int, needed: set[fx.Node]) -> bool:
        """Whether anything in region i is needed, if only as the value of a chain that does not halt."""
        return any(n in needed for n in self.nodes[i])

    def body(
        self, i: int, part: Extractor, arm: Arm, values: Sequence[fx.Node], whole: bool = False
    ) -> tuple[fx.GraphModule, list[fx.Node]]:
        """What computes an arm's values in region i as a module, without what `part` has; and the nodes that it takes.

        Args:
            whole: Whether it has every node of the region, also those that no value needs.
        """
        choice = self.choices[i]
        needed = set(self.nodes[i]) if whole else facts.needed_for(values)
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
        name = f"{choice.name}_{arm.name}"
        if self.live_only and choice.parts:
            return extract_at_live(self.gm, mine, list(inputs), values, name, choice), list(inputs)
        return extract(self.gm, mine, list(inputs), values, name), list(inputs)

    def copy_into(self, part: Extractor, i: int, possible: frozenset[int], needed: set[fx.Node] | None = None) -> None:
        """Writes region i into `part`: in line where one arm is left, else as a `Partition` over the arms that rows can
        still take. What stands for its merges is there then.

        Args:
            needed: What is not among these is left out.
        """
        choice = self.choices[i]
        read = [k for k, m in enumerate(choice.merges) if needed is None or self.names[m.node] in needed]
        if len(possible) == 1:
            self._in_line(part, i, choice.arms[min(possible)], read, needed)
            return
        kept = read or list(range(len(choice.merges)))  # what a chain reports at its end is carried where it is read
        index, first = self._index(part, choice, possible)
        bodies: dict[int, fx.GraphModule] = {}
        taken: dict[int, list[fx.Node]] = {}
        past: tuple[fx.Node, ...] | None = None
        for k in sorted(possible):
            arm = choice.arms[k]
            values = [self.names[arm.values[j]] for j in kept]
            if arm.skips:
                past = tuple(part.resolve(v) for v in values)
            else:
                bodies[k - first], taken[k - first] = self._arm(part, i, arm, values)
        inputs = list(dict.fromkeys(n for given in taken.values() for n in given))
        takes = {k: [inputs.index(n) for n in given] for k, given in taken.items()}
        merges = [choice.merges[j] for j in kept]
        target = f"{choice.name}_region"
        axes = [self._axis(n, choice) for n in inputs]
        part.modules[target] = Partition(bodies, takes, axes, [m.batch_axis for m in merges])
        call = part.graph.call_module(target, (index, past, *(part.resolve(n) for n in inputs)))
        for k, m in enumerate(merges):
            part.env[self.names[m.node]] = part.item(call, k, self.names[m.node])

    def _in_line(self, part: Extractor, i: int, arm: Arm, read: Sequence[int], needed: set[fx.Node] | None) -> None:
        """Every row takes this arm; `read` are the merges that are read."""
        values = [self.names[v] for v in arm.values]
        mine = set() if arm.skips else facts.needed_for(values)
        for n in self.nodes[i]:
            if n in mine and (needed is None or n in needed):
                part.copy_unless_outer(n)
        for k, (m, value) in enumerate(zip(self.choices[i].merges, values, strict=True)):
            if k in read or value in part.env:
                part.env[self.names[m.node]] = part.resolve(value)

    def _arm(self, part: Extractor, i: int, arm: Arm, values: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
        """The body of an arm. One that is a graph of its own is taken as it is, unless it reads what the region computes."""
        inputs = [self.names[n] for n in arm.inputs]
        if inputs and not set(inputs) & set(self.nodes[i]):
            found: fx.GraphModule = facts.attribute(self.gm, arm.module)
            return found, inputs
        body, inputs = self.body(i, part, arm, values)
        if defined(body.graph):
            body.recompile()
        return body, inputs

    def _index(self, part: Extractor, choice: Choice, possible: frozenset[int]) -> tuple[fx.Node, int]:
        """A node that says which arm a row takes, and which one it counts from."""
        low, high = min(possible), max(possible)
        if len(choice.index) < len(choice.arms) - 1:
            return part.resolve(self.names[choice.index[0]]), 0
        asked = [part.resolve(self.names[n]) for n in choice.index[low:high]]
        return asked[0] if len(asked) == 1 else part.graph.call_function(opened, tuple(asked)), low

    def show_in(self, part: Extractor, i: int) -> None:
        """Writes region i into `part` as submodules that compute every row, followed by the choice itself."""
        choice = self.choices[i]
        arms = [arm for arm in choice.arms if not arm.skips]
        for arm in arms:
            values = [self.names[v] for v in arm.values]
            name = f"{choice.name}_region" if len(arms) == 1 else f"{choice.name}_{arm.name}"
            part.modules[name], inputs = self.body(i, part, arm, values, whole=len(arms) == 1)
            call = part.graph.call_module(name, tuple(part.resolve(n) for n in inputs))
            for k, value in enumerate(values):
                part.env[value] = part.item(call, k, value)
        for node in (*choice.inner, *(m.node for m in choice.merges)):
            part.copy(self.names[node])

    def _axis(self, n: fx.Node, choice: Choice) -> int | None:
        axis = None if n.op == "get_attr" else self.batch.axis(n)
        if isinstance(axis, str):
            raise PassError(
                "a gated region reads a value that cannot be gathered", where=choice.region, got=f"{n.name} {axis}"
            )
        return axis


def possible(program: Program, settings: Settings | None) -> Possible:
    """Of all choices: the arms that rows can take under these settings; all of them without settings."""
    if settings is None:
        return tuple(frozenset(range(len(c.arms))) for c in program.choices)
    values, found = settings.to_dict(), list[frozenset[int]]()
    gates: dict[str, frozenset[int]] = {"": RUN}
    for c in program.choices:
        arms = _arms(c, values[c.family], settings.halts)
        if c.gates:
            arms = SKIP if gates[c.needs] == SKIP else arms if gates[c.needs] == RUN else frozenset(range(max(arms) + 1))
            gates |= _gates(c, arms)
        found.append(arms)
    return tuple(found)


def _arms(choice: Choice, values: Mapping[str, float], halts: bool) -> frozenset[int]:
    """The arms that rows can take, whatever the input, under a family's values; `halts` whether rows may halt."""
    if choice.family == HALTING:
        return EITHER if halts or choice.live else frozenset({choice.usual})
    if not choice.gates:
        return frozenset(k for k, margin in enumerate(values.values()) if margin <= 1)
    thresholds = [values[g] for g in choice.gates]  # each gate opens one arm more, where those before it are open
    least = next((k for k, t in enumerate(thresholds) if t > 0), len(thresholds))
    most = next((k for k, t in enumerate(thresholds) if t > 1), len(thresholds))
    return frozenset(range(least, most + 1))


def decisions(program: Program, arms: Possible) -> dict[str, frozenset[int]]:
    """What each gate, halting step and router can still decide, by name: 0 and 1 for closed and open, or a branch."""
    found: dict[str, frozenset[int]] = {}
    for c, possible in zip(program.choices, arms, strict=True):
        found |= _gates(c, possible) if c.gates else {c.name: possible}
    return found


def _gates(choice: Choice, arms: frozenset[int]) -> dict[str, frozenset[int]]:
    """What each gate of a choice can decide where these arms are possible: 0 and 1 for closed and open."""
    return {name: frozenset(int(k > j) for k in arms) for j, name in enumerate(choice.gates)}
