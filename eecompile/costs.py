"""Cost of a row: what ran for it, in FLOPs, as a fraction of the full model's.

    cost = head_and_stage[exit_index] + sum over choices reached of (decider + sum over arms of share spent * arm FLOPs)

The table by exit counts what the model as it was runs: every gate open, every row on the model's own route. What a row ran
in place of that is added, see `Charge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eecompile.ir.records import Decider
from eecompile.ir.settings import BRANCHES, EXITS, HALTING, Settings
from eecompile.program import Program
from eecompile.runtime.known import PerSettings


class CostModel:
    """Costs of one program under given settings; shapes: B rows, E exits, C charges, K routes.

    Args:
        program: A scheduled program.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.total = program.total_flops or 1.0
        charges = program.choices.charges
        self._usual = [c.flops * c.usual / self.total for c in charges]
        self._live = [c.live_flops / self.total for c in charges]
        self._prices = {h: [(c.flops + c.unit_flops * h) / self.total for c in charges] for h in (False, True)}
        self._stages = [program.choices.stage_of(c.node) for c in charges]
        self._constants: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}
        self._tables = PerSettings[dict[tuple[bool, ...], tuple[float, ...]]](lambda _: {})

    def constant(self, values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values on a device, sent there once. Not to be written to."""
        key = tuple(values), device, dtype
        found = self._constants.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self._constants[key] = torch.tensor(values, dtype=dtype, device=device)
        return found

    def is_open(self, settings: Settings) -> list[bool]:
        """For each exit, whether rows may leave there."""
        return [i in settings.open_exits for i in range(len(self.program.exits))]

    # ------------------------------------------------------------------ by exit

    def at_exits(self, settings: Settings, open_exits: Sequence[bool] | None = None) -> tuple[float, ...]:
        """[E + 1] cost of a row that leaves at each exit and, last, at the model's own end; open heads and the scores of
        gates and routers included. The figure for a closed exit is what a row would cost that left there.

        Args:
            open_exits: Instead of those that are open under `settings`.
        """
        is_open = tuple(self.is_open(settings) if open_exits is None else map(bool, open_exits))
        tables = self._tables(settings)
        if is_open not in tables:
            values = settings.to_dict()
            asked = [self._asked(d, values.get(d.family, {}), is_open) for d in self.program.choices.deciders]
            tables[is_open] = tuple(self._at_exits(is_open, asked))
        return tables[is_open]

    def _asked(self, d: Decider, values: Mapping[str, float], open_exits: Sequence[bool]) -> bool:
        """Whether a unit's numbers decide anything under a family's values; those of halting steps are charged by row."""
        if not self.runs(d.end, open_exits) or d.family == HALTING:
            return False
        if d.family == EXITS:
            return any(open_exits)
        if d.family == BRANCHES:
            return sum(margin <= 1 for margin in values.values()) > 1
        return any(0 < values[slot] <= 1 for slot in d.slots)

    def runs(self, end: str, open_exits: Sequence[bool]) -> bool:
        """Whether what ends at a node runs at all: a model of a cascade does not while its exits are closed."""
        only_for = self.program.choices.only_for.get(end, ())
        return not only_for or any(open_exits[e] for e in only_for)

    def _at_exits(self, open_exits: Sequence[bool], asked: Sequence[bool]) -> list[float]:
        program, choices = self.program, self.program.choices
        one_head = any(d.family == EXITS for d in choices.deciders)  # a router to exits: only the row's own head runs
        spent, found = 0.0, []
        closed: list[tuple[tuple[int, ...], float]] = []  # work that no open exit needs
        for k, stage in enumerate(program.stages):
            spent += stage.flops
            mine = (d for d, a in zip(choices.deciders, asked, strict=True) if a and choices.stage_of(d.node) == k)
            spent += sum(d.flops for d in mine)
            for exits, cost in stage.only_for:
                if any(open_exits[e] for e in exits):
                    spent += cost
                else:
                    closed.append((exits, cost))
            if k == len(program.exits):
                found.append(spent / self.total)
                continue
            here = program.exits[k].head_flops
            alone = sum(cost for exits, cost in closed if k in exits)
            found.append((spent + here + alone) / self.total)
            spent += here if open_exits[k] and not one_head else 0.0
        return found

    def at_routes(self, settings: Settings) -> Tensor:
        """[K] float32: cost of a row on each route, with the exits that are open."""
        costs = self.constant(self.at_exits(settings), torch.device("cpu"))
        flops = {c.name: c.flops / self.total for c in self.program.choices.charges}
        for c in self.program.choices:
            ways = [flops[f"{c.name}.{arm.name}"] for arm in c.arms if f"{c.name}.{arm.name}" in flops]
            if ways:
                return costs[-1] + self.constant([w - ways[-1] for w in ways], costs.device)
        return costs

    # ------------------------------------------------------------------ by row

    def spent(
        self, settings: Settings, exit_index: Tensor, ran: Sequence[Tensor], open_exits: Sequence[bool] | None = None
    ) -> Tensor:
        """[B] float32: cost of each row.

        Args:
            exit_index: [B] int64.
            ran: [B, C] in one or several pieces: how much of what each charge is for ran for a row, differentiable or not.
                Of a step whose positions halt one by one the share of those that had not.
            open_exits: Instead of those that are open under `settings`.
        """
        is_open = self.is_open(settings) if open_exits is None else open_exits
        device, price = exit_index.device, self._prices[settings.halts]
        cost = self.constant(self.at_exits(settings, is_open), device)[exit_index]
        if not ran:
            return cost
        share = ran[0].float() if len(ran) == 1 else torch.cat([r.float() for r in ran], 1)
        paid = share * self.constant(price, device)
        if any(self._live):
            live = self.constant(self._live, device)
            whole = torch.where(live > 0, (share > 0).float(), share)
            paid = whole * self.constant(price, device) - (whole - share) * live
        runs = self.constant([self.runs(c.end, is_open) for c in self.program.choices.charges], device, torch.bool)
        reached = (exit_index.unsqueeze(1) >= self.constant(self._stages, device, torch.int64)) & runs
        return cost + ((paid - self.constant(self._usual, device)) * reached).sum(1)

    def at_end(self, settings: Settings, exit_index: Tensor, ran: Sequence[Tensor]) -> Tensor:
        """[B] float32: `spent` of rows that go to the end, gates and routes as they were decided: with every exit closed, or
        in a cascade open, so that all models run."""
        ends = len(self.program.exits)
        every = bool(self.program.capture.models)  # the gates of a cascade's earlier models have a price too
        return self.spent(settings, torch.full_like(exit_index, ends), ran, [every] * ends)
