"""The reference executor: the marked graph as it stands. Computes everything, then selects. Truth, and training.

It also says what a stream or a budget would have given: everything is computed, and each row then takes what it would
have had at that exit. A deadline it cannot keep.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.errors import StrategyError
from eecompile.ir.settings import Settings
from eecompile.kernels.blank import blank
from eecompile.passes import facts
from eecompile.passes.every_step import split_off
from eecompile.passes.settings import with_settings
from eecompile.program import Program
from eecompile.runtime.limits import Allowance
from eecompile.runtime.outcome import Outcome, times_of


class ReferenceExecutor:
    """Runs `program.marked`."""

    name = "reference"

    def __init__(self, program: Program, marked: fx.GraphModule | None = None) -> None:
        self.program = program
        self.marked = marked if marked is not None else program.marked
        self.times = times_of(program)
        self._code: tuple[Callable[..., Any], tuple[str, ...]] | None = None

    def _results(self, flat: Sequence[Tensor], settings: Settings) -> Any:
        """What the marked graph gives. Its code is run with settings handed in and everything else read from the graph as it
        is, so that settings which another thread sets meanwhile, or puts into the graph, are not seen."""
        assert self.marked is not None
        if self._code is None:
            module, names = with_settings(self.marked)
            self._code = type(module).forward, names
        forward, names = self._code
        tensors = settings.tensors(facts.device_of(self.marked))
        return forward(self.marked, *(tensors[name] for name in names), *flat)

    def run(
        self,
        flat: Sequence[Tensor],
        settings: Settings,
        want_confidence: bool = True,
        allowance: Allowance | None = None,
    ) -> Outcome:
        assert self.marked is not None
        results, step_outputs, step_scores = split_off(self.marked, self._results(flat, settings))
        count, exits = len(self.program.signature.outputs), len(self.program.exits)
        leaves, (index, confidence), rest = results[:count], results[count : count + 2], results[count + 2 :]
        asked = self.program.choices.reports
        rest, values = (rest[: -len(asked)], rest[-len(asked) :]) if asked else (rest, [])
        rest, last = rest[: 2 * exits + 2], rest[2 * exits + 2 :]
        learned = exits if exits and self.program.exits[0].criterion.learned else 0
        reports = {
            r.name: v if self.marked.training else reached(v, index, r.stage) for r, v in zip(asked, values, strict=True)
        }
        outcome = Outcome(
            leaves=leaves,
            exit_index=index,
            confidence=confidence,
            outputs=tuple(o.to(rest[exits].dtype) for o in rest[: exits + 1]),
            confidences=tuple(rest[exits + 1 : 2 * exits + 2]),
            scores=tuple(last[:learned]) or None,
            separate=tuple(last[learned:]) or None,
            step_outputs=step_outputs,
            step_scores=step_scores,
            reports=reports,
        )
        if allowance is None or allowance.deepest is None:
            return outcome
        cut = self.stopped_at(outcome, allowance.deepest)
        cut.late = allowance.over
        cut.stopped = None if cut.final is None else "budget"
        return cut

    def stream(self, flat: Sequence[Tensor], settings: Settings, allowance: Allowance) -> Generator[Outcome, None, None]:
        outcome = self.run(flat, settings)
        for k in settings.open_exits:
            cut = self.stopped_at(outcome, k)
            last = k == allowance.deepest
            cut.late, cut.stopped = allowance.over, "budget" if last and cut.final is not None else None
            yield cut
            if last or cut.final is None:
                return
        yield self.stopped_at(outcome, len(self.program.exits))

    def stopped_at(self, outcome: Outcome, k: int) -> Outcome:
        """What every row would have had if the call had been stopped at exit k."""
        assert outcome.outputs is not None and outcome.confidences is not None and outcome.confidence is not None
        assert self.marked is not None
        beyond = outcome.exit_index > k
        index = outcome.exit_index.clamp(max=k)
        at = self.program.prediction.index or 0
        axis = self.program.signature.outputs[at].batch_axis or 0
        prediction = outcome.leaves[at].movedim(axis, 0)
        prediction = torch.where(beyond.view(-1, *(1,) * (prediction.ndim - 1)), outcome.outputs[k], prediction)
        confidence = torch.where(beyond, torch.nan_to_num(outcome.confidences[k], nan=0.0), outcome.confidence)
        leaves = list(outcome.leaves)
        for i, node in enumerate(facts.output_leaves(self.marked)[: len(leaves)]):
            if node.target is torch.ops.eecompile.blank.default:
                available, batch_axis = node.args[2:4]
                assert isinstance(available, int) and isinstance(batch_axis, int)
                leaves[i] = blank(leaves[i], index, available, batch_axis)
        leaves[at] = prediction.movedim(0, axis)
        final = ~beyond if bool(beyond.any()) else None
        reports = {r.name: reached(outcome.reports[r.name], index, r.stage) for r in self.program.choices.reports}
        return Outcome(leaves, index, confidence, reports=reports, final=final)

    def measure(self, flat: Sequence[Tensor], settings: Settings) -> None:
        raise StrategyError(
            "the reference executor has no stages to measure: it computes everything", hint='set fast.executor = "compact"'
        )

    def interrupt(self) -> int:
        """It computes everything: there is nothing that could be stopped."""
        return 0

    def reset(self) -> None:
        self._code = None


def reached(value: Tensor, exit_index: Tensor, stage: int) -> Tensor:
    """A report `[B, ...]` with zeros for the rows that had left before it was made."""
    if stage == 0:
        return value
    return value.masked_fill((exit_index < stage).view(-1, *(1,) * (value.ndim - 1)), 0)
