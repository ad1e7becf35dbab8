"""Checks the rewritten program against the captured graph, on numbers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from eecompile.capture.untouched import untouched
from eecompile.errors import PassError
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.insert_exits import THRESHOLDS
from eecompile.passes.insert_gates import GATE_THRESHOLDS
from eecompile.passes.insert_halting import HALT_SCALE, closed_scale
from eecompile.passes.insert_routes import CLOSED, ROUTE_MARGINS
from eecompile.program import Program


@dataclass(frozen=True)
class Verify(Pass):
    """With exits closed, gates open and rows on the model's own way, marked and staged graph give its output bit for bit.

    Args:
        example: Flat inputs; None checks nothing but the graphs' own rules.
    """

    name: ClassVar[str] = "verify"
    requires: ClassVar[frozenset[str]] = frozenset({"scheduled"})
    ensures: ClassVar[frozenset[str]] = frozenset({"verified"})

    example: tuple[torch.Tensor, ...] | None = None

    def run(self, program: Program) -> PassResult:
        if self.example is None or program.marked is None:
            return PassResult(program, False, summary="no example: numbers not compared")
        marked, staged = program.marked, program.graph_module
        thresholds, gates = getattr(marked, THRESHOLDS), getattr(marked, GATE_THRESHOLDS, torch.empty(0))
        scale = getattr(marked, HALT_SCALE, torch.empty(0))
        margins = getattr(marked, ROUTE_MARGINS, torch.empty(0))
        scale_before, margins_before = scale.clone(), margins.clone()
        before, gates_before = thresholds.clone(), gates.clone()
        flags = {m: m.training for m in marked.modules()}
        marked.eval()
        staged.eval()
        count = len(program.signature.outputs)
        try:
            thresholds.fill_(2.0)
            gates.fill_(0.0)
            margins[:-1].fill_(CLOSED)
            scale.fill_(closed_scale(program))
            with torch.no_grad(), _steady(program):
                want = program.source(*self.example)[:count]
                graphs = {"marked": marked} | ({} if staged is marked else {"staged": staged})
                for name, gm in graphs.items():
                    _equal(want, gm(*self.example)[:count], f"{name} graph, all exits closed and gates open")
                thresholds.copy_(before)
                gates.copy_(gates_before)
                scale.copy_(scale_before)
                margins.copy_(margins_before)
                _equal(marked(*self.example), staged(*self.example), "staged graph")
        finally:
            thresholds.copy_(before)
            gates.copy_(gates_before)
            scale.copy_(scale_before)
            margins.copy_(margins_before)
            for m, flag in flags.items():
                m.training = flag
        return PassResult(program, False, summary="closed exits and open gates give the captured graph's output bit for bit")


def _steady(program: Program) -> contextlib.AbstractContextManager[None]:
    """A model that was captured as blocks runs itself, and what its forward sets on it does not count as a call."""
    return untouched(program.source) if program.front_end == "blocks" else contextlib.nullcontext()


def _equal(want: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...], where: str) -> None:
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if a.shape != b.shape or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            off = float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("inf")
            raise PassError(
                "the rewritten graph does not compute what the captured one does",
                where=where,
                got=f"output {i} differs by {off:.3g}",
                wanted="equal bit for bit",
                hint="this is a bug in a pass; fast.history shows each step",
            )
