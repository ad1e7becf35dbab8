"""The decisions of a compiled module as users see and set them: exits, gates, thresholds, temperatures, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.costs import CostModel
from eecompile.criteria import MaxProbability
from eecompile.errors import StrategyError
from eecompile.gates import GateUnit
from eecompile.heads import Branch
from eecompile.ir import settings
from eecompile.ir.settings import CLOSED, EXITS, GATES, HALTING, TEMPERATURES, Settings
from eecompile.kernels.confidence import confidence as confidence_of
from eecompile.passes.insert_exits import COMBINATION, HEADS
from eecompile.passes.place_gates import GATES as UNITS
from eecompile.routing import Routing
from eecompile.thresholds import ExitRecord, GateRecord, HaltRecord, HaltStepRecord, WidthRecord
from eecompile.waiting import units_of, untrained_names


class Decisions(Routing):
    """What `CompiledModule` tells of its exits, gates, routes and halting."""

    cost_model: CostModel
    steps_measured: float | None = None  # mean steps of the rows that `evaluate` saw last

    @property
    def settings(self) -> Settings:
        """Thresholds, temperatures and all else that may be set, as one value."""
        raise NotImplementedError

    @settings.setter
    def settings(self, new: Settings) -> None:
        raise NotImplementedError

    @property
    def thresholds(self) -> Tensor:
        """[E] float32; what is written to it counts from the next call on."""
        found: Tensor = getattr(self.graph_module, settings.THRESHOLDS_BUFFER)
        return found

    @property
    def temperatures(self) -> Tensor:
        """[E + 1] float32, the model's own end last; as `thresholds`."""
        found: Tensor = getattr(self.graph_module, settings.TEMPERATURES_BUFFER)
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
        thresholds, temperatures = self.settings[EXITS], self.settings[TEMPERATURES]
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
                units=units_of(self, e),
            )
            for i, e in enumerate(self.program.exits)
        )

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of exits, gates and routes, and "halting", that nobody has trained; see `eecompile.waiting`."""
        return untrained_names(self)

    def branch(self, exit_name: str) -> Branch:
        found = getattr(self.heads, exit_name)
        assert isinstance(found, Branch)
        return found

    @property
    def gate_thresholds(self) -> Tensor:
        """[G] float32; as `thresholds`."""
        found: Tensor = getattr(self.graph_module, settings.GATES_BUFFER, torch.empty(0, device=self.thresholds.device))
        return found

    @property
    def gate_units(self) -> nn.Module:
        """The inserted gate units, by name; one for all gates is called `policy`."""
        units = self.program.gates or self.program.halts
        return self.graph_module.get_submodule(UNITS) if units else nn.Module()

    @property
    def gates(self) -> tuple[GateRecord, ...]:
        total = self.program.total_flops or 1.0
        thresholds = self.settings[GATES]
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
        """What the halting scores of a row must add up to: 1 as trained, less stops sooner, above 1 never stops, as where
        nothing halts."""
        return self.settings[HALTING][0] if self.program.halts else CLOSED

    def set_halting_threshold(self, threshold: float) -> None:
        """Sets what scores must add up to: above 0; above 1 the model runs as it was.

        Raises:
            StrategyError: Not a positive number, or the program does not halt.
        """
        self._check_halts()
        self.settings = self.settings.with_values(HALTING, threshold)
        self.waiting.settled(HALTING)

    def _check_halts(self) -> None:
        if not self.program.halts:
            raise StrategyError("this program does not halt", hint="compile with a strategy that halts, such as act")

    def set_gate_thresholds(self, thresholds: Any) -> None:
        """Sets from which score gates open: one number, one for each in order, or by gate name.

        0 keeps a gate open whatever its score, above 1 keeps it closed; both cost no score. No recompilation.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        self.settings = self.settings.with_values(GATES, thresholds)
        self.waiting.settled(GATES, thresholds)

    def set_thresholds(self, thresholds: Any) -> None:
        """Sets when samples leave: one number for all exits, one for each in order, or by exit or gate name.

        No recompilation: only the set of open exits picks another plan. Calls that run meanwhile keep theirs.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        found, given = self.settings, thresholds
        gates = {g.name for g in self.program.gates}
        if isinstance(thresholds, Mapping) and gates & set(thresholds):
            found = found.with_values(GATES, {k: v for k, v in thresholds.items() if k in gates})
            thresholds = {k: v for k, v in thresholds.items() if k not in gates}
        self.settings = found.with_values(EXITS, thresholds)
        self.waiting.settled(EXITS, thresholds)
        if given is not thresholds:
            self.waiting.settled(GATES, given)

    def set_temperatures(self, temperatures: Any) -> None:
        """Sets the softmax temperature of every exit and, last, of the model's own output.

        Raises:
            StrategyError: A wrong count, or a temperature that is not a positive number.
        """
        self.settings = self.settings.with_values(TEMPERATURES, temperatures)

    def costs(self, open_exits: Sequence[bool], settings: Settings | None = None) -> Tensor:
        """[E + 1] float32: fraction of the full model's FLOPs of a row that leaves at each exit, open heads and the scores
        of gates included; every gate counts as open. Under the present settings, or those given."""
        found = self.cost_model.at_exits(self.settings if settings is None else settings, open_exits)
        return torch.tensor(found, dtype=torch.float32)

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
