"""What calibrating gates, a router between branches or halting found, and what it promises, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.calibration.promise import loss_in_words, proven
from eecompile.training.report import Report, json_safe, number, percent, stacked, table


@dataclass
class Found:
    """What a calibration of settings found, and how sure the bound is.

    Attributes:
        qualified: Whether any setting satisfies the bound. If not, nothing is left out.
        target, max_drop, delta, rows, search_rows, test_rows, rows_needed: As in `CalibrationReport`.
        expected_cost: Mean fraction of the full model's FLOPs on all rows, all exits closed.
        loss_test: Mean of the tested loss on the rows of the test; None for `delta=None`.
        drop: The drop itself on all rows.
        p_value: Of "the mean loss is above max_drop", tested at `level`.
        tested: Settings in the path; `accepted` of them qualified.
        shares: Share of the rows that passed each gate or took each route, or their mean steps; None where nothing did.
        curve: Every setting that was run: setting, mean cost, drop.
        budget: The mean cost that was asked for instead of a drop; None without.
    """

    qualified: bool
    target: str
    max_drop: float
    delta: float | None
    rows: int
    search_rows: int
    test_rows: int
    rows_needed: int | None
    expected_cost: float
    loss_test: float | None
    drop: float
    p_value: float | None
    level: float | None
    tested: int
    accepted: int
    shares: tuple[float, ...] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    budget: float | None = None


class SettingsReport(Report, Found):
    """What was set, with the promise or why there is none as a sentence (`guarantee`)."""

    what: ClassVar[str]  # no setting of ...
    against: ClassVar[str]
    otherwise: ClassVar[str]

    def __init__(self, found: Found) -> None:
        vars(self).update(vars(found))

    def rows_of(self) -> tuple[str, list[Any]]:
        """Key of the parts in JSON, and the parts."""
        raise NotImplementedError

    def columns(self) -> dict[str, list[str]]:
        """The table, by column."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        key, parts = self.rows_of()
        told = {name: json_safe(value) for name, value in vars(self).items() if name not in (key, "shares")}
        return {"title": self.title, **told, "guarantee": self.guarantee, key: [json_safe(vars(part)) for part in parts]}

    def __rich__(self) -> RenderableType:
        columns = self.columns()
        cells = [list(row) for row in zip(*columns.values(), strict=True)]
        text = f"expected cost {percent(self.expected_cost, 1)} of the full model's FLOPs, {self.rows} rows"
        drop = f"drop {percent(self.drop)}"
        return stacked(table(self.title, list(columns), cells), f"{text}; {drop}", self.guarantee)

    @property
    def guarantee(self) -> str:
        """The promise, or why there is none."""
        if self.budget is not None:
            kept = f"the most accurate of {self.accepted} {self.what} with a mean cost of at most {percent(self.budget, 1)}"
            return f"No guarantee: {kept} on these {self.rows} rows, of {self.tested} that were tried."
        model, answers = f"the model with {self.against}", f"those with {self.against}"
        loss = loss_in_words(self.target, self.max_drop, model, answers, self.against)
        if self.delta is None:
            if self.qualified:
                return f"No guarantee was asked for: on these {self.rows} rows {loss}."
            return f"No {self.what} save anything while {loss}; {self.otherwise}."
        if self.qualified:
            return proven(loss, self.delta, self.test_rows, self.p_value, self.level)
        none = f"No {self.what} qualify for max_drop={self.max_drop:g}, delta={self.delta:g}; {self.otherwise}."
        if self.rows_needed is not None and self.rows < self.rows_needed:
            return f"{none} {self.rows} rows are too few to show it: at least {self.rows_needed} are needed."
        return f"{none} The safest of {self.tested} settings lost too much. Train longer, or allow a larger max_drop."


@dataclass
class CalibratedGate:
    """One gate.

    Attributes:
        region: What it may skip.
        threshold: Score from which it opens; 0 is always open.
        open: Share of the calibration rows that it lets in.
        saves: What it saves when shut, as a fraction of the full model's FLOPs.
    """

    name: str
    region: str
    threshold: float
    open: float
    saves: float


class GateCalibrationReport(SettingsReport):
    """Thresholds of gates that were set, one `CalibratedGate` each."""

    title: ClassVar[str] = "Calibration of gates"
    what, against, otherwise = "thresholds of the gates", "all gates open", "all gates are open"

    def __init__(self, found: Found, gates: list[CalibratedGate]) -> None:
        super().__init__(found)
        self.gates = gates

    def rows_of(self) -> tuple[str, list[Any]]:
        return "gates", self.gates

    def columns(self) -> dict[str, list[str]]:
        return {
            "gate": [g.name for g in self.gates],
            "region": [g.region for g in self.gates],
            "threshold": ["always open" if g.threshold == 0 else number(g.threshold) for g in self.gates],
            "rows let in": [percent(g.open, 1) for g in self.gates],
            "saves when shut": [percent(g.saves) for g in self.gates],
        }


@dataclass
class CalibratedRoute:
    """One route of a router between branches.

    Attributes:
        margin: What its probability is lowered by before the largest is taken; above 1 it is closed.
        share: Share of the calibration rows that take it.
        cost: Of a row that takes it, as a fraction of the full model's FLOPs.
    """

    name: str
    margin: float
    share: float
    cost: float


class RouteCalibrationReport(SettingsReport):
    """Margins of routes that were set, one `CalibratedRoute` each."""

    title: ClassVar[str] = "Calibration of routes"
    what, against, otherwise = "margins of the routes", "all rows on its own way", "all rows take the model's own way"

    def __init__(self, found: Found, routes: list[CalibratedRoute]) -> None:
        super().__init__(found)
        self.routes = routes

    def rows_of(self) -> tuple[str, list[Any]]:
        return "routes", self.routes

    def columns(self) -> dict[str, list[str]]:
        return {
            "route": [r.name for r in self.routes],
            "margin": ["closed" if r.margin > 1 else number(r.margin) for r in self.routes],
            "rows sent there": [percent(r.share, 1) for r in self.routes],
            "cost": [percent(r.cost, 1) for r in self.routes],
        }


@dataclass
class CalibratedHalt:
    """The chains that rows halt in; they share one threshold.

    Attributes:
        threshold: What scores must add up to; above 1 no row halts.
        steps: Mean steps of the calibration rows; None where nothing did.
        most: Steps of a row that never halts.
    """

    name: str
    threshold: float
    steps: float | None
    most: int


class HaltCalibrationReport(SettingsReport):
    """The halting threshold that was set."""

    title: ClassVar[str] = "Calibration of halting"
    what, against, otherwise = "halting thresholds", "no row halted", "no row halts"

    def __init__(self, found: Found, halting: list[CalibratedHalt], repeated: bool = False) -> None:
        super().__init__(found)
        self.halting = halting
        if repeated:
            self.against, self.otherwise = "as many steps as trained", "rows take as many steps as trained"  # type: ignore[misc]

    def rows_of(self) -> tuple[str, list[Any]]:
        return "halting", self.halting

    def columns(self) -> dict[str, list[str]]:
        return {
            "chain": [h.name for h in self.halting],
            "threshold": ["never halts" if h.threshold > 1 else number(h.threshold) for h in self.halting],
            "mean steps": [number(h.steps, 3) for h in self.halting],
            "most": [str(h.most) for h in self.halting],
        }
