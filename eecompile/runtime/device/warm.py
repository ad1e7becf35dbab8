"""Runs every body of a device program once, before a capture: kernels are loaded and tuned, workspaces allocated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eecompile.kernels._lists import LIVE
from eecompile.runtime.device.machine import Machine
from eecompile.runtime.device.nodes import ALL_ROWS, Body, Decide, Gather, If, OpenRows, Scatter, Switch, While


class Warm(Machine):
    """Takes every branch. Lists name all rows, so that whatever a body gathers was computed from real inputs."""

    def if_(self, node: If) -> None:
        pretend(self.values, node.body, 1)
        self.body(node.body)

    def switch(self, node: Switch) -> None:
        for i, body in enumerate(node.bodies):
            pretend(self.values, body, self.program.buckets[i % len(self.program.buckets)])
            self.body(body)

    def while_(self, node: While) -> None:
        self.body(node.body)


def pretend(values: Mapping[str, Tensor], body: Body, rows: int) -> None:
    """Makes the lists that a body reads say that as many rows are live as it has room for."""
    for node in body:
        match node:
            case Gather() | Scatter():
                _say(values, node.index, node.control, rows)
            case Decide():
                _say(values, node.rows, node.count, rows)
            case OpenRows():
                _say(values, None, node.count, rows)


def _say(values: Mapping[str, Tensor], index: str | None, control: str, rows: int) -> None:
    if index is not None:
        torch.arange(len(values[index]), out=values[index])
    if control != ALL_ROWS:
        values[control][LIVE].fill_(rows)
