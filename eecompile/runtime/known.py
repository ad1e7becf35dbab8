"""Decisions that are constant under the settings of a call, and the values reported for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eecompile.ir.settings import Settings
from eecompile.passes.regions import RUN, Possible, decisions
from eecompile.program import Halt, Program
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
    begins = {s.name: s.stage for h in program.choices.halts for s in h.steps if s.stage}
    for name in begins.keys() & reports.keys():  # reported before an exit where rows left
        found[name] = reached(found[name], exit_index, begins[name])
    return found


def _known(program: Program, arms: Possible, reports: Mapping[str, Tensor], exit_index: Tensor) -> dict[str, Tensor]:
    """Decisions of gates that are open or closed whatever the input, and zeros for what no row reached."""
    taken = decisions(program, arms)
    stages = {g.name: g.stage for g in program.choices.gates}
    stages |= {s.name: s.stage for h in program.choices.halts for s in h.steps if s.carries}
    known = {
        name: (exit_index >= stage).float() * (taken[name] == RUN)
        for name, stage in stages.items()
        if len(taken[name]) == 1 or name not in reports
    }
    for h in program.choices.halts:
        if h.name not in reports:
            known[h.name] = closed_ledger(h, exit_index)
    r = program.choices.route
    if r is not None and r.name not in reports:  # one way is open, or no row got to the branches; or no exit is open
        way = next(iter(arms[-1])) if r.ways and len(arms[-1]) == 1 else 0
        shape = (len(exit_index), len(program.exits)) if r.to_exits else (len(exit_index),)
        known[r.name] = torch.full(shape, way, device=exit_index.device)
    return known


def closed_ledger(halt: Halt, exit_index: Tensor) -> Tensor:
    """[B, 3] what the ledger of a closed chain says: all steps, or the first of a block that would be repeated. Where every
    position halts by itself [B, 1, 3]."""
    steps = 1.0 if halt.repeated else float(len(halt.steps))
    figures = (1.0, steps, steps + 1.0)
    row = torch.stack([torch.full((), v, device=exit_index.device) for v in figures])  # no copy from the host
    found = (exit_index >= halt.stage).float().unsqueeze(1) * row
    return found.unsqueeze(1) if halt.per_token else found
