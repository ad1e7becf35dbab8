"""Runs the nodes of a device program through the package's operators; who decides about bodies is left open.

Nothing here reads a value of a tensor: a subclass that runs on a GPU may capture every node, one that simulates may look at
the numbers that conditions stand on, and only at those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import eecompile.ops as ops
from eecompile.errors import EecompileError
from eecompile.kernels.clock import NEVER, NOW
from eecompile.runtime.device.nodes import (
    ALL_ROWS,
    BUCKETS,
    CLOCK,
    PREDICTED,
    TEMPERATURES,
    THRESHOLDS,
    Advance,
    Body,
    Buffer,
    Call,
    Clone,
    Copy,
    Decide,
    DeviceProgram,
    Empty,
    Gather,
    If,
    Node,
    OpenRows,
    Scatter,
    Switch,
    Tick,
    While,
    makes,
)

assert ops is not None  # registers torch.ops.eecompile.*
kernels = torch.ops.eecompile
Calls = Sequence[Callable[..., Sequence[Any]]]


def allocated(buffers: Sequence[Buffer], device: torch.device | str) -> dict[str, Tensor]:
    """Memory for a program; what is filled once is filled."""
    made = {}
    for b in buffers:
        made[b.name] = torch.empty(b.shape, dtype=b.dtype, device=device)
        if b.once and b.fill is not None:
            _fill(made[b.name], b)
    return made


def _fill(target: Tensor, buffer: Buffer) -> None:
    if isinstance(buffer.fill, tuple):
        for k, value in enumerate(buffer.fill):
            target[..., k].fill_(value)
    elif buffer.fill is not None:
        target.fill_(buffer.fill)


def constants(program: DeviceProgram, device: torch.device | str) -> dict[str, Tensor]:
    """Numbers that the kernels read in addition to the program's buffers. A clock has no deadline at first."""
    made = {
        BUCKETS: torch.tensor(program.buckets, dtype=torch.int32, device=device),
        ALL_ROWS: torch.tensor([program.batch], dtype=torch.int32, device=device),
    }
    if program.deadline:
        made[CLOCK] = torch.tensor([0, NEVER, -1, 0, 0], device=device)
        made[PREDICTED] = torch.zeros(len(program.stages) - 1, len(program.buckets), dtype=torch.int64, device=device)
    return made


