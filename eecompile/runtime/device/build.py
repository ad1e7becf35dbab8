"""Turns a schedule into a device program for one set of input shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eecompile.errors import PassError
from eecompile.kernels._lists import control_size
from eecompile.kernels.clock import END, START
from eecompile.passes.lower import Schedule, Segment
from eecompile.passes.settings import with_settings
from eecompile.program import Program
from eecompile.runtime.device.emit import Emitter, Rows, mutates
from eecompile.runtime.device.fuse import Decision, ended, fused, with_head
from eecompile.runtime.device.nodes import (
    ALL_ROWS,
    Advance,
    Body,
    Buffer,
    Copy,
    Decide,
    DeviceProgram,
    Gather,
    If,
    Node,
    Scatter,
    Structure,
    Switch,
    Tick,
    While,
)
from eecompile.runtime.device.parts import Parts, split, used_in
from eecompile.runtime.device.shapes import Shapes


@dataclass(frozen=True)
class Value:
    """A live value between two stages.

    Attributes:
        axis: Of its rows, None without rows.
        ordered: Whether its rows are those of the batch, in order; else those of the stage before.
    """

    name: str
    axis: int | None
    ordered: bool


@dataclass(frozen=True)
class StageCode:
    """What is the same for every bucket of a stage."""

    number: int
    segment: Segment
    decision: Decision
    parts: Parts
    used: frozenset[str]  # inputs that something reads
    aliases: bool  # whether what passes through it unchanged need not be handed on again
    settings: tuple[Value, ...]  # what its module takes before live values and states

    def given(self, live: Sequence[Value]) -> tuple[Value, ...]:
        """Everything that its module is called with."""
        return (*self.settings, *live)


def default_buckets(batch: int) -> tuple[int, ...]:
    """1, 2, 4, ... below the batch, and the batch."""
    return (*(1 << i for i in range((batch - 1).bit_length())), batch)


def build(
    program: Program,
    schedule: Schedule,
    flat: Sequence[Tensor],
    *,
    buckets: Sequence[int] | None = None,
    structure: Structure = "nested",
    last: int | None = None,
    deadline: bool = False,
) -> DeviceProgram:
    """The device program of a schedule that was made with `decide_at_end`.

    Args:
        flat: Inputs, for their shapes, dtypes and device.
        buckets: Sizes that stages run at, ascending; those above the batch are left out, the batch is added.
        structure: See `DeviceProgram`.
        last: An open exit that every row leaves at, at the latest; None for the model's own end.
        deadline: Whether decisions watch the clock, and stop the program where the next stage would be late.
    """
    index, axis = program.signature.batch_input
    batch = int(flat[index].shape[axis])
    sizes = default_buckets(batch) if buckets is None else (*(b for b in buckets if b < batch), batch)
    return _Builder(program, schedule, flat, batch, sizes, structure, last, deadline).build()


class _Builder:
    def __init__(
        self,
        program: Program,
        schedule: Schedule,
        flat: Sequence[Tensor],
        batch: int,
        buckets: tuple[int, ...],
        structure: Structure,
        last: int | None,
        deadline: bool,
    ) -> None:
        self.program, self.batch, self.buckets, self.structure = program, batch, buckets, structure
        self.deadline = deadline
        self.last = len(program.exits) if last is None else last
        stops = [s.exit for s in schedule.segments]
        segments = schedule.segments if last is None else schedule.segments[: stops.index(last) + 1]
        self.segments = [with_head(s, deadline or s is segments[-1]) for s in segments]
        self.inputs = tuple(f"input.{i}" for i in range(len(flat)))
        self.shapes = Shapes(flat, self.inputs)
        for f in program.settings.families:
            self.shapes.put(f.buffer, (len(f.slots),), torch.float32)
        self.emit = Emitter(batch, buckets, self.shapes)
        self.leaves: list[str | None] = [None] * len(program.signature.outputs)
        self.reports: list[tuple[str, str]] = []
        self.prediction: tuple[int, ...] = ()
        # One row at a time needs no list of survivors, no gathering and no buffers: names are handed on.
        self.direct = structure == "nested" and buckets == (1,)

    def build(self) -> DeviceProgram:
        axes = [leaf.batch_axis for leaf in self.program.signature.inputs]
        live = [Value(n, a, True) for n, a in zip(self.inputs, axes, strict=True)]
        codes, lives = [], [live]
        for k, segment in enumerate(self.segments):
            code = self._code(k, segment, lives[-1])
            codes.append(code)
            lives.append(self._handed_on(code, lives[-1]))
        sizes = [(self.batch,), *[self.buckets] * (len(codes) - 1)]
        stages = tuple(tuple(self._stage(c, lives, n) for n in of) for c, of in zip(codes, sizes, strict=True))
        rest = self._nested(stages, 1) if self.structure == "nested" else self._machine(stages)
        body = (*stages[0][0], *rest)
        end = len(self.program.exits)
        return DeviceProgram(
            nodes=(Tick(START), *body, Tick(END)) if self.deadline else body,
            buffers=tuple(self.emit.buffers.values()),
            modules=tuple(self.emit.modules),
            inputs=self.inputs,
            batch=self.batch,
            buckets=self.buckets,
            structure=self.structure,
            leaves=tuple(self.leaves),
            prediction=self.prediction,
            reports=tuple(self.reports),
            last=self.last,
            stops=tuple(end if s.exit is None else s.exit for s in self.segments),
            stages=stages,
            deadline=self.deadline,
        )

    # ------------------------------------------------------------------ stages

    def _code(self, k: int, segment: Segment, live: Sequence[Value]) -> StageCode:
        """Shapes, buffers and modules of a stage; they do not depend on the bucket."""
        final = k == len(self.segments) - 1
        axis = self.program.prediction_leaf.batch_axis or 0
        decision = ended(segment, axis) if final else fused(segment)
        module, names = with_settings(decision.module)
        decision = replace(decision, module=module)
        settings = tuple(Value(name, None, True) for name in names)
        parts = split(decision.module, f"s{k}.")
        self.emit.add_modules(parts)
        self.shapes.run(parts, [v.name for v in (*settings, *live)])
        code = StageCode(k, segment, decision, parts, used_in(parts), not mutates(parts), settings)
        self._result_buffers(code)
        if not final:
            for name in ("survivors", "positions"):
                self.emit.buffer(Buffer(f"{name}.{k}", (self.batch,), torch.int64))
            self.emit.buffer(Buffer(f"control.{k}", (control_size(self.batch),), torch.int32, 0, once=True))
            if decision.criterion == "patience":
                self.emit.buffer(Buffer("state", (self.batch, 2), torch.int64, (-1, 0)))
        return code

    def _result_buffers(self, code: StageCode) -> None:
        result = code.parts.outputs[0]
        shape, dtype = self.shapes.shape(result), self.shapes.dtype(result)
        if code.number == 0:
            self.prediction = shape
            self.emit.buffer(Buffer("output", shape, dtype))
            self.emit.buffer(Buffer("exit_index", (self.batch,), torch.int64, self.last))
            self.emit.buffer(Buffer("confidence", (self.batch,), torch.float32))
        elif (shape, dtype) != (self.prediction, self.emit.buffers["output"].dtype):
            raise PassError(
                "the device program needs the same prediction from every exit",
                where=f"segment {code.number}",
                got=f"{dtype} {list(shape)}",
                wanted=f"{self.emit.buffers['output'].dtype} {list(self.prediction)}",
                hint='set fast.executor = "compact"',
            )
        leaves, reports, _ = self._outputs(code)
        for i, name in leaves:
            dtype = self.shapes.dtype(name)
            fill = math.nan if dtype.is_floating_point or dtype.is_complex else 0
            self.leaves[i] = f"leaf.{i}"
            self.emit.buffer(Buffer(f"leaf.{i}", self.shapes.shape(name), dtype, fill))
        for i, name in reports:
            report = self.program.choices.reports[i].name
            self.reports.append((report, f"report.{report}"))
            self.emit.buffer(Buffer(f"report.{report}", self.shapes.shape(name), self.shapes.dtype(name), 0))

    def _outputs(self, code: StageCode) -> tuple[list[tuple[int, str]], list[tuple[int, str]], tuple[str, ...]]:
        """Output leaves and reports that a stage computes, with their names, and what it hands on."""
        s, given = code.segment, code.parts.outputs[2 + code.decision.gives_states :]
        leaves = list(zip(s.leaves, given, strict=False))
        reports = list(zip(s.reports, given[len(leaves) :], strict=False))
        return leaves, reports, given[len(leaves) + len(reports) :]

    def _handed_on(self, code: StageCode, live: Sequence[Value]) -> list[Value]:
        """The live values after a stage, as the next one finds them."""
        if code.number == len(self.segments) - 1:
            return []
        taken = dict(zip(code.parts.inputs, code.given(live), strict=True))
        states = code.parts.outputs[2 : 2 + code.decision.gives_states]
        named = [(n, v.batch_axis) for n, v in zip(self._outputs(code)[2], code.segment.outputs, strict=True)]
        following = self.segments[code.number + 1]
        in_kernel = code.decision.criterion == "patience"
        wants = 0 if in_kernel else following.takes_states
        named += [(n, 0) for n in states[:wants]]
        found: list[Value] = []
        for i, (name, axis) in enumerate(named):
            before = taken.get(name)
            if before is not None and code.aliases and (axis is None or before.ordered or self.direct):
                found.append(before)
            elif code.number == 0 or self.direct:
                found.append(Value(name if before is None else before.name, axis, True))
            else:
                buffer = f"live.{code.number}.{i}"
                self.emit.buffer(Buffer(buffer, self.shapes.shape(name), self.shapes.dtype(name)))
                self.shapes.values[buffer] = self.shapes.values[name]
                found.append(Value(buffer, axis, False))
        if in_kernel and following is self.segments[-1]:  # where every row leaves, the segment scores
            self.shapes.put("state", (self.batch, 2), torch.int64)
            found += [Value("state", 0, True)] * following.takes_states
        return found

    def _stage(self, code: StageCode, lives: Sequence[Sequence[Value]], rows: int) -> Body:
        """A stage at one size, up to its decision.

        Args:
            lives: Live values before each stage and after the last.
        """
        k = code.number
        nodes: list[Node] = []
        control = f"control.{k - 1}" if k else ALL_ROWS
        in_order = k == 0 or self.direct
        named: dict[str, str] = {}
        groups: dict[str, list[tuple[str, str, int]]] = {}
        for value, target in zip(code.given(lives[k]), code.parts.inputs, strict=True):
            if value.axis is None or in_order:
                named[target] = value.name
            elif target in code.used:
                index = f"survivors.{k - 1}" if value.ordered else f"positions.{k - 1}"
                groups.setdefault(index, []).append((value.name, target, value.axis))
        for index, group in groups.items():
            sources, targets, axes = zip(*group, strict=True)
            nodes.append(Gather(sources, targets, axes, index, control, rows))
        nodes += self.emit.parts(code.parts, named, Rows(rows, control))
        nodes += self._told(code, named, control)
        result, scored = (named.get(n, n) for n in code.parts.outputs[:2])
        own = f"survivors.{k - 1}" if k else None
        if k == len(self.segments) - 1:
            return (*nodes, *self._finish(result, scored, own, control))
        state = "state" if code.decision.criterion == "patience" else None
        exit_index = code.segment.exit
        assert exit_index is not None
        nodes.append(
            Decide(
                scored,
                result,
                own,
                control,
                exit_index,
                code.decision.criterion,
                code.decision.patience,
                state,
                f"survivors.{k}",
                f"positions.{k}",
                f"control.{k}",
                rows,
                k if self.deadline else None,
            )
        )
        if k and not self.direct:
            nodes += self._kept(code, lives[k + 1], named, rows)
        return tuple(nodes)

    def _told(self, code: StageCode, named: dict[str, str], control: str) -> list[Node]:
        """Output leaves and reports go to their rows."""
        leaves, reports, _ = self._outputs(code)
        outputs = self.program.signature.outputs
        given = [(name, f"leaf.{i}", outputs[i].batch_axis) for i, name in leaves]
        given += [(name, f"report.{self.program.choices.reports[i].name}", 0) for i, name in reports]
        nodes: list[Node] = []
        for name, target, axis in given:
            source = named.get(name, name)
            if axis is None or code.number == 0:
                nodes.append(Copy(source, target))
            else:
                nodes.append(Scatter((source,), (target,), (axis,), f"survivors.{code.number - 1}", control))
        return nodes

    def _finish(self, result: str, confidence: str, rows: str | None, control: str) -> list[Node]:
        """Rows that are left take what is there."""
        if rows is None:
            return [Copy(result, "output"), Copy(confidence, "confidence")]
        return [Scatter((result, confidence), ("output", "confidence"), (0, 0), rows, control)]

    def _kept(self, code: StageCode, after: Sequence[Value], named: dict[str, str], rows: int) -> list[Node]:
        """What survives goes to the program's buffers: memory of one bucket's body is unknown to the next stage."""
        states = code.parts.outputs[2 : 2 + code.decision.gives_states]
        names = [*self._outputs(code)[2], *states]
        nodes: list[Node] = []
        for value, name in zip(after, names, strict=False):
            if value.name.startswith(f"live.{code.number}."):
                nodes.append(Copy(named.get(name, name), value.name, value.axis, None if value.axis is None else rows))
        return nodes

    # ------------------------------------------------------------------ structures

    def _nested(self, stages: Sequence[Sequence[Body]], k: int) -> Body:
        """Stage k and those after it, within the condition that a row gets there."""
        if k == len(stages):
            return ()
        control = f"control.{k - 1}"
        deeper = self._nested(stages, k + 1)
        if self.direct:
            return (If(control, (*stages[k][0], *deeper)),)
        switch = Switch(control, tuple(stages[k]))
        return (If(control, (switch, *deeper)),) if deeper else (switch,)  # no rows left: no bucket either

    def _machine(self, stages: Sequence[Sequence[Body]]) -> Body:
        """One loop over a switch of all stages and buckets."""
        if len(stages) == 1:
            return ()
        width, last = len(self.buckets), len(stages) - 1
        self.emit.buffer(Buffer("state_number", (1,), torch.int32))

        def advance(k: int) -> Advance:
            """Stage k + 1 comes next. After the last one, which decides nothing, any number of rows ends the loop."""
            return Advance(f"control.{min(k, last - 1)}", "state_number", k * width, last * width)

        bodies = tuple((*body, advance(k)) for k in range(1, last + 1) for body in stages[k])
        return advance(0), While("state_number", last * width, (Switch("state_number", bodies, element=0),))
