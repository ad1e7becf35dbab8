"""The reference executor: the marked graph as it stands. Computes everything, then selects. Truth, and training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from eecompile.program import Program
from eecompile.runtime.outcome import Outcome


class ReferenceExecutor:
    """Runs `program.marked`."""

    name = "reference"

    def __init__(self, program: Program, marked: fx.GraphModule | None = None) -> None:
        self.program = program
        self.marked = marked if marked is not None else program.marked

    def run(self, flat: Sequence[Tensor], want_confidence: bool = True) -> Outcome:
        assert self.marked is not None
        results = list(self.marked(*flat))
        count, exits = len(self.program.signature.outputs), len(self.program.exits)
        leaves, (index, confidence), rest = results[:count], results[count : count + 2], results[count + 2 :]
        scores = tuple(rest[2 * exits + 2 :])
        return Outcome(
            leaves=leaves,
            exit_index=index,
            confidence=confidence,
            outputs=tuple(rest[: exits + 1]),
            confidences=tuple(rest[exits + 1 : 2 * exits + 2]),
            scores=scores or None,
        )

    def reset(self) -> None:
        """Nothing is derived."""


def every_exit(outcome: Outcome) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and confidences of all exits, confidences with NaN as 0."""
    assert outcome.outputs is not None and outcome.confidences is not None
    return outcome.outputs, tuple(torch.nan_to_num(c, nan=0.0) for c in outcome.confidences)
