"""The device program: what one call runs on a device that takes all decisions itself, as data.

A program is a list of nodes over named tensors. Most nodes launch kernels; `If`, `Switch` and `While` hold bodies, lists
of nodes themselves, and are decided by a number in device memory. CUDA runs a program as one graph with conditional
nodes; the simulator runs the same nodes on any machine.

A name that a body makes is known in that body and in bodies within it. Everything else goes through buffers, which
belong to the program and exist before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Union

import torch
from torch import fx

from eecompile.ir.settings import TEMPERATURES_BUFFER, THRESHOLDS_BUFFER
from eecompile.kernels._lists import ALIVE, BUCKET, LIVE
from eecompile.kernels.clock import START

Structure = Literal["nested", "machine"]
THRESHOLDS, TEMPERATURES, BUCKETS, ALL_ROWS = THRESHOLDS_BUFFER, TEMPERATURES_BUFFER, "buckets", "all_rows"
"""Names of what is there in addition to buffers and inputs: [E] and [E + 1] float32, [K] and [1] int32."""
CLOCK, PREDICTED = "clock", "predicted"
"""And where there is a deadline: see `kernels/clock.py`; [S - 1, K] int64, nanoseconds of the stage after each decision."""


@dataclass(frozen=True)
class Buffer:
    """Memory of the program.

    Attributes:
        fill: What it holds when a run starts, along its last axis where there are several values; None where nothing
            reads it before it is written.
        once: Whether that holds for the first run only: the program leaves it as it needs it for the next.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | int | tuple[int, ...] | None = None
    once: bool = False


@dataclass(frozen=True)
class Call:
    """`outputs = modules[module](*inputs)`: straight code without a condition in it."""

    module: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Copy:
    """Rows 0 to `rows` - 1 of `target` along `axis` become `source`; all of it for None."""

    source: str
    target: str
    axis: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Clone:
    """`target` is new memory with the value of `source`."""

    source: str
    target: str


@dataclass(frozen=True)
class Empty:
    """`target` is new memory that regions write their rows of."""

    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Gather:
    """Each target is new memory of `rows` rows: those of its source at `index`, the last live one repeated."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    axes: tuple[int, ...]
    index: str
    control: str
    rows: int


@dataclass(frozen=True)
class Scatter:
    """Live rows of each source go to the rows of its target at `index`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    axes: tuple[int, ...]
    index: str
    control: str


@dataclass(frozen=True)
class Decide:
    """Which rows exit (`kernels/decide.py`).

    Attributes:
        logits: What the confidence is computed of, or the confidence itself for the criterion "given".
        result: What a row that leaves gives out.
        rows: Rows of the batch that the live rows are; None for all, in order.
        count: Control with the number of live rows.
        state: Buffer of the criterion's state, None without one.
        capacity: Most live rows.
        deadline: Row of the predicted times by which the program may be stopped here; None where it cannot be.
    """

    logits: str
    result: str
    rows: str | None
    count: str
    exit: int
    criterion: str
    patience: int
    state: str | None
    survivors: str
    positions: str
    control: str
    capacity: int
    deadline: int | None = None


@dataclass(frozen=True)
class Tick:
    """The time goes to an element of the clock (`kernels/clock.py`)."""

    element: int


@dataclass(frozen=True)
class OpenRows:
    """The list of rows whose gate is open, among the first `count` (`kernels/open_rows.py`)."""

    decision: str
    count: str
    positions: str
    control: str
    capacity: int


@dataclass(frozen=True)
class Advance:
    """`state` becomes `base` + bucket of the survivors, or `done` where there are none; `done` or more ends the loop."""

    control: str
    state: str
    base: int
    done: int


@dataclass(frozen=True)
class If:
    """Runs the body where anybody is left."""

    control: str
    body: tuple[Node, ...]

    element = ALIVE


@dataclass(frozen=True)
class Switch:
    """Runs the body whose number stands in element `element` of `control`; none for a number past the last."""

    control: str
    bodies: tuple[tuple[Node, ...], ...]
    element: int = BUCKET


@dataclass(frozen=True)
class While:
    """Runs the body again and again, as long as the number in `control` is below `done`; the first time in any case."""

    control: str
    done: int
    body: tuple[Node, ...]

    element = LIVE


Node = Union[  # noqa: UP007 (its bodies refer to it)
    Call, Copy, Clone, Empty, Gather, Scatter, Decide, Tick, OpenRows, Advance, If, Switch, While
]
Body = tuple[Node, ...]


