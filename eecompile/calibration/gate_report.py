"""What calibrating gates found, and what it promises, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.training.report import Report, json_safe, number, percent, stacked, table


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


@dataclass
class GateCalibrationReport(Report):
    """Gate thresholds that were set, and how sure the bound is.

    Attributes:
        qualified: Whether any setting satisfies the bound. If not, all gates are open.
        guarantee: The promise, or why there is none, as a sentence.
        target, max_drop, delta, rows, search_rows, test_rows, rows_needed: As in `CalibrationReport`.
        expected_cost: Mean fraction of the full model's FLOPs on all rows, all exits closed.
        loss_test: Mean of the tested loss on the rows of the test; None for `delta=None`.
        drop: The drop itself on all rows.
        p_value: Of "the mean loss is above max_drop", tested at `level`.
        tested: Settings in the path; `accepted` of them qualified.
        curve: Every setting that was run: thresholds, mean cost, drop.
    """

    title: ClassVar[str] = "Calibration of gates"

    qualified: bool
    guarantee: str
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
    gates: list[CalibratedGate] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            **{key: json_safe(value) for key, value in vars(self).items() if key != "gates"},
            "gates": [json_safe(vars(gate)) for gate in self.gates],
        }

    def __rich__(self) -> RenderableType:
        rows = [
            [
                g.name,
                g.region,
                "always open" if g.threshold == 0 else number(g.threshold),
                percent(g.open, 1),
                percent(g.saves),
            ]
            for g in self.gates
        ]
        text = f"expected cost {percent(self.expected_cost, 1)} of the full model's FLOPs, {self.rows} rows"
        drop = f"drop {percent(self.drop)}"
        columns = ["gate", "region", "threshold", "rows let in", "saves when shut"]
        return stacked(table(self.title, columns, rows), f"{text}; {drop}", self.guarantee)


def gate_sentence(report: GateCalibrationReport) -> str:
    """The promise, or why there is none."""
    drop = f"{100 * report.max_drop:g}%"
    what = {
        "accuracy": f"accuracy drops by at most {drop} against the model with all gates open",
        "agreement": f"at most {drop} of the answers differ from those with all gates open",
        "metric": f"the mean metric drops by at most {report.max_drop:g} against all gates open",
    }[report.target]
    if report.delta is None:
        if report.qualified:
            return f"No guarantee was asked for: on these {report.rows} rows {what}."
        return f"No thresholds of the gates save anything while {what}; all gates are open."
    if report.qualified:
        sure = f"{100 * (1 - report.delta):g}%"
        return (
            f"With probability at least {sure} over the calibration data, {what} on inputs drawn like it "
            f"(Learn then Test on {report.test_rows} rows, p = {report.p_value:.2g} at level {report.level:.2g})."
        )
    open_ = f"No thresholds qualify for max_drop={report.max_drop:g}, delta={report.delta:g}; all gates are open."
    if report.rows_needed is not None and report.rows < report.rows_needed:
        return f"{open_} {report.rows} rows are too few to show it: at least {report.rows_needed} are needed."
    return f"{open_} The safest of {report.tested} settings lost too much. Train longer, or allow a larger max_drop."
