"""What `calibrate` can set inside a model: thresholds of gates, how far a branch must lead to get a row, and how far halting
scores must add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.settings import Knob, Setting
from eecompile.calibration.settings_report import (
    CalibratedGate,
    CalibratedHalt,
    CalibratedRoute,
    Found,
    GateCalibrationReport,
    HaltCalibrationReport,
    RouteCalibrationReport,
)
from eecompile.program import Result
from eecompile.training.full import branches, gate_names, halts

CLOSED = 2.0


class Gates(Knob):
    """One threshold for all gates, as in training, at quantiles of their scores."""

    quantiles = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)

    def now(self) -> Setting:
        return tuple(self.fast.gate_thresholds.tolist())

    def set(self, setting: Setting) -> None:
        self.fast.set_gate_thresholds(list(setting))

    @property
    def full(self) -> Setting:
        return (0.0,) * len(self.fast.gates)

    def told(self, result: Result) -> Tensor:
        assert result.gate_scores is not None
        return result.gate_scores.float()

    def settings(self, told: Tensor) -> list[Setting]:
        values = told.flatten().nan_to_num(nan=1.0).sort().values
        at = [float(values[int(q * (len(values) - 1))].clamp(1e-6, 1.0)) for q in self.quantiles]
        return [*((t,) * told.shape[1] for t in at), self.now()]

    def took(self, result: Result) -> Tensor:
        assert result.gates is not None
        return result.gates.double()

    def report(self, found: Found) -> GateCalibrationReport:
        shares = found.shares or (1.0,) * len(self.fast.gates)
        gates = [
            CalibratedGate(g.name, g.region, g.threshold, share, g.saves)
            for g, share in zip(self.fast.gates, shares, strict=True)
        ]
        return GateCalibrationReport(found, gates)


class Routes(Knob):
    """How far the likeliest branch must lead the model's own way, at quantiles of that lead; and no row on its own way."""

    sent = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # shares of the rows

    def now(self) -> Setting:
        return tuple(self.fast.route_margins.tolist())

    def set(self, setting: Setting) -> None:
        self.fast.set_route_margins(list(setting))

    @property
    def full(self) -> Setting:
        return (CLOSED,) * (len(self.fast.routes) - 1) + (0.0,)

    def told(self, result: Result) -> Tensor:
        assert result.route_weights is not None
        weights = result.route_weights.float()
        return weights[:, :-1].max(1, keepdim=True).values - weights[:, -1:]

    def settings(self, told: Tensor) -> list[Setting]:
        leads, count = told.flatten().nan_to_num(nan=-1.0), len(self.fast.routes) - 1
        # above the largest lead that stays: ties go to the branch
        at = [float(leads.quantile(1 - share)) for share in self.sent]
        margins = [(max(t, 0.0),) * count + (max(-t, 0.0),) for t in at]
        return [*margins, (0.0,) * count + (CLOSED,), self.now()]

    def took(self, result: Result) -> Tensor:
        assert result.route is not None
        there = (result.route >= 0).unsqueeze(1)
        return torch.nn.functional.one_hot(result.route.clamp_min(0), len(self.fast.routes)).double() * there

    def report(self, found: Found) -> RouteCalibrationReport:
        shares = found.shares or (0.0,) * (len(self.fast.routes) - 1) + (1.0,)
        routes = [
            CalibratedRoute(r.name, r.margin if r.margin is not None else 0.0, share, r.cost)
            for r, share in zip(self.fast.routes, shares, strict=True)
        ]
        return RouteCalibrationReport(found, routes)


class Halting(Knob):
    """How far the halting scores of a row must add up: the same for all chains.

    Nothing is left out where no row halts; of a block that is repeated, where rows take as many steps as trained.
    """

    def now(self) -> Setting:
        return (self.fast.halting_threshold,)

    def set(self, setting: Setting) -> None:
        self.fast.set_halting_threshold(setting[0])

    @property
    def full(self) -> Setting:
        return (1.0,) if self.repeated else (CLOSED,)

    @property
    def repeated(self) -> bool:
        return any(h.repeated for h in self.fast.program.halts)

    def told(self, result: Result) -> Tensor:
        return self.took(result).float()

    def settings(self, told: Tensor) -> list[Setting]:
        return [*((t,) for t in THRESHOLDS), self.now()]

    def took(self, result: Result) -> Tensor:
        assert result.steps is not None
        return result.steps.double().view(len(result.steps), -1).mean(1, keepdim=True)

    def report(self, found: Found) -> HaltCalibrationReport:
        chains = self.fast.program.halts
        most = sum(len(h.steps) for h in chains)
        steps = None if found.shares is None else found.shares[0]
        name = ", ".join(h.name for h in chains)
        return HaltCalibrationReport(found, [CalibratedHalt(name, self.now()[0], steps, most)], self.repeated)


THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)


def exits_are_set(fast: Any) -> bool:
    """Whether calibration sets exits: not those that only train what else is decided."""
    return bool(fast.exits) and not (knobs_of(fast) and getattr(getattr(fast, "strategy", None), "training_exits", False))


def knobs_of(fast: Any) -> list[Knob]:
    """What the module has to set before its exits."""
    there = ((Gates, bool(gate_names(fast))), (Routes, branches(fast)), (Halting, halts(fast)))
    return [knob(fast) for knob, has in there if has]
