"""What `evaluate` found: every exit, gate and route, the whole, and the trade-off curves, as a dict and as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.training.report import Report, json_safe, number, percent, stacked, table
from eecompile.training.subgroups import GroupRow, below_constant, group_tables


@dataclass
class ExitRow:
    """One exit, or the model's own end.

    Attributes:
        threshold: None for the model's own end.
        open: Whether rows can leave there.
        cost: Of a row that leaves there, as a fraction of the full model's FLOPs.
        share: Share of the rows that leave there.
        accuracy_leaving: Mean score of those that leave there; None where no row does, or without labels.
        accuracy_if_all: Mean score if every row left there.
        agreement_if_all: Share of rows on which this exit agrees with the full model; None for a metric.
        mean_confidence: Over all rows; None where it is not finite.
        cost_without: Mean cost of all rows if this exit were closed and the others stayed as they are; None for a closed
            exit, for the model's own end, and for criteria whose confidence depends on which exits are open.
        accuracy_without: Mean score of all rows then.
    """

    name: str
    threshold: float | None
    open: bool
    cost: float
    share: float
    accuracy_leaving: float | None
    accuracy_if_all: float | None
    agreement_if_all: float | None
    mean_confidence: float | None
    cost_without: float | None = None
    accuracy_without: float | None = None


@dataclass
class GateShare:
    """One gate.

    Attributes:
        open: Share of the rows that it lets in; rows that had left before count as not let in.
        saved: What it leaves out of the mean row, as a fraction of the full model's FLOPs.
    """

    name: str
    region: str
    threshold: float
    open: float
    saved: float


@dataclass
class RouteShare:
    """One route on evaluated rows.

    Attributes:
        to: "exit" or "branch".
        share: The load: share of all rows that took it.
        cost: Mean fraction of the full model's FLOPs spent on those.
        accuracy: Their mean score; None where no row took it, or without labels.
        full_accuracy: What the full model would have reached on them.
    """

    name: str
    to: str
    share: float
    cost: float | None
    accuracy: float | None
    full_accuracy: float | None


@dataclass
class EvaluationReport(Report):
    """Accuracy (or the mean metric) and cost.

    Attributes:
        samples: Rows in the loader.
        labelled: Rows that have a label; accuracies are over these.
        score: "accuracy" or "metric".
        accuracy: With early exit, as the thresholds are now; None without labels.
        full_accuracy: Of the full model, all exits closed and all gates open.
        drop: `full_accuracy - accuracy`.
        agreement: Share of rows on which the early and the full prediction are the same; None for a metric.
        mean_cost: Mean fraction of the full model's FLOPs spent on a row.
        rows: Every exit and, last, the model's own end.
        curve: Points (threshold, accuracy, cost, share leaving early), where they were asked for.
        degradation: Points (budget, accuracy, cost, share stopped), where they were asked for.
        gates: Every gate, where there are some. Costs of exits count them as open; `mean_cost` counts what was run.
        routes: Every route, where there is a router: load, cost, accuracy.
        mean_steps: Mean steps of a row where rows halt, over its positions where each halts by itself; None elsewhere.
        guarantee: Of the calibration, or why it is void; None where there is none.
        by_class: Recall of every class of labels, the largest drop first.
        by_group: Scores of every group of `groups=`.
    """

    title: ClassVar[str] = "Evaluation"

    samples: int
    labelled: int
    score: str
    accuracy: float | None
    full_accuracy: float | None
    drop: float | None
    agreement: float | None
    mean_cost: float
    rows: list[ExitRow]
    curve: list[dict[str, Any]] | None = field(default=None)
    degradation: list[dict[str, Any]] | None = field(default=None)
    gates: list[GateShare] = field(default_factory=list)
    routes: list[RouteShare] = field(default_factory=list)
    mean_steps: float | None = None
    guarantee: str | None = None
    by_class: list[GroupRow] = field(default_factory=list)
    by_group: list[GroupRow] = field(default_factory=list)

    @property
    def unearned(self) -> list[ExitRow]:
        """Exits without which rows would cost no more, on average, than with them."""
        return [row for row in self.rows if row.cost_without is not None and row.cost_without <= self.mean_cost]

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            **{key: json_safe(value) for key, value in vars(self).items() if key not in TABLES},
            **{key: [json_safe(vars(row)) for row in getattr(self, key)] for key in TABLES},
        }

    def __rich__(self) -> RenderableType:
        shown = percent if self.score == "accuracy" else number
        columns = ["exit", "threshold", "cost", "rows", self.score, f"{self.score}, all rows", "agreement, all rows"]
        rows = [
            [
                row.name,
                "-" if row.threshold is None else number(row.threshold) if row.open else "closed",
                percent(row.cost, 1),
                percent(row.share, 1),
                shown(row.accuracy_leaving),
                shown(row.accuracy_if_all),
                percent(row.agreement_if_all),
            ]
            for row in self.rows
        ]
        text = (
            f"{self.samples} rows: {self.score} {shown(self.accuracy)} against "
            f"{shown(self.full_accuracy)} of the full model, agreement {percent(self.agreement)}, "
            f"mean cost {percent(self.mean_cost, 1)} of its FLOPs"
        )
        if self.mean_steps is not None:
            text += f", {number(self.mean_steps, 3)} steps on average"
        parts: list[RenderableType] = [table(self.title, columns, rows), text, *below_constant(self.by_class)]
        parts += [
            f"{row.name} does not earn its place: without it the mean cost is {percent(row.cost_without, 1)}, "
            f"{self.score} {shown(row.accuracy_without)}"
            for row in self.unearned
        ]
        if self.gates:
            shares = [[g.name, g.region, number(g.threshold), percent(g.open, 1), percent(g.saved, 1)] for g in self.gates]
            parts.insert(1, table("Gates", ["gate", "region", "threshold", "open for", "saved"], shares))
        if self.routes:
            heads = ["route", "to", "rows", "cost", self.score, "full model there"]
            sent = [
                [r.name, r.to, percent(r.share, 1), percent(r.cost, 1), shown(r.accuracy), shown(r.full_accuracy)]
                for r in self.routes
            ]
            parts.insert(1, table("Routes", heads, sent))
        parts += [self.guarantee] if self.guarantee is not None else []
        parts += group_tables(self.by_class, self.by_group, self.drop or 0.0)
        if self.curve is not None:
            halting = self.mean_steps is not None
            points = [
                [number(p["threshold"]), shown(p["accuracy"]), percent(p["cost"], 1)]
                + [number(p["steps"], 3) if halting else percent(p["early"], 1)]
                for p in self.curve
            ]
            which, last = ("halting threshold", "mean steps") if halting else ("one threshold for all exits", "exit early")
            heads = [which, self.score, "cost", last]
            parts.append(table("Trade-off", heads, points))
        if self.degradation is not None:
            points = [
                [percent(p["budget"], 1), shown(p["accuracy"]), percent(p["cost"], 1), percent(p["stopped"], 1)]
                for p in self.degradation
            ]
            parts.append(table("Degradation", ["budget of a row", self.score, "mean cost", "stopped"], points))
        return stacked(*parts)


TABLES = ("rows", "gates", "routes", "by_class", "by_group")
