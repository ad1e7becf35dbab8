"""What an executor hands back, and the values of output leaves that no row reached."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import sympy
import torch
from torch import Tensor

from eecompile.ir.settings import Settings
from eecompile.program import Program
from eecompile.reasons import Unless
from eecompile.runtime.limits import Allowance
from eecompile.runtime.survivors import Survivors
from eecompile.runtime.timing import Piece, StageTimes
from eecompile.signature import Leaf, Signature


@dataclass
class Outcome:
    """Flat results of one call.

    Attributes:
        leaves: The model's output leaves, in order.
        exit_index: [B] int64.
        confidence: [B] float32; None where it was not asked for.
        outputs: Prediction of every exit and of the model itself, batch first; None unless everything was computed.
        confidences: [B] each, NaN where an exit has none.
        scores: Exit scores, `[B, 1]` each.
        separate: Where exits are combined: what each head says by itself and, last, the model.
        final: [B] bool: rows that left by themselves; None for all of them.
        stopped: Why the call was stopped before every row was final: "deadline", "budget" or "interrupt".
        late: Whether the output came after the deadline, or costs more than the budget.
        closing: Where the call was timed: when the output began to be put together, on the executor's clock, and the rows of
            the call. The caller that returns the output to the user ends that measurement.
        step_outputs: While probabilities of stopping are trained: prediction at every step but the last.
        step_scores: [B, K] those probabilities.
        reports: `program.choices.reports` by name, batch first; those for training from the marked graph only.
    """

    leaves: list[Tensor]
    exit_index: Tensor
    confidence: Tensor | None
    outputs: tuple[Tensor, ...] | None = None
    confidences: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    separate: tuple[Tensor, ...] | None = None
    final: Tensor | None = None
    stopped: str | Unless | None = None
    late: bool = False
    closing: tuple[float, int] | None = None
    step_outputs: tuple[Tensor, ...] = ()
    step_scores: Tensor | None = None
    reports: dict[str, Tensor] = field(default_factory=dict)


class Executor(Protocol):
    """Runs a program on flat inputs."""

    name: str
    times: StageTimes

    def run(
        self, flat: Sequence[Tensor], settings: Settings, want_confidence: bool, allowance: Allowance | None = None
    ) -> Outcome:
        """One call under these settings; with an allowance, the best output that it lets the call have."""
        ...

    def stream(self, flat: Sequence[Tensor], settings: Settings, allowance: Allowance) -> Generator[Outcome, None, None]:
        """The output after each open exit, until every row is final."""
        ...

    def measure(self, flat: Sequence[Tensor], settings: Settings) -> Outcome | None:
        """Runs every piece once on all rows, for `times`; the outcome, where putting it together is timed too."""
        ...

    def interrupt(self) -> int:
        """Stops the calls that run now, in any thread, after their next decision; gives how many there are."""
        ...

    def reset(self) -> None:
        """Forgets everything that was derived from the program's graphs (after a move to another device)."""
        ...


def assemble(
    program: Program,
    flat: Sequence[Tensor],
    survivors: Survivors,
    leaves: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    want_confidence: bool,
) -> Outcome:
    """The outcome of a call that compacted: predictions by row, other leaves where they were computed."""
    signature, at = program.signature, program.prediction.index
    assert at is not None and survivors.prediction is not None and survivors.exit_index is not None
    axis = signature.outputs[at].batch_axis
    filled = list(leaves)
    filled[at] = survivors.prediction.movedim(0, axis) if axis else survivors.prediction
    done = completed(program, filled, flat, survivors.device, dtypes)
    confidence = None
    if want_confidence and survivors.confidence is not None:
        confidence = torch.nan_to_num(survivors.confidence, nan=0.0)
    return Outcome(done, survivors.exit_index, confidence, final=survivors.final)


def completed(
    program: Program,
    leaves: Sequence[Tensor | None],
    flat: Sequence[Tensor],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Output leaves that no row reached hold nothing; those that the tail computes hold the prediction until then."""
    later = () if program.prediction.tail is None else program.prediction.tail.slots
    filled = [leaves[program.prediction.index or 0] if i in later else t for i, t in enumerate(leaves)]
    return [
        nothing(leaf, program.signature, flat, device, dtype) if t is None else t
        for t, leaf, dtype in zip(filled, program.signature.outputs, dtypes, strict=True)
    ]


def times_of(program: Program) -> StageTimes:
    """Times of this program's pieces, nothing measured yet."""
    spent = [0.0]
    for stage in program.stages:
        spent.append(spent[-1] + stage.flops + sum(cost for _, cost in stage.only_for))

    def work(piece: Piece) -> float:
        start, stop = piece
        if stop < -1:
            return 0.0
        head = program.exits[stop].head_flops if stop < len(program.exits) else 0.0
        return spent[stop + 1] - spent[start + 1] + head

    return StageTimes(work)


def nothing(like: Leaf, signature: Signature, flat: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """An output leaf that holds nothing: NaN, or 0 where the dtype has no NaN. Sizes from the call's inputs."""
    sizes = signature.lengths(flat)
    shape = [s if isinstance(s, int) else _size(s, sizes) for s in like.shape]
    fill = math.nan if dtype.is_floating_point else 0
    return torch.full(shape, fill, dtype=dtype, device=device)


def _size(text: str, sizes: dict[str, int]) -> int:
    if text in sizes:
        return sizes[text]
    return int(sympy.sympify(text, locals={n: sympy.Symbol(n) for n in sizes}).subs(sizes))
