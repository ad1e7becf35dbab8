"""The device executor: a call is one launch of one CUDA graph, and nothing waits for it.

A program is captured once for a set of input shapes and open exits. Each stream that calls has a copy of its own, with its
own buffers, so that calls on several streams may be in flight at once. Results are copied out of the buffers on the
caller's stream and stay on the device.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eecompile.errors import MissingDependencyError
from eecompile.kernels.clock import DEVICE, launch_tick
from eecompile.kernels.condition import launch_condition
from eecompile.kernels.decide import launch_decide
from eecompile.passes import facts
from eecompile.program import Program
from eecompile.runtime.device.deadline import predictions, set_deadline
from eecompile.runtime.device.executor import DeviceExecutor, Options, stepped
from eecompile.runtime.device.fallback import Bound, EventMailbox
from eecompile.runtime.device.graphs import CAPTURING, ConditionalGraph
from eecompile.runtime.device.machine import Calls, Machine, allocated, constants
from eecompile.runtime.device.measure import StageRuns
from eecompile.runtime.device.nodes import (
    CLOCK,
    PREDICTED,
    Body,
    Decide,
    DeviceProgram,
    If,
    Node,
    Switch,
    Tick,
    While,
)
from eecompile.runtime.device.support import support
from eecompile.runtime.device.warm import Warm
from eecompile.runtime.timing import Piece, StageTimes

WARM_UPS = 2  # the second finds what the first has loaded, tuned and allocated


def sets_condition(node: Decide, following: Node | None) -> bool:
    """Whether a decision's kernel sets the condition of the node after it: one launch less."""
    return isinstance(following, If) and following.control == node.control


class Capture(Machine):
    """Puts every node of a program into a graph that is being captured."""

    def __init__(self, program: DeviceProgram, memory: dict[str, Tensor], calls: Calls, graph: ConditionalGraph) -> None:
        super().__init__(program, memory, calls)
        self.graph = graph
        self.set: dict[str, int] = {}  # handles that the decision just before has set, by control

    def decide(self, node: Decide) -> None:
        handle = None
        if sets_condition(node, self.following):
            handle = self.set[node.control] = self.graph.handle()
        arguments = (*self.decision(node), DEVICE, handle)
        launch_decide(*arguments)

    def tick(self, node: Tick) -> None:
        launch_tick(self.values[CLOCK], node.element, DEVICE)

    def if_(self, node: If) -> None:
        handle = self.set.pop(node.control, None)
        if handle is None:
            handle = self.graph.handle()
            launch_condition(self.values[node.control], node.element, handle)
        self.graph.if_(handle, lambda: self.body(node.body))

    def switch(self, node: Switch) -> None:
        handle = self.graph.handle()
        launch_condition(self.values[node.control], node.element, handle)
        self.graph.switch(handle, [lambda body=body: self.body(body) for body in node.bodies])  # type: ignore[misc]

    def while_(self, node: While) -> None:
        handle = self.graph.handle(default=1)

        def round() -> None:
            self.body(node.body)
            launch_condition(self.values[node.control], node.element, handle, below=node.done)

        self.graph.while_(handle, round)


class Load(Warm):
    """A warm-up with the kernels that a capture will launch: nothing is loaded meanwhile. Handle 0 sets nothing."""

    def decide(self, node: Decide) -> None:
        arguments = (*self.decision(node), DEVICE, 0 if sets_condition(node, self.following) else None)
        launch_decide(*arguments)

    def tick(self, node: Tick) -> None:
        launch_tick(self.values[CLOCK], node.element, DEVICE)

    def if_(self, node: If) -> None:
        launch_condition(self.values[node.control], node.element, 0)
        super().if_(node)

    def switch(self, node: Switch) -> None:
        launch_condition(self.values[node.control], node.element, 0)
        super().switch(node)

    def while_(self, node: While) -> None:
        launch_condition(self.values[node.control], node.element, 0, below=node.done)
        super().while_(node)


class Instance:
    """A captured program with buffers of its own, for calls on one stream.

    Args:
        read: Thresholds, temperatures and what else can be set. A graph reads where it was captured to read, and these are
            replaced when they are set, not written over: it has copies, which every call brings up to date.
    """

    def __init__(self, program: DeviceProgram, calls: Calls, flat: Sequence[Tensor], read: dict[str, Tensor]) -> None:
        device = flat[0].device
        self.inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in flat]
        self.read = {name: t.clone() for name, t in read.items()}
        self.memory = self.read | constants(program, device) | allocated(program.buffers, device)
        self.graph = ConditionalGraph(device)
        with CAPTURING:
            self.graph.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.graph.stream):
                for _ in range(WARM_UPS):
                    Load(program, self.memory, calls).run(self.inputs)
            torch.cuda.synchronize(device)
            with self.graph.capture():
                machine = Capture(program, self.memory, calls, self.graph)
                machine.run(self.inputs)
            self.kept = machine  # memory that bodies read must outlive the graph
        self.results = (
            "output",
            "exit_index",
            "confidence",
            *(n for n in program.leaves if n),
            *dict(program.reports).values(),
            *((CLOCK,) if program.deadline else ()),
        )
        self.program, self.changes = program, -1

    def set_deadline(self, deadline: float, times: StageTimes) -> None:
        """For the next launch on the current stream. Another capture is not needed, and nothing waits unless stages were
        measured since."""
        if self.changes != times.changes:
            self.changes = times.changes
            self.memory[PREDICTED].copy_(predictions(self.program, times))
        set_deadline(self.memory[CLOCK], deadline, times)

    def run(self, flat: Sequence[Tensor], read: dict[str, Tensor]) -> dict[str, Tensor]:
        """One launch on the current stream."""
        for own, given in zip(self.inputs, flat, strict=True):
            own.copy_(given, non_blocking=True)
        for name, own in self.read.items():
            own.copy_(read[name], non_blocking=True)
        self.graph.replay()
        return {name: self.memory[name].clone() for name in self.results}