class Machine:
    """One run of a program.

    Args:
        memory: Buffers, constants, thresholds and temperatures, by name.
        calls: What runs each module of the program.
    """

    def __init__(self, program: DeviceProgram, memory: Mapping[str, Tensor], calls: Calls) -> None:
        self.program, self.calls = program, calls
        self.values: dict[str, Any] = dict(memory)
        self.following: Node | None = None

    def run(self, flat: Sequence[Tensor]) -> None:
        """Runs everything. Results are in the buffers then."""
        self.begin(flat)
        self.body(self.program.nodes)

    def begin(self, flat: Sequence[Tensor]) -> None:
        """Inputs are known, and buffers hold what they hold when a run starts."""
        self.values |= zip(self.program.inputs, flat, strict=True)
        for b in self.program.buffers:
            if b.fill is not None and not b.once:
                _fill(self.values[b.name], b)

    def body(self, nodes: Body) -> None:
        """Nodes in order. What a body makes is dropped after it."""
        self.each(nodes)
        for node in nodes:
            for name in makes(node):
                self.values.pop(name, None)

    def each(self, nodes: Body) -> None:
        """Nodes in order."""
        for node, following in zip(nodes, (*nodes[1:], None), strict=True):
            self.following = following
            self.node(node)

    def node(self, node: Node) -> None:
        """One node; `self.following` is the next one in the same body."""
        match node:
            case Call():
                given = self.calls[node.module](*(self.values[n] for n in node.inputs))
                self.values |= zip(node.outputs, given, strict=True)
            case Copy():
                self.copy(node)
            case Clone():
                self.values[node.target] = self.values[node.source].clone(memory_format=torch.contiguous_format)
            case Empty():
                self.values[node.target] = self.empty(node)
            case Gather():
                self.gather(node)
            case Scatter():
                sources, targets = self.listed(node.sources), self.listed(node.targets)
                kernels.scatter(sources, targets, self.values[node.index], self.values[node.control], node.axes)
            case Decide():
                self.decide(node)
            case Tick():
                self.tick(node)
            case OpenRows():
                n = node.capacity
                decision, positions = self.values[node.decision], self.values[node.positions][:n]
                buckets, control = self.values[BUCKETS], self.values[node.control]
                kernels.open_rows(decision, self.values[node.count], buckets, positions, control)
            case Advance():
                _, bucket, alive = self.values[node.control][:3].unbind()
                number = torch.where(alive > 0, bucket + node.base, node.done)
                self.values[node.state].copy_(number.view(1))
            case If():
                self.if_(node)
            case Switch():
                self.switch(node)
            case While():
                self.while_(node)

    def copy(self, node: Copy) -> None:
        target = self.values[node.target]
        if node.rows is not None and node.axis is not None:
            target = target.narrow(node.axis, 0, node.rows)
        target.copy_(self.values[node.source])

    def listed(self, names: Sequence[str]) -> list[Tensor]:
        return [self.values[n] for n in names]

    def gather(self, node: Gather) -> None:
        sources = self.listed(node.sources)
        shapes = [(*s.shape[:a], node.rows, *s.shape[a + 1 :]) for s, a in zip(sources, node.axes, strict=True)]
        targets = [self.new(s, shape) for s, shape in zip(sources, shapes, strict=True)]
        kernels.gather(sources, targets, self.values[node.index], self.values[node.control], node.axes)
        self.values |= zip(node.targets, targets, strict=True)

    def empty(self, node: Empty) -> Tensor:
        """Memory for what regions give."""
        return torch.empty(node.shape, dtype=node.dtype, device=self.values[BUCKETS].device)

    def new(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory for what is gathered."""
        return like.new_empty(shape)

    def decide(self, node: Decide) -> None:
        kernels.decide(*self.decision(node))

    def tick(self, node: Tick) -> None:
        kernels.tick(self.values[CLOCK], node.element)

    def decision(self, node: Decide) -> tuple[Any, ...]:
        """Arguments of `decide`."""
        v, n = self.values, node.capacity
        result = v[node.result].reshape(n, -1)
        return (
            v[node.logits],
            result,
            None if node.rows is None else v[node.rows][:n],
            v[node.count],
            v[THRESHOLDS],
            v[TEMPERATURES],
            node.exit,
            node.criterion,
            node.patience,
            None if node.state is None else v[node.state],
            v[BUCKETS],
            v["output"].view(self.program.batch, -1),
            v["exit_index"],
            v["confidence"],
            v[node.survivors][:n],
            v[node.positions][:n],
            v[node.control],
            False,
            None if node.deadline is None else v[CLOCK],
            None if node.deadline is None else v[PREDICTED][node.deadline],
        )

    # ------------------------------------------------------------------ conditions

    def if_(self, node: If) -> None:
        raise NotImplementedError

    def switch(self, node: Switch) -> None:
        raise NotImplementedError

    def while_(self, node: While) -> None:
        raise NotImplementedError


class Hosted(Machine):
    """A machine that the host steps through, and so reads the clock.

    Args:
        clock: Seconds.
    """

    def __init__(
        self,
        program: DeviceProgram,
        memory: Mapping[str, Tensor],
        calls: Calls,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(program, memory, calls)
        self.clock = clock

    def decide(self, node: Decide) -> None:
        if node.deadline is not None:
            self.tell_time()
        super().decide(node)

    def tick(self, node: Tick) -> None:
        self.tell_time()
        super().tick(node)

    def tell_time(self) -> None:
        """The time, once everything before has run."""
        self.settle()
        self.values[CLOCK][NOW].fill_(round(self.clock() * 1e9))

    def settle(self) -> None:
        """Waits for what was launched."""
        if self.values[CLOCK].is_cuda:
            torch.cuda.current_stream(self.values[CLOCK].device).synchronize()


class Simulator(Hosted):
    """Runs a program on any machine. It looks at the numbers that conditions stand on, as the GPU's scheduler would.

    Everything else is as on the GPU: sizes are those of buckets, rows that fill a bucket up are computed, and memory that
    nothing was written to holds NaN.
    """

    LIMIT = 1_000_000  # rounds of one loop

    def empty(self, node: Empty) -> Tensor:
        made = super().empty(node)
        return made.fill_(torch.nan) if made.is_floating_point() else made.zero_()

    def if_(self, node: If) -> None:
        if int(self.values[node.control][node.element]) != 0:
            self.body(node.body)

    def switch(self, node: Switch) -> None:
        number = int(self.values[node.control][node.element])
        if 0 <= number < len(node.bodies):
            self.body(node.bodies[number])

    def while_(self, node: While) -> None:
        for _ in range(self.LIMIT):
            self.body(node.body)
            if int(self.values[node.control][node.element]) >= node.done:
                return
        raise EecompileError("a loop of the device program does not end", where=node.control, got=f"{self.LIMIT} rounds")
