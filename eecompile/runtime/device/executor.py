"""Executors that run device programs: one for each set of input shapes and open exits, kept and bounded."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError, UnsupportedModelError
from eecompile.ir.settings import Settings
from eecompile.passes import facts
from eecompile.passes.lower import schedule
from eecompile.passes.regions import Possible, possible
from eecompile.program import Program
from eecompile.reasons import Unless
from eecompile.runtime.device.build import build
from eecompile.runtime.device.deadline import kept, predictions, set_deadline
from eecompile.runtime.device.machine import Calls, Hosted, Simulator, allocated, constants
from eecompile.runtime.device.measure import StageRuns
from eecompile.runtime.device.nodes import CLOCK, PREDICTED, THRESHOLDS, DeviceProgram, Structure
from eecompile.runtime.known import PerSettings, with_known
from eecompile.runtime.limits import Allowance
from eecompile.runtime.outcome import Outcome, completed, times_of
from eecompile.runtime.precision import any_autocast, autocast_dtype
from eecompile.runtime.runnable import EagerSegment
from eecompile.runtime.timing import StageTimes

KEPT = 8
"""Programs that an executor keeps; the one that was not used for longest goes."""
ROUNDS = 3
"""How often stages are timed before the first deadline of a program, where `measure_stages` has not been called."""


@dataclass(frozen=True)
class Options:
    """How device programs are built.

    Args:
        buckets: Numbers of rows that stages run at, ascending; None for powers of two.
        structure: "nested" or "machine"; see `DeviceProgram`.
        kept: Programs kept at a time.
    """

    buckets: tuple[int, ...] | None = None
    structure: Structure = "nested"
    kept: int = KEPT

    def __post_init__(self) -> None:
        if self.buckets is not None and (
            list(self.buckets) != sorted(set(self.buckets)) or any(b < 1 for b in self.buckets) or not self.buckets
        ):
            raise StrategyError(
                "buckets are ascending numbers of rows", got=self.buckets, wanted="for example (1, 4, 16, 64)"
            )
        if self.structure not in ("nested", "machine"):
            raise StrategyError(
                "unknown structure of a device program", got=repr(self.structure), wanted="nested or machine"
            )
        if self.kept < 1:
            raise StrategyError("an executor keeps at least one program", got=self.kept)


@dataclass(frozen=True)
class Now:
    """What a call goes by from its beginning to its end: another thread may set thresholds meanwhile.

    Attributes:
        open_exits: Indices of the exits that are computed.
        arms: Of each conditional, the arms that rows can take.
        read: The settings as tensors, for kernels and modules.
    """

    open_exits: tuple[int, ...]
    arms: Possible
    read: dict[str, Tensor]


class DeviceExecutor:
    """Runs a program through device programs; what runs their nodes is a subclass's business.

    Args:
        program: A scheduled program with a captured graph.
    """

    name: str
    hosted = True  # whether the host steps through programs, and reads the clock for them

    def __init__(self, program: Program, options: Options | None = None) -> None:
        if program.capture.front_end == "blocks":
            raise UnsupportedModelError(
                "a device program needs the whole model as a graph",
                got='capture="blocks"',
                wanted='capture="export"',
                hint='set fast.executor = "compact"',
            )
        self.program, self.options = program, options or Options()
        self.times = times_of(program)
        self._kept: OrderedDict[Any, tuple[DeviceProgram, Calls]] = OrderedDict()
        self._timed: set[Any] = set()  # inputs and open exits whose stages were timed
        self._lock = threading.Lock()
        self._now = PerSettings(self._plan)

    def _plan(self, settings: Settings) -> Now:
        read = settings.tensors(facts.device_of(self.program.source))
        return Now(settings.open_exits, possible(self.program, settings), read)

    def reset(self) -> None:
        with self._lock:
            self._kept.clear()
            self._timed.clear()
        self.times.forget()
        self._now.forget()

    def device_program(
        self, flat: Sequence[Tensor], settings: Settings, last: int | None = None
    ) -> tuple[DeviceProgram, Calls]:
        """The program for these inputs and the exits that are open now, built at first use.

        Args:
            last: The exit that a budget ends at; None for the model's own end.
        """
        return self._program_for(self._now(settings), flat, last)

    def _program_for(
        self, now: Now, flat: Sequence[Tensor], last: int | None, deadline: bool = False
    ) -> tuple[DeviceProgram, Calls]:
        key = (*_call_key(now, flat), last, deadline)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                lowered = schedule(self.program, now.open_exits, True, now.arms)
                made = build(
                    self.program,
                    lowered,
                    flat,
                    buckets=self.options.buckets,
                    structure=self.options.structure,
                    last=last,
                    deadline=deadline,
                )
                with torch.no_grad():
                    found = made, self.ready(made)
                self._kept[key] = found
                while len(self._kept) > self.options.kept:
                    self._kept.popitem(last=False)
                self._timed &= {k[:-2] for k in self._kept}
            self._kept.move_to_end(key)
        return found

    def ready(self, program: DeviceProgram) -> Calls:
        """What runs each module of a program."""
        return [EagerSegment(m).forward_only() for m in program.modules]

    def run(
        self, flat: Sequence[Tensor], settings: Settings, want_confidence: bool, allowance: Allowance | None = None
    ) -> Outcome:
        self._accepts(flat)
        allowance = allowance or Allowance()
        now = self._now(settings)
        program, calls = self._program_for(now, flat, allowance.deepest, allowance.deadline is not None)
        with torch.no_grad():
            if allowance.deadline is not None and _call_key(now, flat) not in self._timed:
                self._time(now, flat, ROUNDS)
            found = self.execute(program, calls, flat, now.read, allowance.deadline)
            done = self.times.clock()
            stopped = False
            if allowance.deadline is not None:
                kept_to, found["exit_index"] = kept(program, found[CLOCK], found["exit_index"])
            outcome = self._outcome(program, flat, found, now.arms)
            if allowance.deadline is not None:
                stopped = want_confidence and kept_to.say(outcome)
                outcome.closing = (done, program.batch) if self.hosted else None
            if allowance.deepest is not None and not stopped:
                self._stopped(outcome, allowance.deepest, now.read[THRESHOLDS])
            outcome.late |= allowance.over
        return outcome

    def execute(
        self,
        program: DeviceProgram,
        calls: Calls,
        flat: Sequence[Tensor],
        read: dict[str, Tensor],
        deadline: float | None = None,
    ) -> dict[str, Tensor]:
        """Runs the program; gives the values of its buffers, which nothing writes to again.

        Args:
            read: See `Now`.
            deadline: Seconds on the clock of `times`, for a program that has one.
        """
        raise NotImplementedError

    def runs(self, program: DeviceProgram, calls: Calls, flat: Sequence[Tensor], read: dict[str, Tensor]) -> StageRuns:
        """What times the stages of a program."""
        raise NotImplementedError

    def _time(self, now: Now, flat: Sequence[Tensor], rounds: int) -> None:
        program, calls = self._program_for(now, flat, None, deadline=True)
        runs = self.runs(program, calls, flat, now.read)
        for _ in range(rounds):
            runs.measure(flat, self.times)
        self._timed.add(_call_key(now, flat))

    def _outcome(self, program: DeviceProgram, flat: Sequence[Tensor], found: dict[str, Tensor], arms: Possible) -> Outcome:
        signature, at = self.program.signature, self.program.prediction.index or 0
        axis = signature.outputs[at].batch_axis
        given = [None if name is None else found[name] for name in program.leaves]
        given[at] = found["output"].movedim(0, axis) if axis else found["output"]
        dtypes = [leaf.dtype for leaf in signature.outputs]
        leaves = completed(self.program, given, flat, flat[0].device, dtypes)
        index, confidence = found["exit_index"], torch.nan_to_num(found["confidence"], nan=0.0)
        reports = {name: found[buffer] for name, buffer in program.reports}
        outcome = Outcome(leaves, index, confidence, reports=reports)
        outcome.reports = with_known(self.program, arms, reports, index)
        return outcome

    def _stopped(self, outcome: Outcome, last: int, thresholds: Tensor) -> None:
        """Which rows a budget stopped, without asking the device: a row is final where it was sure, and whether all were is
        for callers that read the reason."""
        assert outcome.confidence is not None
        sure = outcome.confidence >= thresholds[last]
        outcome.final = (outcome.exit_index < last) | sure
        outcome.stopped = Unless("budget", outcome.final)

    def _accepts(self, flat: Sequence[Tensor]) -> None:
        if any_autocast() and (dtype := autocast_dtype(flat[0].device)) is not None:
            raise StrategyError(
                f"the {self.name} executor does not run under autocast: its buffers have the dtypes of the captured graph",
                got=f"autocast to {dtype}",
                hint=f'compile model.to({dtype}), or set fast.executor = "compact"',
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
            raise StrategyError(
                f"the {self.name} executor gives no gradients",
                got="an input that requires a gradient",
                hint='call under torch.no_grad(), or set fast.executor = "compact"',
            )

    def _whole(self, what: str) -> StrategyError:
        return StrategyError(
            f"{what} needs the host between exits, and the {self.name} executor runs from input to output without it",
            hint='set fast.executor = "compact"; a deadline and a budget work here too',
        )

    def stream(self, flat: Sequence[Tensor], settings: Settings, allowance: Allowance) -> Generator[Outcome, None, None]:
        raise self._whole("a stream")

    def measure(self, flat: Sequence[Tensor], settings: Settings) -> Outcome | None:
        """Every stage at every bucket, each by itself. What comes after them is timed only where the host has to wait for it
        anyway."""
        with torch.no_grad():
            self._time(self._now(settings), flat, 1)
            return self.run(flat, settings, True, Allowance(deadline=math.inf)) if self.hosted else None

    def interrupt(self) -> int:
        """Nothing that runs on the device by itself can be stopped."""
        return 0


class SimulateExecutor(DeviceExecutor):
    """Runs device programs on any machine, decision by decision as a GPU would."""

    name = "simulate"

    def execute(
        self,
        program: DeviceProgram,
        calls: Calls,
        flat: Sequence[Tensor],
        read: dict[str, Tensor],
        deadline: float | None = None,
    ) -> dict[str, Tensor]:
        memory = self._fresh(program, flat, read)
        return stepped(Simulator(program, memory, calls, self.times.clock), flat, self.times, deadline)

    def runs(self, program: DeviceProgram, calls: Calls, flat: Sequence[Tensor], read: dict[str, Tensor]) -> StageRuns:
        return StageRuns(program, self._fresh(program, flat, read), calls, self.times.clock)

    def _fresh(self, program: DeviceProgram, flat: Sequence[Tensor], read: dict[str, Tensor]) -> dict[str, Tensor]:
        device = flat[0].device
        memory = read | constants(program, device) | allocated(program.buffers, device)
        for b in program.buffers:  # nothing may read what nothing wrote
            if b.fill is None:
                memory[b.name].fill_(float("nan") if b.dtype.is_floating_point else -1)
        return memory


def stepped(machine: Hosted, flat: Sequence[Tensor], times: StageTimes, deadline: float | None) -> dict[str, Tensor]:
    """Runs a program that the host steps through; gives its buffers and its clock."""
    program, values = machine.program, machine.values
    names = [b.name for b in program.buffers]
    if deadline is not None:
        names.append(CLOCK)
        values[PREDICTED].copy_(predictions(program, times))
        set_deadline(values[CLOCK], deadline, times)
    machine.run(flat)
    return {name: values[name] for name in names}


def _call_key(now: Now, flat: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a device program is made for, limits excluded."""
    return (tuple((t.shape, t.stride(), t.dtype, t.device) for t in flat), now.open_exits, now.arms)
