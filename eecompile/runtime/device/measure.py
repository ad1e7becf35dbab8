"""Times the stages of a device program one by one, at every bucket: what its predictions are made of.

A stage runs on rows of the inputs that it is given, whichever of them would have left before; gated regions run on the rows
that are open.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eecompile.runtime.device.deadline import pieces
from eecompile.runtime.device.machine import Simulator
from eecompile.runtime.device.nodes import Body
from eecompile.runtime.device.warm import pretend
from eecompile.runtime.timing import Piece, StageTimes


class StageRuns(Simulator):
    """Runs every stage at every bucket by itself, on the host's clock."""

    def measure(self, flat: Sequence[Tensor], times: StageTimes) -> None:
        """One round; measurements go to `times`."""
        self.begin(flat)
        for piece, bodies in zip(pieces(self.program), self.program.stages, strict=True):
            for body, rows in zip(bodies, self.program.buckets[-len(bodies) :], strict=True):
                pretend(self.values, body, rows)
                self.timed(piece, rows, body, times)

    def timed(self, piece: Piece, rows: int, body: Body, times: StageTimes) -> None:
        started = times.clock()
        self.each(body)  # what a stage makes stays: where one row needs no lists, the next stage reads it
        self.settle()
        times.add(piece, rows, times.clock() - started)