class StageGraphs(StageRuns):
    """Times stages as graphs of their own, by events of the device, without the conditional node around each. Has not run on
    a GPU yet."""

    def __init__(
        self, program: DeviceProgram, memory: dict[str, Tensor], calls: Calls, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(program, memory, calls, clock)
        self.graphs: dict[tuple[Piece, int], tuple[ConditionalGraph, Capture]] = {}

    def measure(self, flat: Sequence[Tensor], times: StageTimes) -> None:
        if not self.graphs:
            Load(self.program, self.values, self.calls).run(flat)
        super().measure(flat, times)

    def timed(self, piece: Piece, rows: int, body: Body, times: StageTimes) -> None:
        if (piece, rows) not in self.graphs:
            self.graphs[piece, rows] = self._captured(body)
        graph, _ = self.graphs[piece, rows]
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.add(piece, rows, started.elapsed_time(ended) / 1e3)

    def _captured(self, body: Body) -> tuple[ConditionalGraph, Capture]:
        """A stage as a graph, and what holds the memory that it reads."""
        self.each(body)  # makes what the next stage reads
        graph = ConditionalGraph(self.values[CLOCK].device)
        machine = Capture(self.program, self.values, self.calls, graph)
        with CAPTURING:
            torch.cuda.synchronize(graph.device)
            with graph.capture():
                machine.each(body)
        graph.replay()  # the first launch also uploads it
        return graph, machine


class CudaExecutor(DeviceExecutor):
    """Runs device programs on a CUDA device, without the host from input to output."""

    name = "device"

    def __init__(self, program: Program, options: Options | None = None) -> None:
        self.support = support(facts.device_of(program.source))
        if self.support.way == "none":
            raise MissingDependencyError(
                "the device executor cannot run here",
                got=self.support.reason,
                hint='move the program with fast.to("cuda"), or take executor="compact"; "simulate" runs the same device '
                "program on any machine",
            )
        self.hosted = self.support.way == "bound"
        self._instances: OrderedDict[tuple[int, int], tuple[weakref.ref[DeviceProgram], Instance]] = OrderedDict()
        self._stage_graphs: StageGraphs | None = None  # kept from one round of measurements to the next
        super().__init__(program, options)

    def reset(self) -> None:
        with self._lock:
            self._instances.clear()
            self._stage_graphs = None
        super().reset()

    def execute(
        self,
        program: DeviceProgram,
        calls: Calls,
        flat: Sequence[Tensor],
        read: dict[str, Tensor],
        deadline: float | None = None,
    ) -> dict[str, Tensor]:
        if self.hosted:
            machine = Bound(program, self._fresh(program, flat, read), calls, EventMailbox(), self.times.clock)
            return stepped(machine, flat, self.times, deadline)
        self._stage_graphs = None
        instance = self._instance(program, calls, flat, read)
        if deadline is not None:
            instance.set_deadline(deadline, self.times)
        return instance.run(flat, read)

    def runs(self, program: DeviceProgram, calls: Calls, flat: Sequence[Tensor], read: dict[str, Tensor]) -> StageRuns:
        if self.hosted:
            return StageRuns(program, self._fresh(program, flat, read), calls, self.times.clock)
        if self._stage_graphs is None or self._stage_graphs.program is not program:
            self._stage_graphs = StageGraphs(program, self._fresh(program, flat, read), calls, self.times.clock)
        return self._stage_graphs

    def _fresh(self, program: DeviceProgram, flat: Sequence[Tensor], read: dict[str, Tensor]) -> dict[str, Tensor]:
        device = flat[0].device
        return read | constants(program, device) | allocated(program.buffers, device)

    def _instance(self, program: DeviceProgram, calls: Calls, flat: Sequence[Tensor], read: dict[str, Tensor]) -> Instance:
        stream = torch.cuda.current_stream(flat[0].device).cuda_stream
        key = (id(program), stream)
        with self._lock:
            found = self._instances.get(key)
            if found is None or found[0]() is not program:
                found = weakref.ref(program), Instance(program, calls, flat, read)
                self._instances[key] = found
                while len(self._instances) > self.options.kept:
                    self._instances.popitem(last=False)
            self._instances.move_to_end(key)
        return found[1]
