"""What `calibrate` found, and what it promises, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.calibration.promise import loss_in_words, proven
from eecompile.calibration.settings_report import SettingsReport
from eecompile.training.report import Report, json_safe, number, percent, stacked, table


@dataclass
class CalibratedExit:
    """One exit, or the model's own end.

    Attributes:
        threshold: None for the model's own end; 2.0 for a closed exit.
        temperature: What logits are divided by before the confidence.
        share: Share of all calibration rows that leave there.
        cost: Of a row that leaves there, as a fraction of the full model's FLOPs.
        nll_before: Negative log likelihood at the old temperature, in nats; None where it was not fitted.
        nll_after: At the new one.
    """

    name: str
    threshold: float | None
    temperature: float
    share: float
    cost: float
    nll_before: float | None = None
    nll_after: float | None = None

    @property
    def is_open(self) -> bool:
        return self.threshold is None or self.threshold <= 1


@dataclass
class CalibrationReport(Report):
    """Thresholds and temperatures that were set, and how sure the bound is.

    Attributes:
        qualified: Whether any early exit satisfies the bound. If not, all exits are closed.
        guarantee: The promise, or why there is none, as a sentence.
        target: "accuracy", "agreement" or "metric".
        rows: Calibration rows used; `search_rows` of them to find candidates, `test_rows` to test them.
        skipped_rows: Rows without a label, left out.
        rows_needed: Fewest calibration rows with which anything could qualify; None for `delta=None` or
            max_drop 0.
        expected_cost: Mean fraction of the full model's FLOPs on all rows.
        loss_search: Mean of the tested loss, an upper bound of the drop, on the rows of the search.
        loss_test: On the rows of the test; None for `delta=None`.
        drop_search: Drop itself (full model's mean score less that with early exit) on the rows of the
            search.
        drop_test: On the rows of the test.
        p_value: Of "the mean loss is above max_drop", on the rows of the test.
        level: Level that it was tested at, at most `delta`.
        tested: Threshold vectors in the path; `accepted` of them qualified.
        before: Where there are gates or branches too: what was found for them, first.
    """

    title: ClassVar[str] = "Calibration"

    qualified: bool
    guarantee: str
    target: str
    max_drop: float
    delta: float | None
    rows: int
    search_rows: int
    test_rows: int
    skipped_rows: int
    rows_needed: int | None
    expected_cost: float
    loss_search: float
    loss_test: float | None
    drop_search: float
    drop_test: float | None
    p_value: float | None
    level: float | None
    tested: int
    accepted: int
    seed: int
    exits: list[CalibratedExit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: list[SettingsReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            **{key: json_safe(value) for key, value in vars(self).items() if key not in ("exits", "before")},
            "gates": None,
            "routes": None,
            **{found.rows_of()[0]: found.to_dict() for found in self.before},
            "exits": [json_safe({**vars(row), "open": row.is_open}) for row in self.exits],
        }

    def __rich__(self) -> RenderableType:
        columns = ["exit", "threshold", "temperature", "leaving", "cost"]
        rows = [
            [
                row.name,
                "-" if row.threshold is None else number(row.threshold, 6) if row.is_open else "closed",
                number(row.temperature),
                percent(row.share, 1),
                percent(row.cost, 1),
            ]
            for row in self.exits
        ]
        parts = [f"expected cost {percent(self.expected_cost, 1)} of the full model's FLOPs, {self.rows} rows"]
        drop = f"drop {percent(self.drop_search)} on the rows of the search"
        if self.drop_test is not None:
            drop += f", {percent(self.drop_test)} on those of the test (bound used: {percent(self.loss_test)})"
        if self.before:
            parts.insert(0, "given these, against the model as it is set; costs of exits count nothing as left out:")
        return stacked(*self.before, table(self.title, columns, rows), *parts, drop, self.guarantee, *self.notes)


def sentence(report: CalibrationReport, smallest_p: float | None) -> str:
    """The promise, or why there is none."""
    n, full = report.test_rows, "the full model"
    what = loss_in_words(report.target, report.max_drop, full, f"{full}'s", full)
    if report.delta is None:
        if report.qualified:
            return f"No guarantee was asked for: on these {report.rows} rows {what}."
        return f"No thresholds save anything while {what} on these {report.rows} rows; all exits are closed."
    if report.qualified:
        return proven(what, report.delta, n, report.p_value, report.level)
    closed = f"No thresholds qualify for max_drop={report.max_drop:g}, delta={report.delta:g}; all exits are closed."
    if report.rows_needed is None:
        return f"{closed} No number of rows can show a drop of 0: pass max_drop above 0, or delta=None."
    if report.rows < report.rows_needed:
        return (
            f"{closed} {report.rows} rows are too few to show it even without a single error: at least "
            f"{report.rows_needed} are needed, more where early answers are sometimes wrong."
        )
    p = "" if smallest_p is None else f" (smallest p = {smallest_p:.2g})"
    return (
        f"{closed} On the {n} rows of the test the safest of {report.tested} candidates lost too much or "
        f"saved nothing{p}. Train the exits longer, allow a larger max_drop, or calibrate on more rows."
    )