@dataclass(frozen=True)
class DeviceProgram:
    """One call for one set of input shapes, open exits and gates.

    Attributes:
        nodes: What runs, in order.
        buffers: Memory of the program.
        modules: What `Call` runs.
        inputs: Names of the flat inputs.
        batch: Rows of a call.
        buckets: Ascending sizes that stages run at; the last is `batch`.
        structure: "nested": IF in IF, a SWITCH over buckets in each. "machine": one WHILE with a SWITCH over stages and
            buckets.
        leaves: Buffer of each output leaf other than the prediction, None where it is not computed.
        prediction: Shape of the prediction, batch first.
        reports: Names of reports that are computed, each with its buffer.
        last: The exit that every row has left at; the number of exits for the model's own end.
        stops: Where each stage ends: an exit, or the number of exits for the model's own end.
        stages: Bodies of each stage, one for each bucket; of the first stage one, at the whole batch. All stand in `nodes`
            too.
        deadline: Whether its decisions watch the clock.
    """

    nodes: Body
    buffers: tuple[Buffer, ...]
    modules: tuple[fx.GraphModule, ...] = field(repr=False)
    inputs: tuple[str, ...]
    batch: int
    buckets: tuple[int, ...]
    structure: Structure
    leaves: tuple[str | None, ...]
    prediction: tuple[int, ...]
    reports: tuple[tuple[str, str], ...]
    last: int
    stops: tuple[int, ...]
    stages: tuple[tuple[Body, ...], ...] = field(repr=False)
    deadline: bool = False

    def walk(self) -> Iterator[tuple[int, Node]]:
        """Every node with how many bodies it lies in, in the order of a capture."""
        return walk(self.nodes)

    def count(self, kind: type) -> int:
        return sum(isinstance(n, kind) for _, n in self.walk())

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        total = 0
        for b in self.buffers:
            size = b.dtype.itemsize
            for n in b.shape:
                size *= n
            total += size
        return total

    def describe(self) -> str:
        """The program as text, a line for each node."""
        lines = [f"{self.structure} program: batch {self.batch}, buckets {', '.join(map(str, self.buckets))}"]
        _describe(self.nodes, 1, lines)
        return "\n".join(lines)


def walk(nodes: Body, depth: int = 0) -> Iterator[tuple[int, Node]]:
    for n in nodes:
        yield depth, n
        for body in bodies_of(n):
            yield from walk(body, depth + 1)


def bodies_of(node: Node) -> tuple[Body, ...]:
    """What a condition decides about."""
    if isinstance(node, If | While):
        return (node.body,)
    return node.bodies if isinstance(node, Switch) else ()


def reads(node: Node) -> tuple[str, ...]:
    """Names that a node reads, without those of its bodies."""
    match node:
        case Call():
            return node.inputs
        case Copy() | Clone():
            return (node.source,)
        case Gather() | Scatter():
            return (*node.sources, node.index, node.control)
        case Decide():
            rows = () if node.rows is None else (node.rows,)
            watched = () if node.deadline is None else (CLOCK, PREDICTED)
            return (node.logits, node.result, *rows, node.count, *watched)
        case Tick():
            return (CLOCK,)
        case Empty():
            return ()
        case OpenRows():
            return (node.decision, node.count)
        case Advance() | If() | Switch() | While():
            return (node.control,)


def makes(node: Node) -> tuple[str, ...]:
    """Names of new memory that a node makes."""
    match node:
        case Call():
            return node.outputs
        case Clone() | Empty():
            return (node.target,)
        case Gather():
            return node.targets
    return ()


def writes(node: Node) -> tuple[str, ...]:
    """Names of what is there already and gets another value."""
    match node:
        case Copy():
            return (node.target,)
        case Scatter():
            return node.targets
        case Decide():
            state = () if node.state is None else (node.state,)
            watched = () if node.deadline is None else (CLOCK,)
            return ("output", "exit_index", "confidence", node.survivors, node.positions, node.control, *state, *watched)
        case Tick():
            return (CLOCK,)
        case OpenRows():
            return (node.positions, node.control)
        case Advance():
            return (node.state,)
    return ()


def _describe(nodes: Body, depth: int, lines: list[str]) -> None:
    for n in nodes:
        name, pad = type(n).__name__.lower(), "  " * depth
        if isinstance(n, Switch):
            lines.append(f"{pad}switch {n.control}: {len(n.bodies)} bodies")
        elif isinstance(n, If | While):
            lines.append(f"{pad}{name} {n.control}")
        elif isinstance(n, Tick):
            lines.append(f"{pad}tick -> {CLOCK}, {'start' if n.element == START else 'end'}")
        else:
            given = ", ".join((*makes(n), *writes(n)))
            lines.append(f"{pad}{name} {', '.join(reads(n))} -> {given}")
        for body in bodies_of(n):
            _describe(body, depth + 1, lines)
