"""Position-wise parts of halting steps: what need not be computed for the positions of a sequence that have halted.

Backwards from the state of a step, whose halted positions nothing reads: a node's halted positions are not needed where all
that read it are position-wise and theirs are not needed either, through attention by its queries. Keys and values are
needed at all positions. Neighbours among these nodes that run on any list of positions are one part, with one value that
leaves it; `LivePositions` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from eecompile.ir.settings import HALTING
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.positionwise import FOLDED, Layout, Positions, width, work
from eecompile.program import Program, Refusal, TokenPart

# Gathering or scattering one element takes as long as so many FLOPs: measured on BERT-base, 8 x 128, one thread of a CPU.
# A part of r FLOPs for each element that is moved is worth gathering where more than MOVING / r of the positions have
# halted; one for which half of them would not do is left alone.
MOVING = 40.0


@dataclass(frozen=True)
class FindTokenParts(Pass):
    """Fills `program.choices.parts`; the graph stays as it is."""

    name: ClassVar[str] = "find_token_parts"
    requires: ClassVar[frozenset[str]] = frozenset({"halting"})
    ensures: ClassVar[frozenset[str]] = frozenset({"token parts"})

    def run(self, program: Program) -> PassResult:
        finder = _Finder(program)
        refusals: list[Refusal] = []
        steps = {c.name: c for c in program.choices.charges if c.name in finder.steps}
        found = {c.name: finder.step(c.name, steps[c.name].node, refusals) for c in program.choices if c.live}
        parts = [p for mine in found.values() for p in mine]
        share = sum(p.flops for p in parts) / (sum(c.flops for c in steps.values()) or 1.0)
        summary = f"{len(parts)} parts at live positions only, {share:.0%} of the chains' FLOPs"
        return PassResult(program.replace(parts=found), False, tuple(refusals), summary)


class _Finder(facts.View):
    """The search for token parts in one graph."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.flops = program.costs.flops
        self.steps = {d.name: d.unit for d in program.choices.deciders if d.family == HALTING}
        # a block that is repeated is written out; its copies cost what the captured nodes with their weights do
        self.known = {_weights(n): f for n in self.nodes if (f := program.costs.flops.get(n.name, 0.0)) and _weights(n)}

    def step(self, name: str, kept_name: str, refusals: list[Refusal]) -> tuple[TokenPart, ...]:
        """The parts of a halting step, which has the value of the rows at node `kept_name`."""
        kept = self.names[kept_name]
        state: fx.Node = kept.args[1]  # type: ignore[assignment]
        positions = Positions(self.gm, state)
        layouts = self._unneeded(positions, state, kept)
        parts: list[TokenPart] = []
        for end, nodes in self._grouped(positions, layouts, state, kept).items():
            part = self._part(f"{name}_tokens_{len(parts)}", end, nodes, positions, layouts, kept)
            if isinstance(part, TokenPart):
                parts.append(part)
            elif part:
                refusals.append(Refusal(end.name, FindTokenParts.name, part))
        return tuple(parts)

    def _unneeded(self, positions: Positions, state: fx.Node, kept: fx.Node) -> dict[fx.Node, Layout]:
        """Nodes whose halted positions nothing needs, with the axis of their positions."""
        found: dict[fx.Node, Layout] = {}
        for n in reversed(self.nodes[: self.position[state] + 1]):
            at = 1 if n is state and self._reads(n, kept) else self._layout(positions, n, found)
            if at is not None and positions.operands(n, at) is not None and not facts.writers(n):
                found[n] = at
            elif n is state:
                break
        return found

    def _reads(self, state: fx.Node, kept: fx.Node) -> bool:
        """Whether only the choice of what is kept and the halting unit read a state."""
        return kept.args[2] is not state and all(
            u is kept or (u.op == "call_module" and u.target in self.steps.values()) for u in state.users
        )

    def _layout(self, positions: Positions, n: fx.Node, found: dict[fx.Node, Layout]) -> Layout | None:
        layouts: set[Layout] = set()
        for user in n.users:
            if user not in found:
                return None
            mine = {at for a, at in positions.operands(user, found[user]) or () if a is n}
            if not mine:
                return None  # it is another kind of operand: keys, masks
            layouts |= mine
        return layouts.pop() if len(layouts) == 1 else None

    def _grouped(
        self, positions: Positions, layouts: dict[fx.Node, Layout], state: fx.Node, kept: fx.Node
    ) -> dict[fx.Node, list[fx.Node]]:
        """Parts by the node that leaves them, each in graph order."""
        end_of: dict[fx.Node, fx.Node] = {}
        for n in sorted(layouts, key=self.position.__getitem__, reverse=True):
            if not positions.gathers(n, layouts[n]):
                continue
            ends = {end_of.get(u) for u in n.users}
            end = ends.pop() if len(ends) == 1 else None
            end_of[n] = end if end is not None and n is not state else n
        groups: dict[fx.Node, list[fx.Node]] = {}
        for n in sorted(end_of, key=self.position.__getitem__):
            groups.setdefault(end_of[n], []).append(n)
        return groups

    def _part(
        self,
        name: str,
        end: fx.Node,
        nodes: list[fx.Node],
        positions: Positions,
        layouts: dict[fx.Node, Layout],
        kept: fx.Node,
    ) -> TokenPart | str:
        """The part, or why gathering does not pay; nothing is said of parts that compute nothing."""
        if not any(work(n) for n in nodes):
            return ""
        within = set(nodes)
        given = {a: at for n in nodes for a, at in positions.operands(n, layouts[n]) or () if a not in within}
        if FOLDED in (layouts[end], *given.values()) or not facts.is_tensor(end):
            return "its positions are folded into the batch where they come in or leave"
        if any(facts.writers(a) for a in given):
            return "it reads a value that is written to in place"
        is_state = kept.args[1] is end
        past: fx.Node | None = kept.args[2] if is_state else None  # type: ignore[assignment]
        if past is not None and facts.value(past).dtype != facts.value(end).dtype:
            return "what halted positions keep has another dtype"
        # in: each input is read and written once; out: all positions are copied or filled, and the live ones written
        moved = sum(map(width, given)) + 2 * width(end)
        ratio = sum(map(work, nodes)) / moved
        if ratio < 2 * MOVING:
            return f"{ratio:.0f} FLOPs for each element that gathering would move, wanted {2 * MOVING:.0f}"
        flops = sum(self.flops.get(n.name, 0.0) or self.known.get(_weights(n), 0.0) for n in nodes)
        return TokenPart(
            name=name,
            node=end.name,
            nodes=tuple(n.name for n in nodes),
            inputs=tuple(a.name for a in given),
            past="" if past is None else past.name,
            kept="" if past is None else kept.name,
            flops=flops,
            most_live=1 - MOVING / ratio,
        )


def _weights(n: fx.Node) -> tuple[object, ...]:
    """Operator and weights of a product; empty for other nodes."""
    weights = tuple(a.target for a in n.all_input_nodes if a.op == "get_attr")
    return (n.target, *weights) if weights and isinstance(n.target, torch._ops.OpOverload) and work(n) else ()
