"""The compact executor: segment by segment on the survivors.

After each decision the rows that are sure enough are written out, the live tensors of the others are gathered along
their batch axes, and the run stops when no row is left. When none leaves nothing is copied. A closed exit is not in the
schedule at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.ir.settings import EXITS, Settings
from eecompile.onnx import PACKAGES
from eecompile.passes.lower import Segment, schedule
from eecompile.passes.regions import Possible, possible
from eecompile.passes.settings import with_settings
from eecompile.program import Program
from eecompile.runtime.anytime import run_within, stream_of
from eecompile.runtime.known import PerSettings, with_known
from eecompile.runtime.limits import Allowance
from eecompile.runtime.onnx_runtime import onnx_segments
from eecompile.runtime.outcome import Outcome, assemble, nothing, times_of
from eecompile.runtime.precision import OutputDtypes
from eecompile.runtime.runnable import EagerSegment, compiled
from eecompile.runtime.survivors import Logits, Survivors, taken
from eecompile.translating import require

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Step:
    """One segment, ready to run."""

    segment: Segment
    call: Call
    axes: tuple[int | None, ...]  # batch axis of each live value that it hands on
    settings: tuple[str, ...] = ()  # which of them the call takes first
    head: Call | None = None

    def logits(self, values: Sequence[Tensor]) -> Logits:
        """Those of the exit at the end: there, or computed for the rows that are sent to it."""
        if self.head is None:
            return values[0]
        call, axes = self.head, self.segment.head_axes
        given = values[len(values) - len(axes) :]

        def of(at: Tensor | None) -> Tensor:
            rows = given
            if at is not None:
                rows = [t if a is None else t.index_select(a, at) for t, a in zip(given, axes, strict=True)]
            return call(*rows)[0]

        return of


class CompactExecutor:
    """Runs a program on the rows that still need it.

    Safe to call from several threads: a call keeps its state on its own stack, and plans are built under a lock.

    Args:
        program: A scheduled program.
        backend: "eager", "inductor" for segments through `torch.compile`, or "onnxruntime".

    Raises:
        MissingDependencyError: The backend is not installed.
    """

    name = "compact"

    def __init__(self, program: Program, backend: str = "eager") -> None:
        if backend == "onnxruntime":
            require('backend="onnxruntime"', "onnx", PACKAGES)
        self.program, self.backend = program, backend
        self._plans: dict[tuple[tuple[int, ...], bool, Possible], tuple[Step, ...]] = {}
        self._lock = threading.Lock()
        self._dtypes = OutputDtypes(program)
        self._running: set[_Run] = set()
        self.times = times_of(program)
        self._possible = PerSettings(lambda settings: possible(program, settings))

    def reset(self) -> None:
        with self._lock:
            self._plans = {}
        self.times.forget()

    def plan(self, open_exits: tuple[int, ...], decide_at_end: bool, arms: Possible = ()) -> tuple[Step, ...]:
        """The segments for a set of open exits and the arms that rows can take, built at first use."""
        key = (open_exits, decide_at_end, arms)
        found = self._plans.get(key)
        if found is None:
            with self._lock:
                if key not in self._plans:
                    segments = schedule(self.program, open_exits, decide_at_end, arms, live_only=True).segments
                    self._plans[key] = tuple(self._steps(segments))
                found = self._plans[key]
        return found

    def _steps(self, segments: Sequence[Segment]) -> Iterator[Step]:
        for s, (names, call, head) in zip(segments, self._ready(segments), strict=True):
            yield Step(s, call, tuple(v.batch_axis for v in s.outputs), names, head)

    def _ready(self, segments: Sequence[Segment]) -> Iterator[tuple[tuple[str, ...], Call, Call | None]]:
        """Of each segment the settings that it takes first, its call and that of its head."""
        if self.backend == "onnxruntime":
            yield from onnx_segments(self.program, segments)
            return
        make: Callable[..., Call] = EagerSegment if self.backend == "eager" else compiled
        for segment in segments:
            module, names = with_settings(segment.module)
            yield names, make(module), None if segment.head is None else make(segment.head)

    def run(
        self,
        flat: Sequence[Tensor],
        settings: Settings,
        want_confidence: bool = False,
        allowance: Allowance | None = None,
    ) -> Outcome:
        call = self._begin(flat, settings, want_confidence)
        self._running.add(call)
        try:
            if allowance is not None:
                return run_within(call, allowance, self.times)
            for _ in call.walk():
                if call.interrupted:
                    call.stop("interrupt")
                    break
        finally:
            self._running.discard(call)
        return call.outcome()

    def stream(self, flat: Sequence[Tensor], settings: Settings, allowance: Allowance) -> Generator[Outcome, None, None]:
        call = self._begin(flat, settings, True)
        self._running.add(call)
        try:
            yield from stream_of(call, allowance, self.times)
        finally:
            self._running.discard(call)

    def measure(self, flat: Sequence[Tensor], settings: Settings) -> Outcome:
        call = self._begin(flat, settings, True)
        call.thresholds = (math.inf,) * len(call.thresholds)  # no row leaves: every piece runs on all rows
        return run_within(call, Allowance(), self.times)

    def interrupt(self) -> int:
        running = list(self._running)  # a copy in one step of the interpreter: calls come and go meanwhile
        for call in running:
            call.interrupted = True
        return len(running)

    def _begin(self, flat: Sequence[Tensor], settings: Settings, want_confidence: bool) -> _Run:
        arms = self._possible(settings)
        plan = self.plan(settings.open_exits, want_confidence, arms)
        return _Run(self.program, flat, self._dtypes.of(flat), settings, want_confidence, plan, arms)


class _Run:
    """One call: the survivors, and the output leaves that were computed so far."""

    def __init__(
        self,
        program: Program,
        flat: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        settings: Settings,
        want_confidence: bool,
        plan: Sequence[Step],
        arms: Possible = (),
    ) -> None:
        self.program, self.flat, self.dtypes, self.want_confidence = program, flat, dtypes, want_confidence
        self.plan, self.arms = plan, arms
        self.thresholds = settings[EXITS]
        self.outputs = program.signature.outputs
        index, axis = program.signature.batch_input
        first = flat[index]
        self.settings = settings.tensors(first.device)
        self.size = first.shape[axis]
        self.in_ = Survivors(self.size, first.device, len(program.exits), dtypes[program.prediction.index or 0])
        self.leaves: list[Tensor | None] = [None] * len(self.outputs)
        self.interrupted = False
        self.stopped: str | None = None
        # exit, logits and confidence of the last decision, and who of those rows stayed (None: all)
        self.last: tuple[int, Logits, Tensor, Tensor | None] | None = None
        self.reports: dict[str, Tensor] = {}

    @property
    def stops(self) -> list[int]:
        end = len(self.program.exits)
        return [end if step.segment.exit is None else step.segment.exit for step in self.plan]

    def walk(self) -> Iterator[tuple[int, int]]:
        """Segment by segment. Pauses after each decision that leaves rows in; the caller may stop there.

        Yields:
            The index of the segment that comes next, and the rows that it would run on.
        """
        live: Sequence[Tensor] = self.flat
        state: tuple[Tensor, ...] = ()
        rows = self.size
        for i, step in enumerate(self.plan):
            segment = step.segment
            values = step.call(*(self.settings[n] for n in step.settings), *live, *state[: segment.takes_states])
            if segment.exit is None:
                self._finish(segment, values)
                return
            at = segment.decision + len(segment.leaves)
            self._keep_leaves(segment, values[segment.decision : at])
            if segment.reports:
                self._keep_reports(segment, values[at:])
                at += len(segment.reports)
            live, state = values[at : at + len(step.axes)], values[2 : segment.decision]
            logits, confidence = step.logits(values), values[0 if step.head is not None else 1]
            stay = self.in_.decide(segment.exit, logits, confidence, self.thresholds[segment.exit])
            if stay is not None:
                rows = stay.numel()
                if rows == 0:
                    return
                live = [self.in_.gather(t, axis, stay) for t, axis in zip(live, step.axes, strict=True)]
                state = tuple(s.index_select(0, stay) for s in state)
            self.last = (segment.exit, logits, confidence, stay)
            yield i + 1, rows

    def stop(self, why: str) -> None:
        self.stopped = why
        self._take_last(self.in_)

    def so_far(self) -> Outcome:
        survivors = self.in_.copy()
        self._take_last(survivors)
        return self._told(assemble(self.program, self.flat, survivors, self.leaves, self.dtypes, self.want_confidence))

    def _take_last(self, survivors: Survivors) -> None:
        """Rows that are still in have the output of the exit that they have just passed."""
        assert self.last is not None
        exit_index, logits, confidence, stay = self.last
        confidence = confidence if stay is None else confidence.index_select(0, stay)
        survivors.finish(taken(logits, stay), confidence, at=exit_index)

    def outcome(self) -> Outcome:
        outcome = assemble(self.program, self.flat, self.in_, self.leaves, self.dtypes, self.want_confidence)
        outcome.stopped = self.stopped
        return self._told(outcome)

    def wait(self) -> None:
        if self.in_.device.type == "cuda":
            torch.cuda.synchronize(self.in_.device)

    def _finish(self, segment: Segment, values: tuple[Tensor, ...]) -> None:
        at = 1 if self.want_confidence else 0
        end = at + len(segment.leaves)
        self._keep_leaves(segment, values[at:end])
        self._keep_reports(segment, values[end:])
        axis = self.outputs[self.program.prediction.index or 0].batch_axis
        prediction = values[-1].movedim(axis, 0) if axis else values[-1]
        self.in_.finish(prediction, values[0] if self.want_confidence else None)

    def _keep_leaves(self, segment: Segment, values: Sequence[Tensor]) -> None:
        rows = self.in_.rows
        for i, value in zip(segment.leaves, values, strict=True):
            leaf = self.outputs[i]
            if rows is None or leaf.batch_axis is None:
                self.leaves[i] = value
            else:
                full = nothing(leaf, self.program.signature, self.flat, value.device, value.dtype)
                self.leaves[i] = full.index_copy_(leaf.batch_axis, rows, value)

    def _keep_reports(self, segment: Segment, values: Sequence[Tensor]) -> None:
        rows = self.in_.rows
        for i, value in zip(segment.reports, values, strict=False):
            if rows is not None:
                value = value.new_zeros((self.in_.size, *value.shape[1:])).index_copy_(0, rows, value)
            self.reports[self.program.choices.reports[i].name] = value

    def _told(self, outcome: Outcome) -> Outcome:
        if self.want_confidence and self.program.choices.reports:
            outcome.reports = with_known(self.program, self.arms, self.reports, outcome.exit_index)
        return outcome
