"""The compact executor: segment by segment on the survivors.

After each decision the rows that are sure enough are written out, the live tensors of the others are gathered along
their batch axes, and the run stops when nobody is left. When nobody leaves nothing is copied. A closed exit is not in the
schedule at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from eecompile.passes.insert_exits import THRESHOLDS
from eecompile.passes.lower import Segment, schedule
from eecompile.program import Program
from eecompile.runtime.outcome import Outcome, assemble, nothing
from eecompile.runtime.runnable import EagerSegment, compiled
from eecompile.runtime.survivors import Survivors

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Step:
    """One segment, ready to run."""

    segment: Segment
    call: Call
    axes: tuple[int | None, ...]  # batch axis of each live value that it hands on


class CompactExecutor:
    """Runs a program on the rows that still need it.

    Safe to call from several threads: a call keeps its state on its own stack, and plans are built under a lock.

    Args:
        program: A scheduled program.
        backend: "eager", or "inductor" for segments through `torch.compile`.
    """

    name = "compact"

    def __init__(self, program: Program, backend: str = "eager") -> None:
        self.program, self.backend = program, backend
        self._plans: dict[tuple[tuple[int, ...], bool], tuple[Step, ...]] = {}
        self._lock = threading.Lock()
        self.thresholds_changed()

    def thresholds_changed(self) -> None:
        """Reads the thresholds again; plans for sets of open exits that were seen before are kept."""
        values = [float(t) for t in getattr(self.program.marked, THRESHOLDS).tolist()]
        # One assignment, so that a running call sees old or new thresholds, not a mixture.
        self._current = (values, tuple(i for i, t in enumerate(values) if t <= 1.0))

    def reset(self) -> None:
        with self._lock:
            self._plans = {}
        self.thresholds_changed()

    def plan(self, open_exits: tuple[int, ...], decide_at_end: bool) -> tuple[Step, ...]:
        """The segments for a set of open exits, built at first use."""
        key = (open_exits, decide_at_end)
        found = self._plans.get(key)
        if found is None:
            with self._lock:
                if key not in self._plans:
                    segments = schedule(self.program, open_exits, decide_at_end).segments
                    self._plans[key] = tuple(self._step(s) for s in segments)
                found = self._plans[key]
        return found

    def _step(self, segment: Segment) -> Step:
        call: Call = EagerSegment(segment.module) if self.backend == "eager" else compiled(segment.module)
        return Step(segment, call, tuple(v.batch_axis for v in segment.outputs))

    def run(self, flat: Sequence[Tensor], want_confidence: bool = False) -> Outcome:
        thresholds, open_exits = self._current
        plan = self.plan(open_exits, want_confidence)
        return _Run(self.program, flat, want_confidence).through(plan, thresholds)


class _Run:
    """One call: the survivors, and the output leaves that were computed so far."""

    def __init__(self, program: Program, flat: Sequence[Tensor], want_confidence: bool) -> None:
        self.program, self.flat, self.want_confidence = program, flat, want_confidence
        self.outputs = program.signature.outputs
        index, axis = program.signature.batch_input
        first = flat[index]
        self.in_ = Survivors(first.shape[axis], first.device, len(program.exits))
        self.leaves: list[Tensor | None] = [None] * len(self.outputs)

    def through(self, plan: Sequence[Step], thresholds: Sequence[float]) -> Outcome:
        live: Sequence[Tensor] = self.flat
        state: tuple[Tensor, ...] = ()
        for step in plan:
            segment = step.segment
            values = step.call(*live, *(state if segment.takes_state else ()))
            if segment.exit is None:
                self._finish(segment, values)
                break
            at = segment.decision + len(segment.leaves)
            self._keep_leaves(segment, values[segment.decision : at])
            live, state = values[at:], values[2 : segment.decision]
            stay = self.in_.decide(segment.exit, values[0], values[1], thresholds[segment.exit])
            if stay is None:
                continue
            if stay.numel() == 0:
                break
            live = [self.in_.gather(t, axis, stay) for t, axis in zip(live, step.axes, strict=True)]
            state = tuple(s.index_select(0, stay) for s in state)
        return self._outcome()

    def _finish(self, segment: Segment, values: tuple[Tensor, ...]) -> None:
        at = 1 if self.want_confidence else 0
        self._keep_leaves(segment, values[at:-1])
        axis = self.outputs[self.program.prediction or 0].batch_axis
        prediction = values[-1].movedim(axis, 0) if axis else values[-1]
        self.in_.finish(prediction, values[0] if self.want_confidence else None)

    def _keep_leaves(self, segment: Segment, values: Sequence[Tensor]) -> None:
        rows = self.in_.rows
        for i, value in zip(segment.leaves, values, strict=True):
            leaf = self.outputs[i]
            if rows is None or leaf.batch_axis is None:
                self.leaves[i] = value
            else:
                full = nothing(leaf, self.program.signature, self.flat, value.device)
                self.leaves[i] = full.index_copy_(leaf.batch_axis, rows, value)

    def _outcome(self) -> Outcome:
        return assemble(self.program, self.flat, self.in_, self.leaves, self.want_confidence)
