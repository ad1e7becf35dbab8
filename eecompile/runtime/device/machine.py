"""Runs the nodes of a device program through the package's operators; who decides about bodies is left open.

Nothing here reads a value of a tensor: a subclass that runs on a GPU may capture every node, one that simulates may look at
the numbers that conditions stand on, and only at those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import eecompile.ops as ops
from eecompile.errors import EecompileError
from eecompile.runtime.device.nodes import (
    BUCKETS,
    EVERYBODY,
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
    Gather,
    If,
    Node,
    OpenRows,
    Scatter,
    Switch,
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
    """Numbers that the kernels read besides the program's buffers."""
    return {
        BUCKETS: torch.tensor(program.buckets, dtype=torch.int32, device=device),
        EVERYBODY: torch.tensor([program.batch], dtype=torch.int32, device=device),
    }


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
        self.values |= zip(self.program.inputs, flat, strict=True)
        for b in self.program.buffers:
            if b.fill is not None and not b.once:
                _fill(self.values[b.name], b)
        self.body(self.program.nodes)

    def body(self, nodes: Body) -> None:
        """Nodes in order. What a body makes is dropped behind it."""
        for node, following in zip(nodes, (*nodes[1:], None), strict=True):
            self.following = following
            self.node(node)
        for node in nodes:
            for name in makes(node):
                self.values.pop(name, None)

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
            case Gather():
                self.gather(node)
            case Scatter():
                sources, targets = self.listed(node.sources), self.listed(node.targets)
                kernels.scatter(sources, targets, self.values[node.index], self.values[node.control], node.axes)
            case Decide():
                self.decide(node)
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

    def new(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory for what is gathered."""
        return like.new_empty(shape)

    def decide(self, node: Decide) -> None:
        arguments = self.decision(node)
        kernels.decide(*arguments)

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
        )

    # ------------------------------------------------------------------ conditions

    def if_(self, node: If) -> None:
        raise NotImplementedError

    def switch(self, node: Switch) -> None:
        raise NotImplementedError

    def while_(self, node: While) -> None:
        raise NotImplementedError


class Simulator(Machine):
    """Runs a program on any machine. It looks at the numbers that conditions stand on, as the GPU's scheduler would.

    Everything else is as on the GPU: sizes are those of buckets, rows that fill a bucket up are computed, and memory that
    nothing was written to holds NaN.
    """

    LIMIT = 1_000_000  # rounds of one loop

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
