"""Thresholds of gates that provably lose little against the model with all gates open.

**The path.** A gate changes what later gates see, so a setting cannot be judged from scores that were kept: the model runs
once for each. The settings are few and lie on one line: one threshold for all gates, as in training, at quantiles of the
scores that were observed with the gates as they are; and the thresholds as they are.

**The test.** As for exits (`calibrate.py`): the rows are split at random; on the first part the settings that are dearer
and lose more than another are dropped and the others put in order of their loss; on the second part the hypotheses "E[L] >
max_drop" are tested in that order (Learn then Test, with the starts of `risk.fallback`), L as for exits, with the model's
own output under that setting in place of an exit's. Of the settings that pass the cheapest is taken. If none does, all gates
are opened, which loses nothing.

**With exits too.** Gates come first, then the exits given the gates. Batches take turns, so that neither sees the other's
rows: gates may lose half of `max_drop` with probability 1 - delta / 2, exits then the other half against the model as it is
gated, likewise; the union bound gives the sum. Where no gate qualified, exits have all of `max_drop`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.gate_report import CalibratedGate, GateCalibrationReport, gate_sentence
from eecompile.calibration.options import FIRST_START, LEAST_SEARCH_ROWS, split_sizes, starts
from eecompile.calibration.risk import fallback, p_values, rows_needed
from eecompile.errors import CalibrationError
from eecompile.training.batches import Batch, batches, device_of, require_repeatable
from eecompile.training.full import full_prediction
from eecompile.training.scores import Metric, agreement, check_labels, measure, right

QUANTILES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
OPEN = 0.0


@dataclass(frozen=True)
class Judged:
    """One setting on all rows.

    Attributes:
        thresholds: Of every gate.
        score: float64 [n] of the model's own output, in [0, 1].
        cost: float64 [n], fraction of the full model's FLOPs.
        open: Share of the rows that each gate let in.
    """

    thresholds: tuple[float, ...]
    score: Tensor
    cost: Tensor
    open: tuple[float, ...]


def calibrate_gates(
    fast: Any,
    loader: Iterable[Any],
    *,
    max_drop: float,
    delta: float | None,
    target: str,
    metric: Metric | None,
    seed: int,
) -> GateCalibrationReport:
    """Sets the thresholds of the gates; options as of `calibrate`. Exits have no part in it, and stay as they are.

    Raises:
        CalibrationError: An empty loader or one that cannot be read again, missing or wrong labels, too few rows.
    """
    require_repeatable(loader, "every setting of the gates runs the model", "the calibration loader")
    before, exits = fast.gate_thresholds.tolist(), fast.thresholds.tolist()
    try:
        fast.set_thresholds([2.0] * len(exits))
        return _run(fast, loader, max_drop, delta, target, metric, seed, tuple(before))
    except BaseException:
        fast.set_gate_thresholds(before)
        raise
    finally:
        fast.set_thresholds(exits)


def _run(
    fast: Any,
    loader: Iterable[Any],
    max_drop: float,
    delta: float | None,
    target: str,
    metric: Metric | None,
    seed: int,
    present: tuple[float, ...],
) -> GateCalibrationReport:
    device = device_of(fast)
    full, scores, valid = _full(fast, loader, target, metric, device)
    rows = int(valid.sum())
    if rows < 2:
        raise CalibrationError("too few rows to calibrate on", got=f"{rows} rows with a label", wanted="at least 2")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    size, _ = split_sizes(rows, max_drop, delta)
    first, second = order[:size], order[size:]
    tried = [_judge(fast, loader, s, full, target, metric, device, valid) for s in settings(scores, present)]
    base = torch.ones(rows, dtype=torch.float64) if target == "agreement" and metric is None else _scored(full)[valid]
    path = _path(tried, base, first)
    binary = bool(((base == 0) | (base == 1)).all()) and all(bool(((t.score == 0) | (t.score == 1)).all()) for t in path)
    known: dict[int, float] = {}

    def p_value(i: int) -> float:
        total = (base - path[i].score).clamp(min=0)[second].sum()
        known[i] = float(p_values(total, len(second), max_drop, binary=binary))
        return known[i]

    accepted: list[tuple[int, float | None]]
    if delta is None:
        accepted = [(i, None) for i, t in enumerate(path) if float((base - t.score).mean()) <= max_drop]
    else:
        accepted = [(i, level) for i, level in fallback(p_value, len(path), starts(len(path), delta))]
    saving = [(i, level) for i, level in accepted if float(path[i].cost.mean()) < 1]
    best = min(saving, key=lambda found: float(path[found[0]].cost.mean()), default=None)
    chosen = None if best is None else path[best[0]]
    fast.set_gate_thresholds(list(chosen.thresholds) if chosen is not None else [OPEN] * len(present))
    needed = rows_needed(max_drop, FIRST_START * delta) if delta is not None else None
    loss = torch.zeros_like(base) if chosen is None else (base - chosen.score).clamp(min=0)
    drop = torch.zeros_like(base) if chosen is None else base - chosen.score
    report = GateCalibrationReport(
        qualified=chosen is not None,
        guarantee="",
        target="metric" if metric is not None else target,
        max_drop=max_drop,
        delta=delta,
        rows=rows,
        search_rows=len(first),
        test_rows=len(second),
        rows_needed=None if needed is None else needed + LEAST_SEARCH_ROWS,
        expected_cost=1.0 if chosen is None else float(chosen.cost.mean()),
        loss_test=float(loss[second].mean()) if len(second) else None,
        drop=float(drop.mean()),
        p_value=None if best is None else known.get(best[0]),
        level=None if best is None else best[1],
        tested=len(path),
        accepted=len(accepted),
        gates=[
            CalibratedGate(g.name, g.region, g.threshold, 1.0 if chosen is None else chosen.open[i], g.saves)
            for i, g in enumerate(fast.gates)
        ],
        curve=[
            {"thresholds": list(t.thresholds), "cost": float(t.cost.mean()), "drop": float((base - t.score).mean())}
            for t in tried
        ],
    )
    report.guarantee = gate_sentence(report)
    return report


def settings(scores: Tensor, present: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Threshold vectors to run, from `scores` [n, G] at the `present` ones."""
    values = scores.float().flatten().nan_to_num(nan=1.0).sort().values
    at = [float(values[int(q * (len(values) - 1))].clamp(1e-6, 1.0)) for q in QUANTILES]
    return list(dict.fromkeys([*((t,) * scores.shape[1] for t in at), present]))


