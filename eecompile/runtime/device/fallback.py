"""Device programs without conditional nodes: the host launches bodies by a number that may be old, and never waits.

The number of survivors only falls, so any older one is a bound from above. After each decision it is copied to pinned
memory; the host looks only whether a copy has arrived, and runs the next stage at the bucket of the newest number that it
knows. Kernels mask with the true number. What is computed in vain is what had left since that number was true.

A region within a stage (a gated one, a width, a branch) runs at the newest number of the stage's own rows: it holds, since
no row is open that is not live. How many are open is not asked for: that number is made just before it is needed, and would
arrive in time only where the host waits, and unlike survivors it rises again from region to region, so that an older one is
no bound. So k branches cost up to k times one here, and with conditional nodes they do not.

Only where there is a deadline the host waits, after each decision: it reads the clock, and what it launched in vain would
make the output late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.kernels._lists import ALIVE, LIVE
from eecompile.runtime.device.machine import Calls, Hosted
from eecompile.runtime.device.nodes import Copy, Decide, DeviceProgram, Empty, If, Node, OpenRows, Switch, While


class Mailbox(Protocol):
    """Numbers on their way from the device."""

    def post(self, number: Tensor) -> None:
        """Sends a `[1]` int32 tensor on its way."""
        ...

    def newest(self) -> int | None:
        """The last number that has arrived; None before the first. Never waits."""
        ...


class EventMailbox:
    """Through pinned memory, with an event after each copy."""

    def __init__(self) -> None:
        self._sent: list[tuple[torch.cuda.Event, Tensor]] = []
        self._newest: int | None = None

    def post(self, number: Tensor) -> None:
        there = torch.empty(1, dtype=number.dtype, pin_memory=True)
        there.copy_(number, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._sent.append((event, there))

    def newest(self) -> int | None:
        while self._sent and self._sent[0][0].query():  # type: ignore[no-untyped-call]
            self._newest = int(self._sent.pop(0)[1])
        return self._newest


class Bound(Hosted):
    """Runs a nested program by bounds from above.

    Args:
        mailbox: How the numbers of survivors come to the host.
    """

    def __init__(
        self,
        program: DeviceProgram,
        memory: Mapping[str, Tensor],
        calls: Calls,
        mailbox: Mailbox,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(program, memory, calls, clock)
        self.mailbox, self.bound = mailbox, program.batch
        self.stage: str | None = None  # control of the stage that is running, None for the first
        self.opened: dict[str, int] = {}  # rows of the stage, by the control of a gated region in it

    def decide(self, node: Decide) -> None:
        super().decide(node)
        self.mailbox.post(self.values[node.control][LIVE : LIVE + 1])
        if node.deadline is not None:
            self.settle()

    def node(self, node: Node) -> None:
        super().node(node)
        if isinstance(node, OpenRows):
            self.opened[node.control] = node.capacity

    def new(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros: where no row is left nothing is copied here, and a stage may look numbers up in a table."""
        return like.new_zeros(shape)

    def empty(self, node: Empty) -> Tensor:
        return super().empty(node).zero_()

    def copy(self, node: Copy) -> None:
        """A leaf without rows is there only if anybody got to where it is computed."""
        if self.stage is None or not node.target.startswith("leaf."):
            super().copy(node)
            return
        target, alive = self.values[node.target], self.values[self.stage][ALIVE] > 0
        target.copy_(torch.where(alive, self.values[node.source], target))

    def _known(self) -> int:
        newest = self.mailbox.newest()
        if newest is not None:
            self.bound = min(self.bound, newest)
        return self.bound

    def if_(self, node: If) -> None:
        if self._known() > 0:
            if node.control not in self.opened:
                self.stage = node.control
            self.body(node.body)

    def switch(self, node: Switch) -> None:
        rows = self._known()
        if node.control in self.opened:
            rows = min(rows, self.opened[node.control])
        else:
            self.stage = node.control
        if rows > 0:
            self.body(node.bodies[next(i for i, b in enumerate(self.program.buckets) if b >= rows)])

    def while_(self, node: While) -> None:
        raise EecompileError("a loop on the device has no bound", got="a machine program", wanted="a nested one")
