"""`calibrate(budget=...)` and `budget_curve`: the most accurate thresholds at a mean cost; `solver.py` finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eecompile.calibration.budget_report import BudgetCurve, BudgetReport
from eecompile.calibration.calibrate import Exits, source_of
from eecompile.calibration.collect import Collected
from eecompile.calibration.evidence import Evidence, pattern
from eecompile.calibration.lines import exits_are_set, line_within, lines_of
from eecompile.calibration.options import Options
from eecompile.calibration.report import CalibrationReport
from eecompile.calibration.solver import METHODS, Solver
from eecompile.errors import CalibrationError, check_name
from eecompile.ir.settings import EXITS
from eecompile.plain import check_number, check_numbers

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def calibrate_budget(
    fast: CompiledModule, loader: Iterable[Any], budget: float, *, method: str = "search", boxes: int = 1000, **options: Any
) -> BudgetReport | CalibrationReport:
    """The thresholds that are most accurate on `loader` at a mean cost of at most `budget`.

    Without exits that is the setting of the gates, of the router or of halting; with exits their thresholds, and the rest
    stays as it is. The module is not changed; `fast.calibrate` sets what the report holds as `settings`.

    There is no guarantee on other rows; mean cost and accuracy there are as good as the calibration rows are like them.

    Args:
        budget: Largest mean fraction of the full model's FLOPs that a row may cost.
        method: "search", or "quota" as MSDNet has it.
        boxes: How many boxes of thresholds the branch and bound of "search" may look at to prove that no thresholds are
            better (`BudgetReport.gap`); 0 leaves the proof out.
        options: As in `calibrate`, but for `max_drop` and `delta`.

    Raises:
        CalibrationError: A budget that is no positive number or that no thresholds keep, and what `calibrate` raises.
    """
    check_budget(budget)
    check_method(method)
    check_number("boxes", boxes, least=0, whole=True, error=CalibrationError)
    asked = Options.of(fast, {**options, "max_drop": 0.0, "delta": None})
    lines = lines_of(fast)
    if lines and not exits_are_set(fast):
        if len(lines) > 1:
            raise CalibrationError(
                "a budget is for one kind of decision",
                got=" and ".join(line.family for line in lines),
                hint="calibrate(max_drop=...) sets them one after the other",
            )
        return line_within(lines[0], source_of(fast, loader, asked), fast.settings, budget, asked)
    exits = Exits(fast, loader, fast.settings, asked)
    data, evidence = gathered(exits)
    solver = Solver(evidence, data.score)
    thresholds, ratio = solver.solve(budget, method, boxes)
    settings = exits.settings.with_values(EXITS, thresholds)
    found = _measured(thresholds, data.score, evidence)
    return BudgetReport(
        settings=settings,
        budget=float(budget),
        method=method,
        target=asked.score,
        rows=data.rows,
        skipped_rows=data.skipped,
        mean_cost=found["cost"],
        accuracy=found["accuracy"],
        full_accuracy=float(data.score[:, -1].mean()),
        least_cost=solver.least,
        ratio=ratio,
        gap=solver.gap,
        exits=exits.parts(settings, evidence.leave(thresholds), evidence.costs(pattern(thresholds))),
        notes=exits.notes,
    )


def gathered(exits: Exits) -> tuple[Collected, Evidence]:
    """All rows, with temperatures fitted on all of them."""
    data = exits.collected(exits.options.temperature)
    return exits.evidence(data, float(data.keys.max()))


def check_method(method: str) -> None:
    check_name("method", method, METHODS, CalibrationError)


def check_budget(budget: Any) -> None:
    check_number("budget, a fraction of the full model's cost,", budget, above=0, most=2, error=CalibrationError)


def budget_curve(
    fast: CompiledModule,
    loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    budgets: Sequence[float] = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
    method: str = "search",
    boxes: int = 200,
    **options: Any,
) -> BudgetCurve:
    """Graceful degradation: for every budget the best thresholds on `loader`, measured on `test_loader`.

    One pass over each; the module is not changed. Budgets that no thresholds keep are left out.

    Raises:
        CalibrationError: As `calibrate_budget`; and where no budget can be kept at all.
    """
    check_numbers("budgets=", budgets, above=0, most=2, error=CalibrationError)
    if not budgets:
        raise CalibrationError("budgets= is empty", wanted="one number or more")
    check_method(method)
    check_number("boxes", boxes, least=0, whole=True, error=CalibrationError)
    asked = Options.of(fast, {**options, "max_drop": 0.0, "delta": None})
    if not fast.exits:
        raise CalibrationError(
            "a budget curve is one over exits",
            got="no exit",
            hint="calibrate(...).curve has cost and drop of every setting of gates, routers and halting",
        )
    exits = Exits(fast, loader, fast.settings, asked)
    data, evidence = gathered(exits)
    parts = {"calibration": (data.score, evidence)}
    if test_loader is not None:
        test = Exits(fast, test_loader, exits.settings, asked)
        seen = test.collected(False)
        parts["test"] = seen.score, test.evidence_of(seen, seen.confidences)
    solver = Solver(evidence, data.score)
    points = []
    for budget in sorted(budgets):
        if solver.least > budget + 1e-9:
            continue
        thresholds, ratio = solver.solve(budget, method, boxes)
        measured = {part: _measured(thresholds, *found) for part, found in parts.items()}
        points.append(
            {
                "budget": budget,
                "ratio": ratio,
                "gap": solver.gap,
                "thresholds": thresholds.tolist(),
                "test": None,
                **measured,
            }
        )
    if not points:
        solver.solve(max(budgets), method)
    full = {part: float(score[:, -1].mean()) for part, (score, _) in parts.items()}
    return BudgetCurve(method, asked.score, full, points)


def _measured(thresholds: Tensor, score: Tensor, evidence: Evidence) -> dict[str, Any]:
    index = evidence.leave(thresholds)
    share = [float((index == k).double().mean()) for k in range(score.shape[1])]
    cost = float(evidence.costs(pattern(thresholds))[index].mean())
    return {"cost": cost, "accuracy": float(score.gather(1, index[:, None]).mean()), "share": share}
