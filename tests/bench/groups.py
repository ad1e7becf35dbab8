"""The list of benchmark groups, and what a group is given.

A group is a module with `run(context)` that stays under four minutes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from eecompile.measuring import Rounds, rounds_of
from tests.bench.record import BUSY, Figure

GROUPS: dict[str, str] = {
    "closed": "all exits closed",
    "no-exit": "four open exits, no row leaves",
    "saving": "exit mix 50/25/25 over three exits",
    "by-hand": "the same mix, early exits written by hand as rivals",
    "gates": "gated blocks, closed for 0, 30 and 60% of the rows",
    "gates-bert": "gated blocks, closed for 0, 30 and 60% of the rows",
    "compile": "time of eecompile() itself, step by step",
    "memory": "parameters and peak memory",
    "deadlines": "calls under deadlines, idle and next to a busy process: late by more than 5%",
    "export": "programs in other runtimes: LeNet at batch 1, BERT with exits closed, an exit mix",
    "backends": "closed programs in eager mode against ONNX Runtime and OpenVINO; exits with segments in ONNX Runtime",
    "serving": "a server that answers each row at its exit, mix 50/25/25, against whole batches",
    "monitor": "calls under a monitor that keeps its state, against calls without one",
    "advice": "cost that advise projects, against fit and calibrate on all rows",
    "inductor": 'backend="inductor" against torch.compile of the original',
}


@dataclass(frozen=True)
class Context:
    """How to measure.

    Attributes:
        rounds: Interleaved rounds; the median of at least 7 is reported.
        seconds: Time that one measurement may spend on repeating rounds that others disturbed.
        small: Small models, for the test of the harness; figures of such a run say nothing.
    """

    device: torch.device
    rounds: int = 9
    seconds: float = 60.0
    small: bool = False

    def measure(self, calls: Mapping[str, Callable[[], Any]], *, min_seconds: float = 0.25, warm_up: int = 1) -> Rounds:
        """All calls in turn, without gradients."""
        wait = (lambda: torch.cuda.synchronize(self.device)) if self.device.type == "cuda" else None
        with torch.no_grad():
            return rounds_of(
                calls,
                self.rounds,
                min_seconds=0.002 if self.small else min_seconds,
                warm_up=warm_up,
                wait=wait,
                quiet_below=BUSY,
                seconds=self.seconds,
            )


def run(group: str, context: Context) -> list[Figure]:
    module = importlib.import_module(f"tests.bench.{group.replace('-', '_')}")
    figures: list[Figure] = module.run(context)
    return figures
