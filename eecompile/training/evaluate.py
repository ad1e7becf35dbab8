"""`evaluate`: accuracy against compute, per exit and overall, against the full model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.training.batches import batches, device_of, empty_loader
from eecompile.training.curve import degradation, first_exit, sweep
from eecompile.training.full import branches, full_prediction, gate_names
from eecompile.training.protocol import Compiled
from eecompile.training.report import Report, json_safe, number, percent, stacked, table
from eecompile.training.route_report import RouteShare, route_shares
from eecompile.training.scores import Metric, agreement, check_labels, measure, right


@dataclass
class ExitRow:
    """One exit, or the model's own end.

    Attributes:
        threshold: None for the model's own end.
        open: Whether rows can leave there.
        cost: Of a row that leaves there, as a fraction of the full model's FLOPs.
        share: Share of the rows that leave there.
        accuracy_leaving: Mean score of those that leave there; None where nobody does, or without labels.
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
        columns = [
            "exit",
            "threshold",
            "cost",
            "leaving",
            "right of those",
            "right if all leave",
            "as the model",
        ]
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
        parts: list[RenderableType] = [table(self.title, columns, rows), text]
        parts += [
            f"{row.name} does not earn its place: without it the mean cost is {percent(row.cost_without, 1)}, "
            f"{self.score} {shown(row.accuracy_without)}"
            for row in self.unearned
        ]
        if self.gates:
            shares = [[g.name, g.region, number(g.threshold), percent(g.open, 1), percent(g.saved, 1)] for g in self.gates]
            parts.insert(1, table("Gates", ["gate", "region", "threshold", "rows let in", "saved"], shares))
        if self.routes:
            heads = ["route", "to", "rows", "cost of those", "right of those", "the full model on those"]
            sent = [
                [r.name, r.to, percent(r.share, 1), percent(r.cost, 1), shown(r.accuracy), shown(r.full_accuracy)]
                for r in self.routes
            ]
            parts.insert(1, table("Routes", heads, sent))
        if self.curve is not None:
            points = [
                [number(p["threshold"]), shown(p["accuracy"]), percent(p["cost"], 1), percent(p["early"], 1)]
                for p in self.curve
            ]
            heads = ["one threshold for all exits", self.score, "cost", "leaving early"]
            parts.append(table("Trade-off", heads, points))
        if self.degradation is not None:
            points = [
                [percent(p["budget"], 1), shown(p["accuracy"]), percent(p["cost"], 1), percent(p["stopped"], 1)]
                for p in self.degradation
            ]
            parts.append(table("Degradation", ["no row costs more than", self.score, "mean cost", "stopped"], points))
        return stacked(*parts)


TABLES = ("rows", "gates", "routes")


def evaluate(
    fast: Compiled,
    loader: Iterable[Any],
    *,
    metric: Metric | None = None,
    curve: bool | int | Sequence[float] = False,
    budgets: bool | Sequence[float] = False,
) -> EvaluationReport:
    """One pass over `loader` with everything computed and the present thresholds applied.

    Args:
        fast: The compiled module; its mode and thresholds stay as they are.
        loader: Yields `(inputs, labels)` or Hugging Face batches. Without labels, agreement and cost are
            reported.
        metric: `(prediction, labels) -> [B]` score of each row, higher is better, instead of accuracy.
        curve: Also the trade-off for one threshold used at every open exit: True for 21 thresholds, a number
            of them, or the thresholds themselves. Not for a criterion with state (patience): there the
            confidence depends on which exits are open.
        budgets: Also how accuracy degrades when no row may cost more than a budget, as `fast(x, budget=...)` has it:
            True for the cost of every open exit, or the budgets themselves.

    Returns:
        EvaluationReport. For `[B, S, C]` a row's accuracy is the share of its positions that are right.

    Raises:
        EecompileError: An empty loader; labels of a wrong dtype, shape or range; some batches with labels and
            others without; a metric that does not give one finite number per row.
    """
    if curve is not False and (gate_names(fast) or branches(fast)):
        raise EecompileError(
            "there is no trade-off curve over exits where rows leave something else out too",
            got="curve=, with gates or branches",
            hint="calibrate gives the settings of gates and routers with their costs, `report.curve`",
        )
    device = device_of(fast)
    seen = Seen(metric)
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        if not result.outputs or not result.confidences:
            raise EecompileError("fast.observe gave no outputs of the exits", where=batch.where)
        seen.add(result, batch.labels, batch.where, full_prediction(fast, batch, result))
    if not seen.index:
        raise empty_loader()
    return seen.report(fast, curve, budgets)


