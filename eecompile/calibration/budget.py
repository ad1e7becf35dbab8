"""`calibrate(budget=...)` and `budget_curve`: the most accurate thresholds at a mean cost; `solver.py` finds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from eecompile.calibration.budget_report import BudgetCurve, BudgetReport
from eecompile.calibration.calibrate import Calibration
from eecompile.calibration.collect import Collected
from eecompile.calibration.evidence import Evidence, pattern
from eecompile.calibration.knobs import exits_are_set, knobs_of
from eecompile.calibration.options import check_options, stays_open
from eecompile.calibration.report import CalibratedExit
from eecompile.calibration.settings import setting_within
from eecompile.calibration.settings_report import SettingsReport
from eecompile.calibration.solver import METHODS, Solver
from eecompile.errors import CalibrationError, near
from eecompile.training.protocol import Compiled
from eecompile.training.scores import Metric


def calibrate_budget(
    fast: Compiled,
    loader: Iterable[Any],
    budget: float,
    *,
    method: str = "search",
    target: str = "accuracy",
    temperature: bool = True,
    metric: Metric | None = None,
    keep_open: bool | None = None,
    boxes: int = 1000,
    seed: int = 0,
) -> BudgetReport | SettingsReport:
    """Sets the thresholds that are most accurate on `loader` at a mean cost of at most `budget`.

    Without exits that is the setting of the gates, of the router or of halting; with exits their thresholds, and the rest
    stays as it is.

    There is no guarantee on other rows; mean cost and accuracy there are as good as the calibration rows are like them.

    Args:
        fast: The compiled module, trained. Thresholds and temperatures stay as they were if this raises.
        budget: Largest mean fraction of the full model's FLOPs that a row may cost.
        method: "search", or "quota" as MSDNet has it.
        target, temperature, metric, keep_open: As in `calibrate`.
        boxes: How many boxes of thresholds the branch and bound of "search" may look at to prove that no thresholds are
            better (`BudgetReport.gap`); 0 leaves the proof out.
        seed: Of the split that temperatures are fitted on where logits do not all fit into memory.

    Raises:
        CalibrationError: A budget that is no positive number or that no thresholds keep, and what `calibrate` raises.
    """
    check_budget(budget)
    if method not in METHODS:
        raise CalibrationError("unknown method", got=repr(method), wanted=near(str(method), METHODS))
    check_options(fast, 0.0, None, target, metric)
    knobs = knobs_of(fast)
    if knobs and not exits_are_set(fast):
        if len(knobs) > 1:
            raise CalibrationError(
                "a budget is for one kind of decision",
                got=" and ".join(type(knob).__name__.lower() for knob in knobs),
                hint="calibrate(max_drop=...) sets them one after the other",
            )
        return setting_within(knobs[0], loader, budget, target=target, metric=metric)
    before = fast.thresholds.tolist(), fast.temperatures.tolist()
    try:
        calibration = Calibration(fast, loader, 0.0, None, target, temperature, metric, seed, stays_open(fast, keep_open))
        data, evidence = gathered(calibration)
        solver = Solver(evidence, data.score)
        thresholds, ratio = solver.solve(budget, method, boxes)
        fast.set_thresholds([float(t) for t in thresholds.tolist()])
        return _report(calibration, data, solver, thresholds, budget, method, ratio)
    except BaseException:
        fast.set_thresholds(before[0])
        fast.set_temperatures(before[1])
        raise


def gathered(calibration: Calibration) -> tuple[Collected, Evidence]:
    """All rows, with temperatures fitted on all of them."""
    data = calibration.collected(calibration.temperature)
    return calibration.judged(data, float(data.keys.max()))


def check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0 or math.isinf(budget):
        raise CalibrationError(
            "a budget is a positive fraction of the full model's cost", got=repr(budget), wanted="0.5 for half of it"
        )
    if budget > 2:
        raise CalibrationError(
            "a budget is a fraction of the full model's cost", got=budget, wanted="0.5 for half of it", hint="no percentage"
        )


def budget_curve(
    fast: Compiled,
    loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    budgets: Sequence[float] = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
    method: str = "search",
    target: str = "accuracy",
    temperature: bool = True,
    metric: Metric | None = None,
    keep_open: bool | None = None,
    boxes: int = 200,
    seed: int = 0,
) -> BudgetCurve:
    """Graceful degradation: for every budget the best thresholds on `loader`, judged on `test_loader`.

    One pass over each. Thresholds are as before afterwards; temperatures are those that were fitted. Budgets that no
    thresholds keep are left out.

    Raises:
        CalibrationError: As `calibrate_budget`; and where no budget can be kept at all.
    """
    for budget in budgets:
        check_budget(budget)
    if method not in METHODS:
        raise CalibrationError("unknown method", got=repr(method), wanted=near(str(method), METHODS))
    check_options(fast, 0.0, None, target, metric)
    before = fast.thresholds.tolist()
    if not fast.exits:
        raise CalibrationError(
            "a budget curve is one over exits",
            got="no exit",
            hint="calibrate(...).curve has cost and drop of every setting of gates, routers and halting",
        )
    stay = stays_open(fast, keep_open)
    try:
        data, evidence = gathered(Calibration(fast, loader, 0.0, None, target, temperature, metric, seed, stay))
        parts = {"calibration": (data.score, evidence)}
        if test_loader is not None:
            parts["test"] = _held_out(Calibration(fast, test_loader, 0.0, None, target, False, metric, seed, stay))
    finally:
        fast.set_thresholds(before)
    solver = Solver(evidence, data.score)
    points = []
    for budget in sorted(budgets):
        if solver.least > budget + 1e-9:
            continue
        thresholds, ratio = solver.solve(budget, method, boxes)
        judged = {part: _judge(thresholds, *found) for part, found in parts.items()}
        points.append(
            {"budget": budget, "ratio": ratio, "gap": solver.gap, "thresholds": thresholds.tolist(), "test": None, **judged}
        )
    if not points:
        solver.solve(max(budgets), method)
    full = {part: float(score[:, -1].mean()) for part, (score, _) in parts.items()}
    return BudgetCurve(method, target if metric is None else "metric", full, points)


def _held_out(calibration: Calibration) -> tuple[Tensor, Evidence]:
    data = calibration.collected(False)
    return data.score, calibration._evidence(data, data.confidences)


def _judge(thresholds: Tensor, score: Tensor, evidence: Evidence) -> dict[str, Any]:
    index = evidence.leave(thresholds)
    share = [float((index == k).double().mean()) for k in range(score.shape[1])]
    cost = float(evidence.costs(pattern(thresholds))[index].mean())
    return {"cost": cost, "accuracy": float(score.gather(1, index[:, None]).mean()), "share": share}


def _report(
    calibration: Calibration,
    data: Collected,
    solver: Solver,
    thresholds: Tensor,
    budget: float,
    method: str,
    ratio: float | None,
) -> BudgetReport:
    fast, evidence = calibration.fast, solver.evidence
    index = evidence.leave(thresholds)
    costs, temperatures = evidence.costs(pattern(thresholds)), fast.temperatures.tolist()
    exits = [
        CalibratedExit(
            name=name,
            threshold=float(thresholds[k]) if k < solver.e else None,
            temperature=float(temperatures[k]),
            share=float((index == k).double().mean()),
            cost=float(costs[k]),
            nll_before=calibration.nll[k][0],
            nll_after=calibration.nll[k][1],
        )
        for k, name in enumerate([*(record.name for record in fast.exits), "model"])
    ]
    judged = _judge(thresholds, data.score, evidence)
    return BudgetReport(
        budget=float(budget),
        method=method,
        target=calibration.target if calibration.metric is None else "metric",
        rows=data.rows,
        skipped_rows=data.skipped,
        mean_cost=judged["cost"],
        accuracy=judged["accuracy"],
        full_accuracy=float(data.score[:, -1].mean()),
        least_cost=solver.least,
        ratio=ratio,
        gap=solver.gap,
        exits=exits,
        notes=calibration.notes,
    )
