"""The compact executor: segment by segment on the survivors.

After each decision the rows that are sure enough are written out, the live tensors of the others are gathered along
their batch axes, and the run stops when nobody is left. When nobody leaves nothing is copied. A closed exit is not in the
schedule at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.passes.insert_exits import THRESHOLDS
from eecompile.passes.lower import Segment, schedule
from eecompile.program import Program
from eecompile.runtime.outcome import Outcome, nothing
from eecompile.runtime.runnable import EagerSegment, compiled

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
        self._calls: dict[tuple[int, int, tuple[int, ...], bool], tuple[Segment, Call]] = {}
        self._lock = threading.Lock()
        self._thresholds: list[float] = []
        self._open: tuple[int, ...] = ()
        self.thresholds_changed()

    def thresholds_changed(self) -> None:
        """Reads the thresholds again; plans for sets of open exits that were seen before are kept."""
        values = [float(t) for t in getattr(self.program.marked, THRESHOLDS).tolist()]
        # One assignment, so that a running call sees old or new thresholds, not a mixture.
        self._current = (values, tuple(i for i, t in enumerate(values) if t <= 1.0))

    def reset(self) -> None:
        with self._lock:
            self._plans, self._calls = {}, {}
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
    """One call: what has been written so far, and which rows are still in."""

    def __init__(self, program: Program, flat: Sequence[Tensor], want_confidence: bool) -> None:
        self.program, self.flat, self.want_confidence = program, flat, want_confidence
        signature = program.signature
        index, axis = signature.batch_input
        self.size: int = flat[index].shape[axis]
        self.device = flat[index].device
        self.rows: Tensor | None = None  # None: all of them, in order
        self.leaves: list[Tensor | None] = [None] * len(signature.outputs)
        self.prediction: Tensor | None = None
        self.exit_index: Tensor | None = None
        self.confidence: Tensor | None = None

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
            live = values[at:]
            state = values[2 : segment.decision]
            sure = values[1] >= thresholds[segment.exit]  # NaN compares false: never sure
            stay = torch.nonzero(~sure).view(-1)
            left = stay.numel()
            if left == sure.numel():
                continue
            self._leave(segment.exit, values[0], values[1], None if left == 0 else sure)
            if left == 0:
                break
            self.rows = stay if self.rows is None else self.rows[stay]
            live = [
                t if axis is None else t.index_select(axis, stay) for t, axis in zip(live, step.axes, strict=True)
            ]
            state = tuple(s.index_select(0, stay) for s in state)
        return self._outcome()

    def _leave(self, exit_index: int, logits: Tensor, confidence: Tensor, sure: Tensor | None) -> None:
        """Writes the rows that leave; `sure` None means all that are still in."""
        if sure is None and self.rows is None:  # everybody at the first decision: nothing to gather
            self.prediction = logits
            self.exit_index = torch.full((self.size,), exit_index, dtype=torch.int64, device=self.device)
            self.confidence = confidence
            return
        if sure is None:
            rows, taken, surest = self.rows, logits, confidence
        else:
            at = torch.nonzero(sure).view(-1)
            rows = at if self.rows is None else self.rows[at]
            taken = logits.index_select(0, at)
            surest = confidence.index_select(0, at)
        assert rows is not None
        self._allocate(logits)
        assert self.prediction is not None and self.exit_index is not None and self.confidence is not None
        self.prediction.index_copy_(0, rows, taken)
        self.exit_index.index_fill_(0, rows, exit_index)
        self.confidence.index_copy_(0, rows, surest)

    def _allocate(self, logits: Tensor) -> None:
        if self.prediction is None:
            self.prediction = logits.new_empty((self.size, *logits.shape[1:]))
            # Rows that no exit takes end at the model's own end.
            self.exit_index = torch.full((self.size,), len(self.program.exits), dtype=torch.int64, device=self.device)
            self.confidence = torch.zeros((self.size,), dtype=torch.float32, device=self.device)

    def _finish(self, segment: Segment, values: tuple[Tensor, ...]) -> None:
        confidence = values[0] if self.want_confidence else None
        at = 1 if self.want_confidence else 0
        self._keep_leaves(segment, values[at:-1])
        prediction = values[-1]
        assert self.program.prediction is not None
        axis = self.program.signature.outputs[self.program.prediction].batch_axis
        rows_first = prediction.movedim(axis, 0) if axis else prediction
        if self.rows is None:
            self.prediction = rows_first
            self.confidence = confidence
            self.exit_index = None
            return
        assert self.prediction is not None
        self.prediction.index_copy_(0, self.rows, rows_first)
        if confidence is not None and self.confidence is not None:
            self.confidence.index_copy_(0, self.rows, confidence)

    def _keep_leaves(self, segment: Segment, values: Sequence[Tensor]) -> None:
        for i, value in zip(segment.leaves, values, strict=True):
            leaf = self.program.signature.outputs[i]
            if self.rows is None or leaf.batch_axis is None:
                self.leaves[i] = value
            else:
                full = nothing(leaf, self.program.signature, self.flat, value.device)
                self.leaves[i] = full.index_copy_(leaf.batch_axis, self.rows, value)

    def _outcome(self) -> Outcome:
        signature = self.program.signature
        at = self.program.prediction
        assert at is not None and self.prediction is not None
        axis = signature.outputs[at].batch_axis
        self.leaves[at] = self.prediction.movedim(0, axis) if axis else self.prediction
        leaves = [
            nothing(leaf, signature, self.flat, self.device) if t is None else t
            for t, leaf in zip(self.leaves, signature.outputs, strict=True)
        ]
        if self.exit_index is None:
            end = len(self.program.exits)
            self.exit_index = torch.full((self.size,), end, dtype=torch.int64, device=self.device)
        confidence = None
        if self.want_confidence and self.confidence is not None:
            confidence = torch.nan_to_num(self.confidence, nan=0.0)
        return Outcome(leaves, self.exit_index, confidence)
