"""Decisions that are constant under the settings of a call, and the values reported for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eecompile.ir.records import HaltingChain
from eecompile.ir.settings import BRANCHES, EXITS, HALTING, Settings
from eecompile.passes.regions import RUN, Possible, decisions
from eecompile.program import Program
from eecompile.runtime.reference import reached

T = TypeVar("T")


class PerSettings(Generic[T]):
    """What is derived from settings, kept for those that were used last.

    Args:
        derive: Makes it.
    """

    def __init__(self, derive: Callable[[Settings], T]) -> None:
        self.derive = derive
        self._last: tuple[Settings, T] | None = None

    def __call__(self, settings: Settings) -> T:
        last = self._last  # one reference: another thread may replace it meanwhile
        if last is None or last[0] is not settings:
            last = self._last = settings, self.derive(settings)
        return last[1]

    def forget(self) -> None:
        self._last = None


def with_known(program: Program, arms: Possible, reports: Mapping[str, Tensor], exit_index: Tensor) -> dict[str, Tensor]:
    """What a call reported, and what is known without a report.

    Args:
        arms: What was possible in the call.
        reports: What the call reported.
        exit_index: [B] int64.
    """
    found = {**reports, **_known(program, arms, reports, exit_index)}
    begins = {d.name: program.choices.stage_of(d.node) for d in program.choices.deciders if d.family == HALTING}
    for name in (n for n, stage in begins.items() if stage and n in reports):  # reported before an exit where rows left
        found[name] = reached(found[name], exit_index, begins[name])
    return found


def _known(program: Program, arms: Possible, reports: Mapping[str, Tensor], exit_index: Tensor) -> dict[str, Tensor]:
    """Decisions of gates that are open or closed whatever the input, and zeros for what no row reached."""
    choices, taken = program.choices, decisions(program, arms)
    known = {
        c.name: (exit_index >= choices.stage_of(c.node)).float() * (taken[c.name] == RUN)
        for c in choices.charges
        if c.name in taken and (len(taken[c.name]) == 1 or c.name not in reports)
    }
    for h in choices.chains:
        if h.name not in reports:
            known[h.name] = closed_ledger(h, choices.stage_of(h.output), exit_index)
    for d in choices.deciders:  # of a router: one branch is open, or no row got to the branches; or no exit is open
        if d.family in (EXITS, BRANCHES) and d.name not in reports:
            only = taken.get(d.name, ())
            shape = (len(exit_index), *([len(program.exits)] if d.family == EXITS else []))
            known[d.name] = torch.full(shape, min(only) if len(only) == 1 else 0, device=exit_index.device)
    return known


def closed_ledger(chain: HaltingChain, stage: int, exit_index: Tensor) -> Tensor:
    """[B, 3] what the ledger of a closed chain says: all steps, or the first of a block that would be repeated. Where every
    position halts by itself [B, 1, 3]. `stage` is how many exits lie before its end."""
    steps = 1.0 if chain.repeated else float(len(chain.steps))
    figures = (1.0, steps, steps + 1.0)
    row = torch.stack([torch.full((), v, device=exit_index.device) for v in figures])  # no copy from the host
    found = (exit_index >= stage).float().unsqueeze(1) * row
    return found.unsqueeze(1) if chain.per_token else found
