"""The decisions of a compiled module as users see and set them: exits, gates, thresholds, temperatures, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.costs import costs_of, runs
from eecompile.criteria import MaxProbability
from eecompile.errors import StrategyError
from eecompile.gates import GateUnit
from eecompile.heads import Branch
from eecompile.kernels.confidence import confidence as confidence_of
from eecompile.passes.insert_exits import COMBINATION, HEADS, TEMPERATURES, THRESHOLDS
from eecompile.passes.insert_gates import GATE_THRESHOLDS
from eecompile.passes.insert_halting import HALT_SCALE, closed_scale
from eecompile.passes.place_gates import GATES
from eecompile.passes.training_decisions import full_rows
from eecompile.program import Halt
from eecompile.routing import Routing
from eecompile.thresholds import ExitRecord, GateRecord, HaltRecord, HaltStepRecord, WidthRecord, threshold_values

NEVER = 2.0  # a halting threshold that nothing reaches


class Decisions(Routing):
    """What `CompiledModule` tells of its exits, gates, routes and halting."""

    steps_measured: float | None = None  # mean steps of the rows that `evaluate` saw last

    @property
    def thresholds(self) -> Tensor:
        """[E] float32; the buffer that decisions read."""
        found: Tensor = getattr(self.graph_module, THRESHOLDS)
        return found

    @property
    def temperatures(self) -> Tensor:
        """[E + 1] float32, the model's own end last."""
        found: Tensor = getattr(self.graph_module, TEMPERATURES)
        return found

    @property
    def heads(self) -> nn.Module:
        """The inserted heads, by exit name."""
        found: nn.Module = getattr(self.graph_module, HEADS, nn.Module())
        return found

    @property
    def combination(self) -> nn.Module:
        """The trained weights of the exits' ensemble: `weights` [E, E] and `bias` [E, C]; empty without."""
        found: nn.Module = getattr(self.graph_module, COMBINATION, nn.Module())
        return found

    @property
    def exits(self) -> tuple[ExitRecord, ...]:
        total = self.program.total_flops or 1.0
        thresholds, temperatures = self.thresholds.tolist(), self.temperatures.tolist()
        return tuple(
            ExitRecord(
                name=e.name,
                node=e.node,
                cut=e.cut,
                depth=e.depth,
                threshold=thresholds[i],
                temperature=temperatures[i],
                head=self.branch(e.name).head,
                head_kind=e.head_kind,
                head_cost=e.head_flops / total,
                criterion=e.criterion,
                combine=e.combine,
            )
            for i, e in enumerate(self.program.exits)
        )

    def branch(self, exit_name: str) -> Branch:
        found = getattr(self.heads, exit_name)
        assert isinstance(found, Branch)
        return found

    @property
    def gate_thresholds(self) -> Tensor:
        """[G] float32; the buffer that gates read."""
        found: Tensor = getattr(self.graph_module, GATE_THRESHOLDS, torch.empty(0, device=self.thresholds.device))
        return found

    @property
    def gate_units(self) -> nn.Module:
        """The inserted gate units, by name; one for all gates is called `policy`."""
        units = self.program.gates or self.program.halts
        return self.graph_module.get_submodule(GATES) if units else nn.Module()

    @property
    def gates(self) -> tuple[GateRecord, ...]:
        total = self.program.total_flops or 1.0
        thresholds = self.gate_thresholds.tolist()
        units = []
        for g in self.program.gates:
            unit = self.graph_module.get_submodule(g.unit)
            assert isinstance(unit, GateUnit)
            units.append(unit)
        return tuple(
            GateRecord(
                name=g.name,
                node=g.node,
                region=f"{g.region} at {g.width:.0%}" if g.width else g.region,
                kind=g.kind,
                depth=g.depth,
                threshold=thresholds[i],
                head=units[i],
                head_kind=units[i].kind,
                saves=g.flops / total,
                head_cost=g.unit_flops / total,
            )
            for i, g in enumerate(self.program.gates)
        )

    @property
    def widths(self) -> tuple[WidthRecord, ...]:
        """The parts that run at one of several widths."""
        total = self.program.total_flops or 1.0
        saves = {g.name: g.flops / total for g in self.program.gates}
        return tuple(
            WidthRecord(w.name, w.region, w.fractions, w.channels, w.skips, w.gates, sum(saves[g] for g in w.gates))
            for w in self.program.widths
        )

    def widths_of(self, gates: Tensor) -> Tensor:
        """[B, W] float32: the share of the channels that each part with widths ran with, 0 where it was skipped.

        Args:
            gates: [B, G], 1 for open.
        """
        names = [g.name for g in self.program.gates]
        found = []
        for w in self.program.widths:
            mine = self.held.constant([names.index(g) for g in w.gates], gates.device, torch.int64)
            opened = (gates.detach()[:, mine] >= 0.5).long().sum(1)
            shares = self.held.constant([0.0, *w.fractions] if w.skips else w.fractions, gates.device)
            found.append(shares[opened])
        return torch.stack(found, 1)

    @property
    def halts(self) -> tuple[HaltRecord, ...]:
        """The chains of steps that rows halt in."""
        total = self.program.total_flops or 1.0
        return tuple(
            HaltRecord(
                name=h.name,
                depth=h.depth,
                threshold=self.halting_threshold,
                rule=self.program.halt_recipes[h.group].rule,
                repeated=h.repeated,
                per_token=h.per_token,
                steps=tuple(
                    HaltStepRecord(
                        s.name,
                        s.region,
                        str(getattr(self.graph_module.get_submodule(s.unit), "kind", "custom")),
                        s.flops / total,
                        s.unit_flops / total,
                        sum(p.flops for p in s.parts) / total,
                    )
                    for s in h.steps
                ),
            )
            for h in self.program.halts
        )

    @property
    def halting_threshold(self) -> float:
        """How far the halting scores of a row must add up: 1 as trained, less stops sooner, above 1 never stops."""
        if not self.program.halts:
            raise StrategyError("this program does not halt", hint="compile with a strategy that halts, such as act")
        (scale,) = self.held.numbers("scale", getattr(self.graph_module, HALT_SCALE))
        return NEVER if scale == closed_scale(self.program) else 1.0 / scale

    def set_halting_threshold(self, threshold: float) -> None:
        """Sets how far scores must add up: above 0; above 1 the model runs as it was.

        Raises:
            StrategyError: Not a positive number, or the program does not halt.
        """
        if not self.program.halts:
            raise StrategyError("this program does not halt", hint="compile with a strategy that halts, such as act")
        if not threshold > 0:
            wanted = "above 0 to 1, above 1 never halts"
            raise StrategyError("a halting threshold is a positive number", got=repr(threshold), wanted=wanted)
        self._replace(HALT_SCALE, [closed_scale(self.program) if threshold > 1 else 1.0 / threshold])
        self._changed()

    def set_gate_thresholds(self, thresholds: Any) -> None:
        """Sets from which score gates open: one number, one for each in order, or by gate name.

        0 keeps a gate open whatever its score, above 1 keeps it shut; both cost no score. No recompilation.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        names = [g.name for g in self.program.gates]
        values = threshold_values(names, self.gate_thresholds.tolist(), thresholds, "gate")
        if values:
            self._replace(GATE_THRESHOLDS, values)
        self._changed()

    def set_thresholds(self, thresholds: Any) -> None:
        """Sets when samples leave: one number for all exits, one for each in order, or by exit or gate name.

        No recompilation: only the set of open exits picks another plan. Calls that run meanwhile, in other threads, go on
        with the thresholds that they have begun with.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        names = [e.name for e in self.program.exits]
        gates = {g.name for g in self.program.gates}
        if isinstance(thresholds, Mapping) and gates & set(thresholds):
            self.set_gate_thresholds({k: v for k, v in thresholds.items() if k in gates})
            thresholds = {k: v for k, v in thresholds.items() if k not in gates}
        values = threshold_values(names, self.thresholds.tolist(), thresholds)
        self._replace(THRESHOLDS, values)
        self._changed()

    def set_temperatures(self, temperatures: Sequence[float]) -> None:
        """Sets the softmax temperature of every exit and, last, of the model's own output.

        Raises:
            StrategyError: A wrong count, or a temperature that is not a positive number.
        """
        values = [float(t) for t in temperatures]
        wanted = len(self.program.exits) + 1
        if len(values) != wanted or not all(0 < t < float("inf") for t in values):
            raise StrategyError("temperatures are positive numbers", got=values, wanted=f"{wanted} of them")
        self._replace(TEMPERATURES, values)
        self._changed()

    def _replace(self, name: str, values: Sequence[float]) -> None:
        """Puts another tensor under this name into every graph, not other numbers into the old one: a running call goes on
        with what it has begun with."""
        new = torch.tensor(values, dtype=torch.float32, device=self.thresholds.device)
        training = self.__dict__.get("_training_graphs", {}).values()
        for gm in (self.graph_module, self.program.graph_module, *training):
            for module in gm.modules():
                if name in module._buffers:
                    module._buffers[name] = new

    def _changed(self) -> None:
        """Tells the executors that thresholds are others now."""
        raise NotImplementedError

    def costs(self, open_exits: Sequence[bool]) -> Tensor:
        """[E + 1] float32: fraction of the full model's FLOPs of a row that leaves at each exit, open heads and the scores
        of gates included; every gate counts as open."""
        thresholds = self.held.numbers("gates", self.gate_thresholds) if self.program.gates else ()
        scored = tuple(0 < t <= 1 for t in thresholds)
        key = (tuple(bool(o) for o in open_exits), scored, self.router_runs(open_exits))
        cache = self.__dict__["_costs"]
        if key not in cache:
            cache[key] = torch.tensor(costs_of(self.program, *key), dtype=torch.float32)
        cost: Tensor = cache[key]
        return cost

    def confidences_of(
        self, outputs: Sequence[Tensor], temperatures: Tensor, scores: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Confidences `[n]` of stored predictions with other temperatures, all exits open; NaN where none is known.

        Where the surest exit answers, `outputs` are what the heads say by themselves.
        """
        found: list[Tensor] = []
        state, surest = None, bool(self.program.exits) and self.program.exits[0].combine == "confident"
        criterion = self.program.exits[0].criterion if self.program.exits else MaxProbability()
        for k, logits in enumerate(outputs):
            last = k == len(outputs) - 1
            own = last and (criterion.learned or criterion.routed)
            kind = MaxProbability(reduce=criterion.reduce) if own else criterion
            if kind.routed:  # what the router says has nothing to do with the exit's output
                assert scores is not None
                found.append(scores[k])
                continue
            judged = scores[k].unsqueeze(-1) if scores is not None and kind.learned else logits
            value, state = confidence_of(
                judged,
                state if kind.stateful else None,
                kind.name,
                temperatures[k],
                patience=kind.patience,
                reduce=kind.reduce,
            )
            found.append(value.fmax(found[-1]) if surest and found and not last else value)
        return tuple(found)

    def spent(
        self,
        exit_index: Tensor,
        gates: Tensor | None,
        steps: Sequence[Tensor] = (),
        ways: Tensor | None = None,
    ) -> Tensor:
        """[B] float32: fraction of the full model's FLOPs spent on each row, what was left out not counted.

        Args:
            exit_index: [B] int64.
            gates: [B, G] 1 for open, differentiable or not; None without gates.
            steps: Of every chain that halts [B, K], what of a step ran: see `steps_of`.
            ways: [B, K] how much of each way of a router to branches, differentiable or not; None without.
        """
        return self._all_spent(exit_index, gates, steps, ways, self.open_exits)

    def end_cost(self, size: int, gates: Tensor | None, steps: Sequence[Tensor] = (), ways: Tensor | None = None) -> Tensor:
        """[B] float32: as `spent` of rows that go to the end, gates and routes as they were decided: with every exit closed,
        or in a cascade open, so that all models run."""
        ends = len(self.program.exits)
        every = bool(self.program.models)  # the gates of a cascade's earlier models have a price too
        index = torch.full((size,), ends, device=self.thresholds.device)
        return self._all_spent(index, gates, steps, ways, [every] * ends)

    def _all_spent(
        self, exit_index: Tensor, gates: Tensor | None, steps: Sequence[Tensor], ways: Tensor | None, open_exits: list[bool]
    ) -> Tensor:
        cost = self._spent(exit_index, gates, steps, open_exits)
        return cost if ways is None else cost - self.saved_by(ways, exit_index)

    def gates_free(self, gates: Tensor) -> Tensor:
        """[B, G] bool: where the gate's own score decided; see `Result.gates_free`. `gates` [B, G], 1 for open."""
        names = [g.name for g in self.program.gates]
        threshold, opened = self.gate_thresholds, gates.detach() >= 0.5
        free = ((threshold > 0) & (threshold <= 1)).expand(opened.shape).clone()
        if self.training:
            kept = torch.arange(len(names), device=gates.device) < getattr(self, "gates_kept_open", 0)
            full = full_rows(gates.shape[0], getattr(self, "gates_full_share", 0.0), gates.device)
            free = free & ~kept & ~full.unsqueeze(1)
        for group, recipe in enumerate(self.program.gate_recipes):
            if not recipe.min_open:
                continue
            # Gates that open a width are not counted: what they are part of runs already.
            flags = [g.group == group and g.kind != "width" for g in self.program.gates]
            counted = torch.tensor(flags, device=gates.device)
            later = counted.long().flip(0).cumsum(0).flip(0) - counted.long()
            mine = (opened & counted).long()
            free = free & ((mine.cumsum(1) - mine >= recipe.min_open - later) | ~counted)
        for i, g in enumerate(self.program.gates):
            if g.needs:
                free[:, i] &= opened[:, names.index(g.needs)]
        return free

    def _spent(self, exit_index: Tensor, gates: Tensor | None, steps: Sequence[Tensor], open_exits: list[bool]) -> Tensor:
        cost = self.held.constant(self.costs(open_exits).tolist(), exit_index.device)[exit_index]
        for h, ran in zip(self.program.halts, steps, strict=True):
            if not runs(h, open_exits):
                continue
            cost = cost + self._halting_cost(h, exit_index, ran)
        if gates is None or not self.program.gates:
            return cost
        total = self.program.total_flops or 1.0
        saves = self.held.constant([g.flops / total for g in self.program.gates], cost.device)
        stages = self.held.constant([g.stage for g in self.program.gates], cost.device, torch.int64)
        reached = (exit_index.unsqueeze(1) >= stages) & self._running(open_exits)
        return cost - ((1 - gates.float()) * reached * saves).sum(1)

    def _running(self, open_exits: Sequence[bool]) -> Tensor:
        """[G] bool: gates whose region runs while these exits are open."""
        found = [runs(g, open_exits) for g in self.program.gates]
        return self.held.constant(found, self.thresholds.device, torch.bool)

    def _halting_cost(self, halt: Halt, exit_index: Tensor, ran: Tensor) -> Tensor:
        """[B] what a chain changes of the cost: steps that were not taken, or taken again, and scores."""
        total = self.program.total_flops or 1.0
        closed = self.halting_threshold == NEVER
        cost = torch.zeros_like(ran[:, 0])
        for k, step in enumerate(halt.steps):
            share = ran[:, k].detach()
            mine = (share > 0).to(share.dtype)
            more = (mine * step.flops if k else 0.0 * mine) if halt.repeated else (mine - 1) * step.flops
            more = more if closed else more + mine * step.unit_flops
            more = more - (mine - share) * sum(p.flops for p in step.parts)
            cost = cost + torch.where(exit_index >= step.stage, more, 0.0)
        return cost / total

    def steps_of(self, reports: Mapping[str, Tensor], exit_index: Tensor) -> list[Tensor]:
        """Of every chain that halts [B, K], 1 for a step that ran, where positions halt one by one the share of those that
        had not: the first one for every row that reached it."""
        found = []
        open_exits = self.open_exits
        for h in self.program.halts:
            first = (exit_index >= h.steps[0].stage).float()
            ran = torch.stack([reports[s.name].float() if s.carries else first for s in h.steps], 1)
            found.append(ran if self.training or runs(h, open_exits) else torch.zeros_like(ran))
        return found
