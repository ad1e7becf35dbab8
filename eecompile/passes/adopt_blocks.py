"""Blocks, cuts and costs of a model that was captured as blocks: measured by the front end, adopted as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Anchor, Block, Cut, Live, Program, Stage


@dataclass(frozen=True)
class AdoptBlocks(Pass):
    """Fills blocks, cuts and costs from a `BlocksFound` of `capture/blocks.py`."""

    name: ClassVar[str] = "adopt_blocks"
    ensures: ClassVar[frozenset[str]] = frozenset({"normalized", "costs", "blocks", "cuts"})

    found: Any

    def run(self, program: Program) -> PassResult:
        nodes = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
        taps = nodes[: len(self.found.taps)]
        flops = {n.name: t.flops for n, t in zip(taps, self.found.taps, strict=True)}
        last = facts.output_leaves(program.graph_module)[-1]
        flops[last.name] = self.found.rest_flops
        total = sum(flops.values()) or 1.0
        if not any(flops.values()):  # nothing that torch's counter knows: every block counts the same
            flops = {n.name: 1.0 for n in taps}
            total = float(len(taps)) + 1.0
            flops[last.name] = 1.0
        masks = tuple(
            Live(n.name, leaf.batch_axis, leaf.shape, str(leaf.dtype).removeprefix("torch."), False)
            for n, leaf in zip(facts.placeholders(program.graph_module), program.signature.inputs, strict=True)
        )
        blocks, cuts, spent = [], [], 0.0
        for n, t in zip(taps, self.found.taps, strict=True):
            spent += flops[n.name]
            blocks.append(Block(t.name, t.kind, n.name, n.name, n.name, flops[n.name]))
            live = (Live(n.name, t.batch_axis, t.sizes, t.dtype, True), *masks)
            anchor = Anchor(t.name, 0, "block", 0)
            cuts.append(Cut(t.name, n.name, n.name, live, spent / total, True, True, anchor))
        done = program.replace(blocks=tuple(blocks), cuts=tuple(cuts), flops=flops)
        return PassResult(done, False, summary=f"{len(blocks)} blocks")


@dataclass(frozen=True)
class StageBlocks(Pass):
    """Stages of a model that was captured as blocks: costs only; the work between them is the Python model's."""

    name: ClassVar[str] = "stage"
    requires: ClassVar[frozenset[str]] = frozenset({"marked"})
    ensures: ClassVar[frozenset[str]] = frozenset({"staged", "scheduled"})

    def run(self, program: Program) -> PassResult:
        marked = program.graph_module
        ends = [e.after for e in program.exits]
        stages: list[Stage] = []
        flops, nodes = 0.0, 0
        for name, cost in program.costs.flops.items():  # not the graph's nodes: it has only the blocks that an exit reads
            flops += cost
            nodes += 1
            if name in ends:
                stages.append(Stage(f"stage_{len(stages)}", (), (), len(stages), flops, nodes))
                flops, nodes = 0.0, 0
        stages.append(Stage(f"stage_{len(stages)}", (), (), None, flops, nodes))
        done = program.replace(marked=marked, stages=tuple(stages), level="schedule")
        return PassResult(done, False, summary=f"{len(stages)} stages, run by gather and scatter around the blocks")
