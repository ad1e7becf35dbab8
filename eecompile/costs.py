"""Cost of a row: what ran for it, in FLOPs, as a fraction of the full model's.

    cost = head_and_stage[exit_index] + sum over choices reached of (decider + sum over arms of share spent * arm FLOPs)

The table by exit counts every gate as open and every row on the model's own route; what was skipped is subtracted, steps of
halting chains are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eecompile.ir.settings import BRANCHES, GATES, Settings
from eecompile.passes.training_decisions import full_rows
from eecompile.program import Gate, Halt, Program


def runs(record: Gate | Halt, open_exits: Sequence[bool]) -> bool:
    """Whether a gate's region or a chain runs at all: a model of a cascade does not while its exits are closed."""
    return not record.only_for or any(open_exits[e] for e in record.only_for)


class CostModel:
    """Costs of one program under given settings; shapes: B rows, E exits, G gates, K routes or steps.

    Args:
        program: A scheduled program.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.total = program.total_flops or 1.0
        self._constants: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}
        self._tables: dict[tuple[object, ...], tuple[float, ...]] = {}

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
        scored = tuple(0 < t <= 1 for t in settings[GATES])
        key = is_open, scored, self.router_runs(settings, is_open)
        if key not in self._tables:
            self._tables[key] = tuple(self._at_exits(*key))
        return self._tables[key]

    def _at_exits(self, open_exits: Sequence[bool], scored: Sequence[bool], routed: bool) -> list[float]:
        program = self.program
        route = program.choices.route
        one_head = route is not None and route.to_exits  # a router to exits: only the row's own head runs
        spent, found = 0.0, []
        closed: list[tuple[tuple[int, ...], float]] = []  # work that no open exit needs
        for k, stage in enumerate(program.stages):
            spent += stage.flops
            mine = (g for g, s in zip(program.choices.gates, scored, strict=True) if s and g.stage == k)
            spent += sum(g.unit_flops for g in mine if runs(g, open_exits))
            spent += route.unit_flops if route is not None and routed and route.stage == k else 0.0
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

    def router_runs(self, settings: Settings, open_exits: Sequence[bool]) -> bool:
        """Whether a router has something to choose."""
        route = self.program.choices.route
        if route is None:
            return False
        if route.to_exits:
            return any(open_exits)
        return sum(m <= 1 for m in settings[BRANCHES]) > 1

    def at_routes(self, settings: Settings) -> Tensor:
        """[K] float32: cost of a row on each route, with the exits that are open."""
        route = self.program.choices.route
        assert route is not None
        costs = self.constant(self.at_exits(settings), torch.device("cpu"))
        if route.to_exits:
            return costs
        every = torch.eye(len(route.ways))
        return costs[-1] - self._saved_by_route(every, torch.full((len(route.ways),), len(self.program.exits)))

    # ------------------------------------------------------------------ by row

    def spent(
        self,
        settings: Settings,
        exit_index: Tensor,
        gates: Tensor | None,
        steps: Sequence[Tensor] = (),
        ways: Tensor | None = None,
        open_exits: Sequence[bool] | None = None,
    ) -> Tensor:
        """[B] float32: cost of each row.

        Args:
            exit_index: [B] int64.
            gates: [B, G] 1 for open, differentiable or not; None without gates.
            steps: Of every chain that halts [B, K], what of a step ran: see `steps_ran`.
            ways: [B, K] how much of each way of a router to branches, differentiable or not; None without.
            open_exits: Instead of those that are open under `settings`.
        """
        is_open = self.is_open(settings) if open_exits is None else open_exits
        cost = self.constant(self.at_exits(settings, is_open), exit_index.device)[exit_index]
        for h, ran in zip(self.program.choices.halts, steps, strict=True):
            if runs(h, is_open):
                cost = cost + self._of_steps(h, exit_index, ran, settings)
        if gates is not None and self.program.choices.gates:
            saves = self.constant([g.flops / self.total for g in self.program.choices.gates], cost.device)
            stages = self.constant([g.stage for g in self.program.choices.gates], cost.device, torch.int64)
            reached = (exit_index.unsqueeze(1) >= stages) & self.gates_run(is_open, cost.device)
            cost = cost - ((1 - gates.float()) * reached * saves).sum(1)
        return cost if ways is None else cost - self._saved_by_route(ways, exit_index)

    def at_end(
        self,
        settings: Settings,
        exit_index: Tensor,
        gates: Tensor | None,
        steps: Sequence[Tensor] = (),
        ways: Tensor | None = None,
    ) -> Tensor:
        """[B] float32: `spent` of rows that go to the end, gates and routes as they were decided: with every exit closed, or
        in a cascade open, so that all models run."""
        ends = len(self.program.exits)
        every = bool(self.program.capture.models)  # the gates of a cascade's earlier models have a price too
        return self.spent(settings, torch.full_like(exit_index, ends), gates, steps, ways, [every] * ends)

    def gates_run(self, open_exits: Sequence[bool], device: torch.device) -> Tensor:
        """[G] bool: gates whose region runs while these exits are open."""
        return self.constant([runs(g, open_exits) for g in self.program.choices.gates], device, torch.bool)

    def _of_steps(self, halt: Halt, exit_index: Tensor, ran: Tensor, settings: Settings) -> Tensor:
        """[B] what a chain changes of the cost: steps that were not taken, or taken again, and scores."""
        cost = torch.zeros_like(ran[:, 0])
        for k, step in enumerate(halt.steps):
            share = ran[:, k].detach()
            mine = (share > 0).to(share.dtype)
            more = (mine * step.flops if k else 0.0 * mine) if halt.repeated else (mine - 1) * step.flops
            more = more + mine * step.unit_flops if settings.halts else more
            more = more - (mine - share) * sum(p.flops for p in step.parts)
            cost = cost + torch.where(exit_index >= step.stage, more, 0.0)
        return cost / self.total

    def _saved_by_route(self, ways: Tensor, exit_index: Tensor) -> Tensor:
        """[B] what branches save; rows that had left before save nothing."""
        route = self.program.choices.route
        assert route is not None
        full = route.ways[-1].flops
        saves = self.constant([(full - w.flops) / self.total for w in route.ways], ways.device)
        found: Tensor = (ways * saves).sum(1) * (exit_index.to(ways.device) >= route.way_stage)
        return found

    # ------------------------------------------------------------------ what ran

    def steps_ran(
        self, settings: Settings, reports: Mapping[str, Tensor], exit_index: Tensor, training: bool = False
    ) -> list[Tensor]:
        """Of every chain that halts [B, K], 1 for a step that ran, where positions halt one by one the share of those that
        had not: the first one for every row that reached it."""
        found = []
        is_open = self.is_open(settings)
        for h in self.program.choices.halts:
            first = (exit_index >= h.steps[0].stage).float()
            ran = torch.stack([reports[s.name].float() if s.carries else first for s in h.steps], 1)
            found.append(ran if training or runs(h, is_open) else torch.zeros_like(ran))
        return found

    def widths_ran(self, gates: Tensor, exit_index: Tensor) -> Tensor:
        """[B, W] float32: the share of the channels that each part with widths ran with; 0 where it was skipped or the row
        had left before. `gates` [B, G], 1 for open."""
        names = [g.name for g in self.program.choices.gates]
        stages = {g.name: g.stage for g in self.program.choices.gates}
        found = []
        for w in self.program.choices.widths:
            mine = self.constant([names.index(g) for g in w.gates], gates.device, torch.int64)
            opened = (gates.detach()[:, mine] >= 0.5).long().sum(1)
            shares = self.constant([0.0, *w.fractions] if w.skips else w.fractions, gates.device)
            found.append(shares[opened] * (exit_index >= stages[w.gates[0]]))
        return torch.stack(found, 1)

    def gates_free(self, settings: Settings, gates: Tensor, kept_open: int = 0, full_share: float = 0.0) -> Tensor:
        """[B, G] bool: where the gate's own score decided; see `Trace.gates_free`.

        Args:
            gates: [B, G], 1 for open.
            kept_open: How many gates do not decide, in training.
            full_share: Share of the rows that all gates let in, in training.
        """
        names = [g.name for g in self.program.choices.gates]
        opened = gates.detach() >= 0.5
        scored = [0 < t <= 1 and i >= kept_open for i, t in enumerate(settings[GATES])]
        free = self.constant(scored, gates.device, torch.bool).expand(opened.shape).clone()
        free = free & ~full_rows(gates.shape[0], full_share, gates.device).unsqueeze(1)
        for group, recipe in enumerate(self.program.choices.gate_recipes):
            if not recipe.min_open:
                continue
            # Gates that open a width are not counted: what they are part of runs already.
            flags = [g.group == group and g.kind != "width" for g in self.program.choices.gates]
            counted = self.constant(flags, gates.device, torch.bool)
            later = counted.long().flip(0).cumsum(0).flip(0) - counted.long()
            mine = (opened & counted).long()
            free = free & ((mine.cumsum(1) - mine >= recipe.min_open - later) | ~counted)
        for i, g in enumerate(self.program.choices.gates):
            if g.needs:
                free[:, i] &= opened[:, names.index(g.needs)]
        return free
