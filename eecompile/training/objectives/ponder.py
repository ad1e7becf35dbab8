"""The price of steps: adaptive computation time trades them against the task (Graves 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import Objective


@dataclass(frozen=True)
class Ponder(Objective):
    """Mean ponder cost N + R over rows, and over positions where each halts by itself.

    N, the number of steps, has no gradient; the remainder R has: it falls as the scores before the last step grow, so a
    step less is needed (Graves 2016, section 2.2).
    """

    name: ClassVar[str] = "ponder"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        if result.trace.ponder is None:
            raise EecompileError(
                "there is no ponder cost to train", where=where, hint="compile with a strategy that halts, such as act"
            )
        return result.trace.ponder.float().mean()
