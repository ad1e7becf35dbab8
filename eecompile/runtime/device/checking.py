"""`fast.check_no_sync()`: builds the device programs of a compiled model and checks each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eecompile.errors import CaptureError
from eecompile.passes.lower import schedule
from eecompile.passes.regions import possible
from eecompile.program import Program
from eecompile.runtime.device.build import build
from eecompile.runtime.device.check import NoSync, Problem, check_modules, lint
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.machine import Machine, allocated, constants
from eecompile.runtime.device.nodes import (
    Body,
    Call,
    DeviceProgram,
    If,
    Node,
    Switch,
    While,
)
from eecompile.runtime.device.watched import HostValueError, Watched


class Everything(Machine):
    """Runs every body of a program under fake tensors."""

    def __init__(self, program: DeviceProgram, memory: dict[str, Tensor], report: NoSync) -> None:
        super().__init__(program, memory, [Watched(m).run for m in program.modules])
        self.report = report
        self.at = ["the first stage"]

    def node(self, node: Node) -> None:
        try:
            super().node(node)
        except HostValueError as error:
            self.report.problems.append(Problem(self.at[-1], error.node, error.reason, error.source))
            raise

    def _body(self, body: Body, name: str) -> None:
        self.report.bodies += 1
        self.at.append(name)
        self.body(body)
        self.at.pop()

    def if_(self, node: If) -> None:
        self._body(node.body, f"if {node.control}")

    def switch(self, node: Switch) -> None:
        for i, body in enumerate(node.bodies):
            self._body(body, f"switch {node.control}, body {i}")

    def while_(self, node: While) -> None:
        self._body(node.body, f"while {node.control}")


def check(program: Program, flat: Sequence[Tensor], options: Options) -> NoSync:
    """Checks the programs of all exits open and every gate deciding, at the inputs' batch and at one row, there also with a
    deadline.

    Args:
        flat: Inputs; only their shapes count.
    """
    report = NoSync()
    segments = schedule(program, tuple(range(len(program.exits))), True, possible(program, None))
    names = [f"stage {k}" for k in range(len(segments.segments))]
    check_modules([s.module for s in segments.segments], names, report)
    index, axis = program.signature.batch_input
    sizes = sorted({1, int(flat[index].shape[axis])})
    if sizes[0] == 0:
        raise CaptureError("there is nothing to check", got="a batch of 0 rows", wanted="an example with rows")
    kinds = [(size, False) for size in sizes] + [(1, True)] * bool(program.exits)
    for size, deadline in kinds:
        inputs = [
            t if leaf.batch_axis is None else t.narrow(leaf.batch_axis, 0, size)
            for t, leaf in zip(flat, program.signature.inputs, strict=True)
        ]
        try:
            made = build(program, segments, inputs, buckets=options.buckets, structure=options.structure, deadline=deadline)
        except HostValueError as error:
            _add(report, Problem(f"batch {size}", error.node, error.reason, error.source))
            continue
        report.programs.append(summary(made))
        report.problems += [Problem(f"program of batch {size}", "", what) for what in lint(made)]
        _run(program, made, inputs, report)
    return report


def _add(report: NoSync, problem: Problem) -> None:
    """Once for each node: what the list of operators has named need not be reported again."""
    if problem.node not in {p.node for p in report.problems}:
        report.problems.append(problem)


def _run(program: Program, made: DeviceProgram, inputs: Sequence[Tensor], report: NoSync) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        device = inputs[0].device
        given = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in inputs]
        memory = constants(made, device) | allocated(made.buffers, device)
        memory |= {name: torch.empty_like(t) for name, t in program.settings.tensors(device).items()}
        try:
            Everything(made, memory, report).run(given)
        except HostValueError:
            return  # it is in the report


def summary(made: DeviceProgram) -> str:
    """A program in a line."""
    counts: dict[str, Any] = {k.__name__.lower(): made.count(k) for k in (Call, If, Switch, While)}
    shown = ", ".join(f"{n} {k}" for k, n in counts.items() if n)
    buckets = ", ".join(map(str, made.buckets))
    limit = ", deadline" if made.deadline else ""
    return f"batch {made.batch}, buckets {buckets}, {made.structure}{limit}: {shown}, {made.bytes:,} B of buffers"
