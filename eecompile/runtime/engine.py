"""The engine of a compiled module: its executors, which of them runs calls, and why."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.errors import EecompileError, StrategyError, check_name
from eecompile.ir.settings import THRESHOLDS_BUFFER, Settings
from eecompile.passes import facts
from eecompile.program import Program
from eecompile.runtime.blocks import BlocksExecutor
from eecompile.runtime.compact import CompactExecutor
from eecompile.runtime.device.check import NoSync
from eecompile.runtime.device.checking import check
from eecompile.runtime.device.cuda import CudaExecutor
from eecompile.runtime.device.executor import DeviceExecutor, Options, SimulateExecutor
from eecompile.runtime.device.nodes import DeviceProgram
from eecompile.runtime.device.support import VERIFIED, support
from eecompile.runtime.outcome import Executor
from eecompile.runtime.reference import ReferenceExecutor

EXECUTORS = ("auto", "reference", "compact", "simulate", "device")
BACKENDS = ("eager", "inductor", "onnxruntime")


class Engine:
    """Executors of one program, built at first use.

    Safe to use from several threads.

    Args:
        program: A marked program.
        executor: "auto" or the name of an executor.
        backend: "eager", "inductor" or "onnxruntime": how the compact executor's segments run.

    Attributes:
        asked: The executor asked for; "auto" takes another one.
        chosen: The executor that runs calls in eval mode.
        executors: Those that have been built, by name and backend.

    Raises:
        StrategyError: An unknown executor or backend, or one that cannot run this program.
        MissingDependencyError: The backend is not installed.
    """

    def __init__(self, program: Program, executor: str = "auto", backend: str = "eager") -> None:
        self.program = program
        self.backend = _known("backend", backend, BACKENDS)
        self._options = Options()
        self.executors: dict[tuple[str, str], Executor] = {}
        self._full_graph: fx.GraphModule | None = None
        self._lock = threading.RLock()
        self.choose(executor)

    def choose(self, executor: str) -> None:
        """Picks the executor that runs calls."""
        _known("executor", executor, EXECUTORS)
        self.chosen = self.executor(self._automatic()[0] if executor == "auto" else executor)
        self.asked = executor

    def set_backend(self, backend: str) -> None:
        before, self.backend = self.backend, _known("backend", backend, BACKENDS)
        try:
            self.choose(self.asked)
        except EecompileError:
            self.backend = before
            raise

    @property
    def reason(self) -> str:
        """Why the chosen executor runs."""
        why = self._automatic()[1] if self.asked == "auto" else f"asked for {self.asked!r}"
        return f"{why}; {self.chosen.support.reason}" if isinstance(self.chosen, CudaExecutor) else why

    def _automatic(self) -> tuple[str, str]:
        """What "auto" is here, and why."""
        found = support(self.device)
        if found.way == "none" or self.program.capture.front_end == "blocks":
            return "compact", "auto takes it: it computes the survivors only"
        if not VERIFIED:
            return "compact", "auto takes it: the device executor has not been verified on a GPU yet"
        if found.way == "bound":
            return "compact", f"auto takes it: {found.reason}"
        return "device", "auto takes it on this device"

    @property
    def device(self) -> torch.device:
        """Where the program's thresholds are."""
        assert self.program.marked is not None
        return self.program.marked.get_buffer(THRESHOLDS_BUFFER).device

    def executor(self, name: str) -> Executor:
        """The executor with this name, which may be another than the chosen one."""
        key = (name, self.backend)
        with self._lock:
            if key not in self.executors:
                self.executors[key] = self._built(name)
            return self.executors[key]

    def _built(self, name: str) -> Executor:
        if name == "reference":
            return ReferenceExecutor(self.program)
        if name == "simulate":
            return SimulateExecutor(self.program, self._options)
        if name == "device":
            return CudaExecutor(self.program, self._options)
        if self.program.capture.front_end == "blocks":
            if self.backend != "eager":
                raise StrategyError(
                    "a program captured as blocks runs the model's own Python code: there is no graph for another backend",
                    got=f"backend={self.backend!r}",
                    wanted='backend="eager"',
                )
            return BlocksExecutor(self.program)
        return CompactExecutor(self.program, self.backend)

    def interrupt(self) -> int:
        """Stops the calls of all executors that run now; gives how many there are."""
        return sum(executor.interrupt() for executor in list(self.executors.values()))

    def full_graph(self) -> fx.GraphModule:
        """The captured graph of the full model alone."""
        if not self.program.capture.models:
            return self.program.source
        if self._full_graph is None:
            self._full_graph = facts.own_graph(self.program.source, self.program.signature)
        return self._full_graph

    def reset(self) -> None:
        """Drops what was derived from the program's graphs, after a move to another device."""
        self._full_graph = None
        for executor in self.executors.values():
            executor.reset()

    def rebuild(self) -> None:
        """Drops all executors: the program's graphs read other weights now."""
        self._full_graph = None
        self.executors.clear()
        self.choose(self.asked)

    @property
    def options(self) -> Options:
        """How device programs are built; setting it drops those that are there."""
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        self._options = options
        for executor in self.executors.values():
            if isinstance(executor, DeviceExecutor):
                executor.options = options
                executor.reset()

    def device_program(self, flat: Sequence[Tensor], settings: Settings) -> DeviceProgram:
        """What a call is on a device that takes all decisions itself."""
        executor = self.executor("simulate")
        assert isinstance(executor, DeviceExecutor)
        return executor.device_program(flat, settings)[0]

    def check_no_sync(self, flat: Sequence[Tensor]) -> NoSync:
        """Whether the device programs of a call need the host between input and output."""
        self.executor("simulate")  # refuses programs without a graph
        return check(self.program, flat, self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """The same choice over a copy of the program, nothing built."""
        new = Engine(copy.deepcopy(self.program, memo), self.asked, self.backend)
        new.options = self._options
        return new


def _known(what: str, name: str, valid: Sequence[str]) -> str:
    check_name(what, name, valid, StrategyError)
    return name
