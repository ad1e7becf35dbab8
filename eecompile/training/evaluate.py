"""`evaluate`: accuracy against compute, per exit and overall, against the full model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.ir.settings import BRANCHES, GATES, HALTING
from eecompile.plain import check_callable, check_numbers
from eecompile.training.batches import Batch, alike, batches, device_of, empty_loader, no_labels, require_repeatable
from eecompile.training.curve import degradation, first_exit, sweep, thresholds_of
from eecompile.training.evaluation_report import EvaluationReport, ExitRow, GateShare, RouteShare
from eecompile.training.full import full_prediction, skips
from eecompile.training.scores import Metric, agreement, check_finite, check_labels, class_labels, row_scores
from eecompile.training.subgroups import GroupRow, check_groups, group_rows, groups_of, indexed
from eecompile.training.tasks import ANSWERS, check_task, no_choice, own_task
from eecompile.training.workers import shared, whole

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def evaluate(
    fast: CompiledModule,
    loader: Iterable[Any],
    *,
    metric: Metric | None = None,
    curve: bool | int | Sequence[float] = False,
    budgets: bool | Sequence[float] = False,
    groups: Any = None,
) -> EvaluationReport:
    """One pass over `loader` with everything computed and the present thresholds applied.

    Under `accelerate launch` or `torchrun` the processes share the batches; all of them call this, and get the same report.

    Args:
        fast: The compiled module; its mode and thresholds stay as they are.
        loader: Yields `(inputs, labels)` or Hugging Face batches. Without labels, agreement and cost are
            reported.
        metric: `(prediction, labels) -> [B]` score of each row, higher is better, instead of accuracy.
        curve: Also the trade-off for one threshold used at every open exit, or where rows halt and there is no exit for the
            halting threshold: True for 21 thresholds, a number of them, or the thresholds themselves. Not for a criterion
            with state (patience): there the confidence depends on which exits are open.
        budgets: Also how accuracy degrades when no row may cost more than a budget, as `fast(x, budget=...)` has it:
            True for the cost of every open exit, or the budgets themselves.
        groups: A label for each row of the loader, in order, or a callable `(inputs, labels) -> [B]`: also the scores of
            each group.

    Returns:
        EvaluationReport. For `[B, S, C]` a row's accuracy is the share of its positions that are right.

    Raises:
        EecompileError: An empty loader; labels of a wrong dtype, shape or range; some batches with labels and
            others without; a metric that does not give one finite number per row.
    """
    check_callable("metric", metric, "(prediction, labels) -> [B]")
    if not isinstance(curve, bool):
        thresholds_of(curve)
    if not isinstance(budgets, bool):
        check_numbers("budgets=", budgets, above=0)
    halting = HALTING in fast.settings and not (GATES in fast.settings or BRANCHES in fast.settings or fast.exits)
    if curve is not False and skips(fast) and not halting:
        raise EecompileError(
            "there is no trade-off curve over exits where rows leave something else out too",
            got="curve=, with gates, branches or halting",
            hint="calibrate gives the settings of gates, routers and halting with their costs, `report.curve`",
        )
    if curve is not False and halting:
        report = evaluate(fast, loader, metric=metric, budgets=budgets, groups=groups)
        report.curve = halting_curve(fast, loader, metric, curve)
        return report
    loader = whole(loader)
    check_groups(groups, loader)
    seen = Seen(fast, metric, groups)
    for batch, columns in shared(alike(batches(loader, device_of(fast))), seen.measured):
        seen.add(batch, columns)
    if not seen.columns:
        raise empty_loader()
    if not bool(seen["valid"].any()):  # type: ignore[union-attr]
        raise no_labels()
    return seen.report(fast, curve, budgets)


def halting_curve(
    fast: CompiledModule, loader: Iterable[Any], metric: Metric | None, points: bool | int | Sequence[float]
) -> list[dict[str, Any]]:
    """One dict per halting threshold above 0: threshold, accuracy (None without labels), cost, mean steps of a row."""
    require_repeatable(loader, "every halting threshold runs the model", "the loader")
    before, found = fast.halting_threshold, []
    try:
        for threshold in thresholds_of(points):
            if threshold > 0:
                fast.set_halting_threshold(threshold)
                r = evaluate(fast, loader, metric=metric)
                measured = {"accuracy": r.accuracy, "cost": r.mean_cost, "steps": r.mean_steps}
                found.append({"threshold": threshold, **measured})
    finally:
        fast.set_halting_threshold(before)
    return found


class Seen:
    """What is kept of every batch: columns of a few numbers per row and exit, on the CPU."""

    def __init__(self, fast: CompiledModule, metric: Metric | None, groups: Any = None) -> None:
        self.fast, self.metric, self.groups = fast, metric, groups
        self.group: list[str] = []
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, columns: dict[str, Tensor]) -> None:
        """A batch and what `measured` gave of it."""
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)
        if self.groups is not None:
            self.group += groups_of(self.groups, batch, len(self.group), len(columns["index"]))

    def __getitem__(self, name: str) -> Tensor | None:
        """One column of all rows; None where there is none."""
        return torch.cat(self.columns[name]) if name in self.columns else None

    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """The columns of one batch, by name."""
        result = self.fast.observe(*batch.args, **batch.kwargs)
        if not result.outputs or not result.confidences:
            raise EecompileError("fast.observe gave no outputs of the exits", where=batch.where)
        full, labels, where = full_prediction(self.fast, batch, result), batch.labels, batch.where
        outputs: tuple[Tensor, ...] = result.outputs
        check_finite(outputs, self.fast.exits, where)
        n = outputs[-1].shape[0]
        if batch.index == 0 and self.metric is None:
            check_task(self.fast, labels)
        found: dict[str, Tensor | None] = {
            "index": result.exit_index,
            "cost": result.cost.double(),
            "confidences": torch.stack([c.float() for c in result.confidences], 1),
            "valid": torch.ones(n, dtype=torch.bool),
            "gates": None if result.gates is None else result.gates.double(),
            "steps": None if result.steps is None else result.steps.double().view(n, -1).mean(1),
            "route": result.route,
        }
        checked = None
        if labels is not None or self.metric is not None:
            scores, found["valid"] = row_scores((*outputs, full), labels, self.metric, where)
            found |= {"scores": scores[:, :-1], "full": scores[:, -1]}
        if self.metric is None:
            if labels is None:
                classes(outputs[-1], where)
            else:
                checked = check_labels(full, labels, where)
                found["classes"] = class_labels(full, checked)
            if labels is not None or not no_choice(self.fast):
                each = own_task(self.fast) == ANSWERS
                found["same"] = torch.stack([agreement(o, full, checked, each) for o in outputs], 1)
        return {name: column.cpu() for name, column in found.items() if column is not None}

    def report(
        self, fast: CompiledModule, curve: bool | int | Sequence[float], budgets: bool | Sequence[float] = False
    ) -> EvaluationReport:
        index, cost, valid, confidences = (torch.cat(self.columns[c]) for c in ("index", "cost", "valid", "confidences"))
        n, ends = len(index), len(fast.exits) + 1
        scores, same, full_scores = self["scores"], self["same"], self["full"]
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
            inside = "gates" in self.columns or BRANCHES in fast.settings
            if k < ends - 1 and is_open[k] and not stateful and not inside:
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
        by_class, by_group = self._subgroups(index, scores, valid)
        early = pick(scores, index, valid)
        full = None if full_scores is None else mean(full_scores.unsqueeze(1), 0, valid)
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
            gates=self._gates(fast, index),
            routes=self._routes(fast, index, cost, scores, valid),
            mean_steps=self._steps(fast),
            by_class=by_class,
            by_group=by_group,
        )

    def _subgroups(self, index: Tensor, scores: Tensor | None, valid: Tensor) -> tuple[list[GroupRow], list[GroupRow]]:
        """Scores of every class of labels and of every group; of no rows without labels."""
        full, labels = self["full"], self["classes"]
        if scores is None or full is None:
            return [], []
        early, full = scores.gather(1, index[:, None])[valid, 0], full[valid]
        classes = [] if labels is None else [str(k) for k in labels[valid].tolist()]
        group = [g for g, v in zip(self.group, valid.tolist(), strict=True) if v] if self.group else []
        by_class, by_group = (group_rows(*indexed(of), early, full) if of else [] for of in (classes, group))
        return by_class, by_group

    def _steps(self, fast: CompiledModule) -> float | None:
        steps = self["steps"]
        if steps is None or HALTING not in fast.settings:
            return None
        found = float(steps.mean())
        fast.seen.steps = found  # for `explain`
        return found

    def _routes(
        self, fast: CompiledModule, index: Tensor, cost: Tensor, scores: Tensor | None, valid: Tensor
    ) -> list[RouteShare]:
        """One entry per route, and "exited before" for rows that an exit took before the branches, where there are such."""
        route, full = self["route"], self["full"]
        if route is None:
            return []
        given = None if scores is None else scores.gather(1, index[:, None])[:, 0]
        kinds = [(k, r.name, r.to) for k, r in enumerate(fast.routes)]
        kinds += [(-1, "exited before", "exit")] if bool((route < 0).any()) else []
        found = []
        for k, name, to in kinds:
            mine = route == k
            labelled = mine & valid
            right = [None if s is None or not bool(labelled.any()) else float(s[labelled].mean()) for s in (given, full)]
            spent = float(cost[mine].mean()) if bool(mine.any()) else None
            found.append(RouteShare(name, to, float(mine.double().mean()), spent, *right))
        fast.seen.routes = [vars(share) for share in found]  # for `explain`
        return found

    def _gates(self, fast: CompiledModule, reached: Tensor) -> list[GateShare]:
        gates = self["gates"]
        if gates is None:
            return []
        there = [float((reached >= g.stage).double().mean()) for g in fast.gates]
        return [
            GateShare(g.name, g.region, g.threshold, share, (at - share) * g.saves)
            for g, share, at in zip(fast.gates, gates.mean(0).tolist(), there, strict=True)
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