def _path(tried: list[Judged], base: Tensor, rows: Tensor) -> list[Judged]:
    """The settings that no other beats in both loss and cost on `rows`, by growing loss."""
    measured = [(float((base - t.score).clamp(min=0)[rows].sum()), float(t.cost[rows].mean()), t) for t in tried]
    measured.sort(key=lambda m: m[:2])
    kept: list[Judged] = []
    cheapest = float("inf")
    for _, cost, t in measured:
        if cost < cheapest - 1e-12:
            kept.append(t)
            cheapest = cost
    return kept


# --- running ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Full:
    """What the full model said: scores float64 [n], and for agreement its predictions by batch."""

    scores: list[Tensor]
    predictions: list[Tensor]


def _full(
    fast: Any, loader: Iterable[Any], target: str, metric: Metric | None, device: torch.device
) -> tuple[Full, Tensor, Tensor]:
    """The full model's answers, gate scores [n, G] with the gates as they are, and which rows have a label."""
    full = Full([], [])
    gate_scores, valid = [], []
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        prediction = full_prediction(fast, batch, result)
        if bool(prediction.isnan().any()):
            raise CalibrationError("NaN in the outputs of the full model", where=batch.where)
        score, ok = _score(prediction, prediction, batch, target, metric)
        full.scores.append(score)
        if target == "agreement" and metric is None:
            full.predictions.append(prediction.cpu())
        gate_scores.append(result.gate_scores.float().cpu())
        valid.append(ok)
    if not valid:
        raise CalibrationError("the calibration loader is empty", got="no batch", wanted="at least one batch")
    return full, torch.cat(gate_scores), torch.cat(valid)


def _judge(
    fast: Any,
    loader: Iterable[Any],
    thresholds: tuple[float, ...],
    full: Full,
    target: str,
    metric: Metric | None,
    device: torch.device,
    valid: Tensor,
) -> Judged:
    fast.set_gate_thresholds(list(thresholds))
    scores, costs, opened = [], [], []
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        reference = full.predictions[batch.index].to(device) if full.predictions else result.outputs[-1]
        scores.append(_score(result.outputs[-1], reference, batch, target, metric)[0])
        costs.append(result.cost.double().cpu())
        opened.append(result.gates.double().cpu())
    if sum(len(s) for s in scores) != len(valid):
        raise CalibrationError(
            "the calibration loader gave other rows when it was read again",
            got=f"{sum(len(s) for s in scores)} rows",
            wanted=f"the same {len(valid)}",
            hint="pass shuffle=False and no augmentation",
        )
    share = torch.cat(opened)[valid].mean(0).tolist()
    return Judged(thresholds, torch.cat(scores)[valid], torch.cat(costs)[valid], tuple(share))


def _scored(full: Full) -> Tensor:
    return torch.cat(full.scores)


def _score(prediction: Tensor, reference: Tensor, batch: Batch, target: str, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """float64 [B] in [0, 1] on the CPU, and which rows have a label."""
    n = prediction.shape[0]
    valid = torch.ones(n, dtype=torch.bool)
    if metric is not None:
        score = measure(metric, prediction, batch.labels, n, batch.where, CalibrationError).double().cpu()
        if bool(((score < 0) | (score > 1)).any()):
            raise CalibrationError("the metric leaves [0, 1]", where=batch.where, hint="rescale or clip the metric")
        return score, valid
    labels = None
    if batch.labels is not None or target == "accuracy":
        labels = check_labels(prediction, batch.labels, batch.where, CalibrationError)
        valid = right(prediction, labels)[1].cpu()
    if target == "agreement":
        return agreement(prediction, reference, labels).cpu(), valid
    assert labels is not None
    return right(prediction, labels)[0].cpu(), valid


@dataclass(frozen=True)
class Turns:
    """Every other batch of a loader, from `first` (0 or 1) on."""

    loader: Iterable[Any]
    first: int

    def __iter__(self) -> Any:
        return (item for i, item in enumerate(self.loader) if i % 2 == self.first)
