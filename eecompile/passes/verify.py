"""Checks the rewritten program against the captured graph, on numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eecompile.capture.untouched import untouched
from eecompile.errors import PassError
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.prediction import check_scores
from eecompile.program import Program


@dataclass(frozen=True)
class Verify(Pass):
    """With neutral settings, marked and staged graph give the captured graph's output bit for bit; its scores are logits.

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
        graphs = {"marked": marked} | ({} if staged is marked else {"staged": staged})
        flags = {m: m.training for gm in graphs.values() for m in gm.modules()}
        count, device = len(program.signature.outputs), facts.device_of(marked)
        try:
            with torch.no_grad(), _steady(program):
                for gm in graphs.values():
                    program.settings.neutral().put_into(gm.eval(), device)
                want = program.source(*self.example)[:count]
                made, capture = program.prediction, program.capture
                if program.exits and made.tail is None and not capture.models:
                    check_scores(want[made.index or 0], capture.front_end, program.prediction_leaf.path)
                for name, gm in graphs.items():
                    got = program.answer(gm(*self.example)[:count], self.example)
                    _equal(want, got, f"{name} graph, neutral settings")
                for gm in graphs.values():
                    program.settings.put_into(gm, device)
                _equal(marked(*self.example), staged(*self.example), "staged graph")
        finally:
            for gm in graphs.values():
                program.settings.put_into(gm, device)
            for m, flag in flags.items():
                m.training = flag
        return PassResult(program, False, summary="neutral settings give the captured graph's output bit for bit")


def _steady(program: Program) -> contextlib.AbstractContextManager[Any]:
    """A model that was captured as blocks runs itself, and what its forward sets on it does not count as a call."""
    return untouched(program.source) if program.capture.front_end == "blocks" else contextlib.nullcontext()


def _equal(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor], where: str) -> None:
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
