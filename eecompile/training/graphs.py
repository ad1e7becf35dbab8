"""Training graphs: the marked graph with a frozen trunk, or the train-mode capture, with gates that decide by mode."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from eecompile.errors import EecompileError
from eecompile.passes import facts, prepare_training_graph
from eecompile.passes.every_step import with_every_step
from eecompile.passes.training_decisions import TrainMode, with_decisions
from eecompile.passes.training_graph import frozen_trunk
from eecompile.program import Program
from eecompile.runtime.origin import Origin
from eecompile.runtime.reference import ReferenceExecutor
from eecompile.signature import Signature
from eecompile.training.state import random_state, restore_random_state


class TrainingGraphs:
    """Training graphs of one program, built at first use and kept by mode.

    Args:
        program: A marked program.
        origin: What the program was made from.
        equilibrium: Whether gradients are scaled at the exits.

    Attributes:
        signature: How the train-mode capture is called, once there is one.
        exported: The train-mode capture as `torch.export` gave it.
    """

    def __init__(self, program: Program, origin: Origin, equilibrium: bool = False) -> None:
        self.program, self.origin, self.equilibrium = program, origin, equilibrium
        self.signature: Signature | None = None
        self.exported: ExportedProgram | None = None
        self._trunks: dict[bool, fx.GraphModule] = {}
        self._executors: dict[tuple[TrainMode, int | None], ReferenceExecutor] = {}

    def executor(self, mode: TrainMode, training: bool, way: int | None = None) -> ReferenceExecutor:
        """The executor of the training graph for a mode.

        Args:
            training: Whether the graph's modules are in train mode.
            way: The branch of a router that every row takes; None as `mode.gates` says.
        """
        found = self._executors.get((mode, way))
        if found is None:
            graph = with_decisions(self._of_trunk(mode.trunk), mode.gates, mode.kept_open, mode.full_share, way)
            if self.program.choices.stops:
                graph = with_every_step(graph, len(self.program.signature.outputs) + 2 + len(self.program.exits))
            found = self._executors[mode, way] = ReferenceExecutor(self.program, graph)
        assert found.marked is not None
        found.marked.train(training)
        return found

    def _of_trunk(self, trunk: bool) -> fx.GraphModule:
        """The graph with hard decisions: trunk frozen, or captured in train mode."""
        if trunk not in self._trunks:
            marked = self.program.marked
            assert marked is not None
            if not trunk:
                self._trunks[False] = frozen_trunk(marked, set(map(id, self.program.source.parameters())))
            elif self.program.capture.front_end == "blocks":
                self._trunks[True] = marked
            else:
                graph = self.train_program().marked
                assert graph is not None
                self._trunks[True] = graph
        return self._trunks[trunk]

    def train_program(self) -> Program:
        """What was inserted, in the train-mode capture of the model.

        Raises:
            CaptureError: The model gives other outputs in train mode.
            EecompileError: There is no way to capture it.
        """
        if self.origin.capture_training is None:
            raise EecompileError(
                "this program has no train-mode capture, so its trunk cannot be trained",
                got="a loaded program that was saved without one",
                wanted="trunk=False, or a program saved after training its trunk",
                hint="save again from a strategy with trunk=True",
            )
        captured = self.origin.capture_training(self.program, self.origin.captured)
        self.signature, self.exported = captured.signature, captured.exported
        return prepare_training_graph(self.program, captured.graph_module, captured.signature, self.equilibrium)

    def capture(self) -> None:
        """Captures the model in train mode now; random generators stay as they are."""
        device = facts.device_of(self.program.source)
        drawn = random_state(device)
        try:
            self._of_trunk(True)
        finally:
            restore_random_state(drawn, device)

    def reset(self) -> None:
        """Forgets what executors derived from the graphs, which read other weights now."""
        for executor in self._executors.values():
            executor.reset()

    def graphs(self) -> list[fx.GraphModule]:
        """The graphs that have been built."""
        return [*self._trunks.values(), *(e.marked for e in self._executors.values() if e.marked is not None)]

    def clear(self) -> None:
        """Drops what has been built, after a move to another device."""
        self._trunks.clear()
        self._executors.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingGraphs:
        """The same capture over copies of program and model, nothing built."""
        new = TrainingGraphs(copy.deepcopy(self.program, memo), copy.deepcopy(self.origin, memo), self.equilibrium)
        new.signature, new.exported = self.signature, self.exported  # never changed
        return new
