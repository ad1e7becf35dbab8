"""What the benchmark needs of a machine: a clock, captured calls, compiled calls, conditional graphs.

`Cuda` measures. `Host` stands in for it where there is no GPU, so that everything around it can be tested: calls run as they
are, and the device program runs in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eecompile import CompiledModule
from eecompile.kernels.condition import launch_condition
from eecompile.measuring import Rounds, rounds_of
from eecompile.runtime.device.cuda import CudaExecutor
from eecompile.runtime.device.graphs import ConditionalGraph

Call = Callable[[], Any]


class Captured:
    """A call that always runs on the same memory.

    Attributes:
        outputs: What it gave; every replay writes there.
    """

    def __init__(self, call: Call, replay: Call, outputs: tuple[Tensor, ...]) -> None:
        self.kept = call  # and with it the memory that a graph reads
        self.replay, self.outputs = replay, outputs

    def __call__(self) -> tuple[Tensor, ...]:
        self.replay()
        return self.outputs


class Cuda:
    """Times by events on the stream; at least `min_seconds` of calls in a round.

    Attributes:
        executor: The executor whose program is measured.
        dtype: Of weights and images.
    """

    dtype = torch.float16

    def __init__(self, min_seconds: float = 0.02) -> None:
        self.device, self.executor = torch.device("cuda", torch.cuda.current_device()), "device"
        self.min_seconds = min_seconds

    def measure(self, calls: Mapping[str, Call], rounds: int) -> Rounds:
        """Seconds per call of each, in turns."""
        repeats = {}
        for name, call in calls.items():
            for _ in range(3):
                call()
            once = self._seconds(call, 3)
            repeats[name] = max(1, min(200, int(self.min_seconds / max(once, 1e-7))))
        kept = Rounds({name: [] for name in calls}, [None] * rounds)
        names = list(calls)
        for i in range(rounds):
            for name in names if i % 2 else reversed(names):
                n = repeats[name]
                kept.times[name].append(self._seconds(calls[name], n))
        return kept

    def _seconds(self, call: Call, n: int) -> float:
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        started.record()
        for _ in range(n):
            call()
        ended.record()
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1e3 / n

    def capture(self, call: Callable[[], tuple[Tensor, ...]]) -> Captured:
        """The call as one CUDA graph. What it reads must stay where it is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()

        def replay() -> None:
            graph.replay()

        return Captured(call, replay, outputs)

    def conditional(self) -> Any:
        return ConditionalGraph(self.device)

    def add(self, graph: Any, call: Call) -> None:
        """Puts a call into a graph or a body that is being captured."""
        call()

    def set_condition(self, numbers: Tensor, element: int, handle: int, below: int | None = None) -> None:
        launch_condition(numbers, element, handle, below)

    def replay_of(self, fast: CompiledModule, inputs: Mapping[str, Tensor]) -> Call:
        """The device program of one call alone: no inputs copied in, no results copied out."""
        found = fast.engine.executor("device")
        assert isinstance(found, CudaExecutor)
        flat = fast.program.signature.flatten((), inputs)
        (program, calls), read = found.device_program(flat, fast.settings), fast.settings.tensors(flat[0].device)
        if found.hosted:  # no conditional nodes here: there is no graph to replay
            return lambda: found.execute(program, calls, flat, read)
        instance = found._instance(program, calls, flat, read)
        instance.run(flat, read)
        return lambda: instance.graph.replay()  # holds the instance, and with it the buffers


class Host:
    """A stand-in without a GPU, for tests of the driver."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.device, self.executor = torch.device("cpu"), "simulate"

    def measure(self, calls: Mapping[str, Call], rounds: int) -> Rounds:
        return rounds_of(calls, rounds, min_seconds=0.0, warm_up=0)

    def capture(self, call: Callable[[], tuple[Tensor, ...]]) -> Captured:
        outputs = tuple(t.clone() for t in call())

        def replay() -> None:
            for kept, made in zip(outputs, call(), strict=True):
                kept.copy_(made)

        return Captured(call, replay, outputs)

    def conditional(self) -> Any:
        return OnHost()

    def add(self, graph: Any, call: Call) -> None:
        graph.steps.append(call)

    def set_condition(self, numbers: Tensor, element: int, handle: int, below: int | None = None) -> None:
        number = int(numbers[element])
        CONDITIONS[handle] = number if below is None else int(number < below)

    def replay_of(self, fast: CompiledModule, inputs: Mapping[str, Tensor]) -> Call:
        return lambda: fast(**inputs)


Platform = Cuda | Host
CONDITIONS: dict[int, int] = {}
"""What conditions are set to, where no GPU keeps them."""


class OnHost:
    """The conditional graph on the host: what was captured is called again at each replay."""

    def capture(self) -> OnHost:
        return self

    def __enter__(self) -> None:
        self.steps: list[Call] = []

    def __exit__(self, *_: object) -> None:
        return None

    def replay(self) -> None:
        for step in self.steps:
            step()

    def handle(self, default: int | None = None) -> int:
        number = len(CONDITIONS) + 1
        CONDITIONS[number] = default or 0
        return number

    def _body(self, fill: Call) -> Call:
        outer, self.steps = self.steps, []
        fill()
        inner, self.steps = self.steps, outer
        return lambda: [step() for step in inner]

    def if_(self, handle: int, body: Call) -> None:
        inside = self._body(body)
        self.steps.append(lambda: inside() if CONDITIONS[handle] else None)

    def switch(self, handle: int, bodies: list[Call]) -> None:
        insides = [self._body(b) for b in bodies]
        self.steps.append(lambda: insides[CONDITIONS[handle]]() if 0 <= CONDITIONS[handle] < len(insides) else None)

    def while_(self, handle: int, body: Call) -> None:
        inside = self._body(body)

        def loop() -> None:
            CONDITIONS[handle] = 1
            while CONDITIONS[handle]:
                inside()

        self.steps.append(loop)
