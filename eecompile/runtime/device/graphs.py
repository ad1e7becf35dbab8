"""One CUDA graph with conditional nodes: IF, SWITCH and WHILE, their bodies captured one after the other.

Needs CUDA 12.8 or later, a driver of 570 or later, and `cuda.bindings`. torch captures the graph itself; what torch does not
know (2.11 has no conditional nodes, later ones only IF) goes through the bindings: a node is added where the capture
stands, the capture pauses, each body is captured into its own graph, the capture goes on after the node.

Conditions lie in handles that a kernel sets. A body may hold kernels, copies, memory sets and further conditional nodes
of one context; no host functions, no allocations, no events.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from eecompile.errors import EecompileError

Fill = Callable[[], None]
ALLOWED = {0: "kernel", 1: "memcpy", 2: "memset", 4: "child graph", 5: "empty", 13: "conditional"}
"""What a body may hold, by the driver's numbers for types of nodes."""
ASSIGN_DEFAULT = 1  # cudaGraphCondAssignDefault: the handle has its default at every launch

CAPTURING = threading.Lock()
"""One capture at a time: torch's allocator routes a thread's allocations to one pool."""


def bindings() -> Any:
    """The CUDA runtime's bindings."""
    from cuda.bindings import runtime  # type: ignore[import-not-found, unused-ignore]

    return runtime


def checked(given: tuple[Any, ...], what: str) -> Any:
    """The values of a call of the bindings.

    Raises:
        EecompileError: The call failed.
    """
    error, *values = given
    if int(error) != 0:
        raise EecompileError("CUDA refused a step of a capture", where=what, got=repr(error))
    return values[0] if len(values) == 1 else tuple(values)


class ConditionalGraph:
    """A CUDA graph that is captured once and launched again and again."""

    def __init__(self, device: torch.device, runtime: Any = None) -> None:
        if torch.cuda.get_allocator_backend() != "native":
            raise EecompileError(
                "conditional nodes need torch's own allocator",
                got=torch.cuda.get_allocator_backend(),
                wanted="native",
                hint="unset backend: in PYTORCH_CUDA_ALLOC_CONF",
            )
        self.rt = bindings() if runtime is None else runtime
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        # Kept: at most one instantiation of a graph with conditional nodes may exist.
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        self.mode = self.rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.kinds: dict[str, int] = {}

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What runs inside is captured. Results must go to memory that exists before."""
        index, done = self.device.index or 0, False
        try:
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                # torch 2.11 routes allocations by the capture's number, and a body is a capture of its own: route by
                # thread. Ending and beginning leaves one entry; beginning took another reference, which goes back.
                torch._C._cuda_endAllocateToPool(index, self.pool)
                torch._C._cuda_beginAllocateCurrentThreadToPool(index, self.pool)
                torch._C._cuda_releasePool(index, self.pool)
                yield
            done = True
        finally:
            if not done:  # torch raises before it unbinds the pool
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(index, self.pool)
        self.graph.instantiate()

    def replay(self) -> None:
        """Launches on the current stream."""
        self.graph.replay()

    def handle(self, default: int | None = None) -> int:
        """A condition of a node that will be added where the capture stands now.

        Args:
            default: What it is whenever the graph that holds the node starts; None for nothing in particular.
        """
        graph, _, _ = self._standing()
        flags = 0 if default is None else ASSIGN_DEFAULT
        made = self.rt.cudaGraphConditionalHandleCreate(graph, default or 0, flags)
        return int(checked(made, "cudaGraphConditionalHandleCreate"))

    def if_(self, handle: int, body: Fill) -> None:
        """Runs the body where the condition is not 0."""
        self._node(handle, "If", [body])

    def switch(self, handle: int, bodies: list[Fill]) -> None:
        """Runs the body of the condition's number; none for a number past the last."""
        self._node(handle, "Switch", bodies)

    def while_(self, handle: int, body: Fill) -> None:
        """Runs the body as long as the condition is not 0; the body sets it again."""
        self._node(handle, "While", [body])

    def _standing(self) -> tuple[Any, list[Any], list[Any]]:
        """The graph that is being captured, and the nodes that the next one comes after."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        status, _, graph, nodes, edges, count = checked(self.rt.cudaStreamGetCaptureInfo(stream), "capture info")
        if status != self.rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
            raise EecompileError("a condition outside of a capture", got=repr(status))
        before = [self.rt.cudaGraphNode_t(int(n)) for n in nodes[:count]]
        return self.rt.cudaGraph_t(int(graph)), before, list(edges[:count])

    def _node(self, handle: int, kind: str, fills: list[Fill]) -> None:
        rt, stream = self.rt, torch.cuda.current_stream(self.device).cuda_stream
        graph, before, edges = self._standing()
        params = rt.cudaGraphNodeParams()
        params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = handle
        params.conditional.type = getattr(rt.cudaGraphConditionalNodeType, f"cudaGraphCondType{kind}")
        params.conditional.size = len(fills)
        node = checked(rt.cudaGraphAddNode(graph, before, edges or None, len(before), params), f"{kind} node")
        # The list of bodies belongs to CUDA and is reused: copy the numbers.
        bodies = [rt.cudaGraph_t(int(g)) for g in params.conditional.phGraph_out]
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        checked(rt.cudaStreamUpdateCaptureDependencies(stream, [node], None, 1, 1), "capture dependencies")
        checked(rt.cudaStreamEndCapture(stream), "pause of the capture")
        try:
            for fill, body in zip(fills, bodies, strict=True):
                self._body(stream, fill, body, kind)
        finally:
            resumed = rt.cudaStreamBeginCaptureToGraph(stream, graph, [node], None, 1, self.mode)
            checked(resumed, "resumption of the capture")

    def _body(self, stream: int, fill: Fill, body: Any, kind: str) -> None:
        rt = self.rt
        checked(rt.cudaStreamBeginCaptureToGraph(stream, body, None, None, 0, self.mode), f"body of {kind}")
        try:
            fill()
        finally:
            checked(rt.cudaStreamEndCapture(stream), f"end of a body of {kind}")
        _, count = checked(rt.cudaGraphGetNodes(body), "nodes of a body")
        nodes = checked(rt.cudaGraphGetNodes(body, count), "nodes of a body")[0] if count else []
        types = {int(checked(rt.cudaGraphNodeGetType(n), "type of a node")) for n in nodes}
        if not types or types - set(ALLOWED):
            raise EecompileError(
                "a body of a conditional node holds what CUDA forbids there",
                where=f"{kind} node",
                got=f"types {sorted(types - set(ALLOWED))}" if types else "nothing at all",
                wanted=", ".join(ALLOWED.values()),
                hint="run fast.check_no_sync() to find the operator",
            )