class Seen:
    """What is kept of every batch: a few numbers per row and exit, on the CPU."""

    def __init__(self, metric: Metric | None) -> None:
        self.metric = metric
        self.index: list[Tensor] = []
        self.cost: list[Tensor] = []
        self.confidences: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.same: list[Tensor] = []
        self.valid: list[Tensor] = []
        self.full: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.route: list[Tensor] = []
        self.has_labels: bool | None = None

    def add(self, result: Any, labels: Any, where: str, full: Tensor) -> None:
        outputs: tuple[Tensor, ...] = result.outputs
        n = outputs[-1].shape[0]
        has = labels is not None
        if self.has_labels not in (None, has):
            raise EecompileError(
                "some batches have labels and others do not",
                where=where,
                got="labels" if has else "no labels",
                wanted="labels in all of them or in none",
            )
        self.has_labels = has
        valid = torch.ones(n, dtype=torch.bool)
        if self.metric is not None:
            scores = [measure(self.metric, output, labels, n, where).cpu() for output in outputs]
            self.scores.append(torch.stack(scores, 1))
            self.full.append(measure(self.metric, full, labels, n, where).cpu())
        else:
            if has:
                checked = check_labels(outputs[-1], labels, where)
                pairs = [right(output, checked) for output in outputs]
                self.scores.append(torch.stack([score for score, _ in pairs], 1).cpu())
                valid = pairs[-1][1].cpu()
                self.full.append(right(full, checked)[0].cpu())
            else:
                classes(outputs[-1], where)
                checked = None
            self.same.append(torch.stack([agreement(o, full, checked) for o in outputs], 1).cpu())
        if result.gates is not None:
            self.gates.append(result.gates.double().cpu())
        if result.route is not None:
            self.route.append(result.route.cpu())
        self.valid.append(valid)
        self.index.append(result.exit_index.cpu())
        self.cost.append(result.cost.double().cpu())
        self.confidences.append(torch.stack([c.float() for c in result.confidences], 1).cpu())

    def report(
        self, fast: Compiled, curve: bool | int | Sequence[float], budgets: bool | Sequence[float] = False
    ) -> EvaluationReport:
        index, cost, valid = torch.cat(self.index), torch.cat(self.cost), torch.cat(self.valid)
        confidences = torch.cat(self.confidences)
        n, ends = len(index), len(fast.exits) + 1
        scores = torch.cat(self.scores) if self.scores else None
        same = torch.cat(self.same) if self.same else None
        thresholds = [float(t) for t in fast.thresholds.tolist()]
        is_open = [t <= 1 for t in thresholds]
        costs = fast.costs(tuple(is_open)).tolist()
        names = [record.name for record in fast.exits] + ["model"]
        # What a row does elsewhere is known from what was seen, unless an exit's say depends on the open ones before it
        stateful = any(r.criterion.stateful or getattr(r, "combine", "last") != "last" for r in fast.exits)
        rows = []
        for k in range(ends):
            leaving = index == k
            cost_without = accuracy_without = None
            if k < ends - 1 and is_open[k] and not stateful and not self.gates and not branches(fast):
                others = torch.tensor([2.0 if j == k else t for j, t in enumerate(thresholds)])
                elsewhere = first_exit(confidences[:, :-1], others)
                known = fast.costs(tuple(o and j != k for j, o in enumerate(is_open))).double()
                cost_without = float(known.cpu()[elsewhere].mean())
                accuracy_without = pick(scores, elsewhere, valid)
            rows.append(
                ExitRow(
                    name=names[k],
                    threshold=thresholds[k] if k < ends - 1 else None,
                    open=k == ends - 1 or is_open[k],
                    cost=float(costs[k]),
                    share=float(leaving.double().mean()),
                    accuracy_leaving=mean(scores, k, leaving & valid),
                    accuracy_if_all=mean(scores, k, valid),
                    agreement_if_all=mean(same, k, valid),
                    mean_confidence=mean(confidences.double(), k, confidences[:, k].isfinite()),
                    cost_without=cost_without,
                    accuracy_without=accuracy_without,
                )
            )
        early = pick(scores, index, valid)
        full = mean(torch.cat(self.full).unsqueeze(1), 0, valid) if self.full else None
        points = None
        if curve is not False:
            points = sweep(fast, confidences, scores, valid, curve)
        return EvaluationReport(
            samples=n,
            labelled=int(valid.sum()) if scores is not None else 0,
            score="accuracy" if self.metric is None else "metric",
            accuracy=early,
            full_accuracy=full,
            drop=None if early is None or full is None else full - early,
            agreement=pick(same, index, valid),
            mean_cost=float(cost.mean()),
            rows=rows,
            curve=points,
            degradation=None if budgets is False else degradation(fast, index, scores, valid, budgets),
            gates=self._gates(fast),
            routes=self._routes(fast, index, cost, scores, valid),
        )

    def _routes(self, fast: Any, index: Tensor, cost: Tensor, scores: Tensor | None, valid: Tensor) -> list[RouteShare]:
        if not self.route:
            return []
        given = None if scores is None else scores.gather(1, index[:, None])[:, 0]
        full = torch.cat(self.full) if self.full else None
        found = route_shares(fast, torch.cat(self.route), cost, given, full, valid)
        fast.route_load = [vars(share) for share in found]  # for `explain`
        return found

    def _gates(self, fast: Any) -> list[GateShare]:
        if not self.gates:
            return []
        shares = torch.cat(self.gates).mean(0).tolist()
        reached = torch.cat(self.index)
        stages = [gate.stage for gate in fast.program.gates]
        there = [float((reached >= stage).double().mean()) for stage in stages]
        return [
            GateShare(g.name, g.region, g.threshold, share, (at - share) * g.saves)
            for g, share, at in zip(fast.gates, shares, there, strict=True)
        ]


def classes(prediction: Tensor, where: str) -> None:
    if prediction.ndim not in (2, 3):
        raise EecompileError(
            "the prediction does not hold class scores",
            where=where,
            got=f"shape {list(prediction.shape)}",
            wanted="[B, C] or [B, S, C]",
            hint="pass metric= for a task that is not classification",
        )


def mean(values: Tensor | None, column: int, rows: Tensor) -> float | None:
    """Mean of one column over the chosen rows; None without values or rows."""
    if values is None or not bool(rows.any()):
        return None
    return float(values[rows, column].mean())


def pick(values: Tensor | None, index: Tensor, rows: Tensor) -> float | None:
    """Mean over the chosen rows of each row's value at the exit that it left at."""
    if values is None or not bool(rows.any()):
        return None
    return float(values.gather(1, index[:, None])[rows, 0].mean())
