"""A deadline for a device program: the numbers that its kernels compare, and what they say about it afterwards.

The deadline of a call counts from when the device begins the program, less what the host has used before it launched. In
the program time is whole nanoseconds. A stage is predicted as on the CPU, `StageTimes.predict` at the rows of each bucket,
plus what comes after the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.kernels.clock import DEADLINE, END, NEVER, START, STOPPED
from eecompile.runtime.device.nodes import DeviceProgram
from eecompile.runtime.outcome import Outcome
from eecompile.runtime.timing import END as CLOSING
from eecompile.runtime.timing import Piece, StageTimes


def pieces(program: DeviceProgram) -> list[Piece]:
    """The work of each stage, as `StageTimes` names it."""
    return list(zip((-1, *program.stops), program.stops, strict=False))


def predictions(program: DeviceProgram, times: StageTimes) -> Tensor:
    """[S - 1, K] int64, nanoseconds: the stage after each decision in each bucket, and what comes after the last one."""
    closing = times.predict(CLOSING, program.batch)
    table = [[round((times.predict(p, n) + closing) * 1e9) for n in program.buckets] for p in pieces(program)[1:]]
    return torch.tensor(table, dtype=torch.int64).view(len(table), len(program.buckets))


def set_deadline(clock: Tensor, deadline: float, times: StageTimes) -> None:
    """Writes how much time is left into a program's clock, without waiting for the device.

    Args:
        clock: [5] int64.
        deadline: Seconds on the clock of `times`.
    """
    seconds = deadline - times.clock()
    clock[DEADLINE].fill_(round(seconds * 1e9) if seconds < 1e9 else NEVER)  # thirty years


@dataclass(frozen=True)
class Kept:
    """What a program's clock says after a call.

    Attributes:
        beyond: [B] bool, rows that were stopped.
        clock: [5] int64.
    """

    beyond: Tensor
    clock: Tensor

    def say(self, outcome: Outcome) -> bool:
        """Writes down why the call was stopped and whether it is late; reads the clock, which waits for the device.

        Returns:
            Whether the deadline stopped it.
        """
        clock = self.clock.tolist()
        outcome.late = clock[END] - clock[START] > clock[DEADLINE]
        if clock[STOPPED] < 0:
            return False
        outcome.stopped, outcome.final = "deadline", ~self.beyond
        return True


def kept(program: DeviceProgram, clock: Tensor, exit_index: Tensor) -> tuple[Kept, Tensor]:
    """Who was stopped, and where every row has left, [B] int64: a row that was stopped, where the program was."""
    at = clock[STOPPED]
    beyond = (at >= 0) & (exit_index == program.last)
    return Kept(beyond, clock), torch.where(beyond, at, exit_index)
