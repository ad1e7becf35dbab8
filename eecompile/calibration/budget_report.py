"""What a budget led to: thresholds, mean cost and accuracy; for one budget, or a curve over several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.calibration.report import CalibratedExit
from eecompile.ir.settings import Settings
from eecompile.training.report import Report, json_safe, percent, stacked, table


@dataclass
class BudgetReport(Report):
    """Thresholds for a budget.

    Attributes:
        settings: Of the whole program; `fast.calibrate` sets them.
        budget: Largest mean fraction of the full model's FLOPs.
        method: "search" or "quota".
        mean_cost: On the calibration rows; at most the budget.
        accuracy: Mean score of the early answers there; `full_accuracy` that of the full model.
        least_cost: The smallest mean cost that any thresholds could have.
        ratio: Of the quota: share leaving at an exit over the share at the one before. None for the search.
        gap: By how much the mean score of any thresholds within the budget is higher at most, on the calibration rows: 0
            where these are proved to be the best. None where nothing is proved.
    """

    title: ClassVar[str] = "Budget"

    settings: Settings
    budget: float
    method: str
    target: str
    rows: int
    skipped_rows: int
    mean_cost: float
    accuracy: float
    full_accuracy: float
    least_cost: float
    ratio: float | None
    gap: float | None = None
    exits: list[CalibratedExit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            **{key: json_safe(value) for key, value in vars(self).items() if key not in ("exits", "settings")},
            "settings": self.settings.to_dict(),
            "exits": [row.to_dict() for row in self.exits],
        }

    def __rich__(self) -> RenderableType:
        cells = [row.cells() for row in self.exits]
        text = (
            f"mean cost {percent(self.mean_cost, 1)} within {percent(self.budget, 1)} of the full model's FLOPs on "
            f"{self.rows} rows, {self.target} {percent(self.accuracy)} against {percent(self.full_accuracy)}"
        )
        if self.gap is not None:
            text += "; no thresholds do better" if self.gap == 0 else f"; none do better by more than {percent(self.gap, 2)}"
        return stacked(table(self.title, list(cells[0]), [list(row.values()) for row in cells]), text, *self.notes)


@dataclass
class BudgetCurve(Report):
    """Budget against score: thresholds from the calibration rows, measured on others.

    Attributes:
        points: By budget: `budget`, `ratio`, `gap`, `thresholds`, and mean `cost` and `accuracy` on the calibration rows
            (`calibration`) and on the others (`test`, None where there are none).
    """

    title: ClassVar[str] = "Budget against accuracy"

    method: str
    target: str
    full_accuracy: dict[str, float]
    points: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json_safe(vars(self))
        return {"title": self.title, **found}

    def __rich__(self) -> RenderableType:
        def cells(p: dict[str, Any], part: str) -> list[str]:
            return ["-", "-"] if p[part] is None else [percent(p[part]["cost"], 1), percent(p[part]["accuracy"])]

        rows = [[percent(p["budget"], 1), *cells(p, "calibration"), *cells(p, "test")] for p in self.points]
        heads = ["budget", "cost", f"{self.target}, calibration", "cost", f"{self.target}, test"]
        return stacked(table(f"{self.title} ({self.method})", heads, rows))
