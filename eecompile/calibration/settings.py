"""Settings of what decides inside the model (gates, routers to branches, halting) that provably lose little against the
model with nothing left out.

**The path.** Such a setting changes what later parts see, so it cannot be judged from scores that were kept: the model runs
once for each. The settings are few and lie on one line, which a `Knob` knows: one number for all gates, or how far a branch
must lead, or how far halting scores must add up; and the setting as it is.

**The test.** As for exits (`calibrate.py`): the rows are split at random; on the first part the settings that are dearer
and lose more than another are dropped and the others put in order of their loss; on the second part the hypotheses "E[L] >
max_drop" are tested in that order (Learn then Test, with the starts of `risk.fallback`), L as for exits, with the model's
own output under that setting in place of an exit's. Of the settings that pass the cheapest is taken. If none does, the
knob is set so that nothing is left out, which loses nothing.

**Several parts.** Knobs come first, then the exits given the knobs. Batches take turns, so that no part sees another's rows:
each of n parts may lose max_drop / n with probability 1 - delta / n against the model as it is set so far; the union bound
gives the sum. Exits also have the share of a knob that did not qualify.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from eecompile.calibration.options import FIRST_START, LEAST_SEARCH_ROWS, split_sizes, starts
from eecompile.calibration.risk import fallback, p_values, rows_needed
from eecompile.calibration.settings_report import Found, SettingsReport
from eecompile.errors import CalibrationError
from eecompile.program import Result
from eecompile.training.batches import Batch, batches, device_of, require_repeatable
from eecompile.training.scores import Metric, agreement, check_labels, measure, right

Setting: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """One setting on all rows.

    Attributes:
        setting: Of the knob.
        score: float64 [n] of the model's own output, in [0, 1].
        cost: float64 [n], fraction of the full model's FLOPs.
        shares: Share of the rows that passed each gate, or took each route, or their mean steps.
    """

    setting: Setting
    score: Tensor
    cost: Tensor
    shares: tuple[float, ...]


class Knob(ABC):
    """What is set: it reads and sets a compiled module, proposes settings, and writes the report."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    @abstractmethod
    def now(self) -> Setting:
        """The setting as it is."""

    @abstractmethod
    def set(self, setting: Setting) -> None: ...

    @property
    @abstractmethod
    def full(self) -> Setting:
        """The setting that leaves nothing out."""

    @abstractmethod
    def told(self, result: Result) -> Tensor:
        """[B, N] float32 of a result of `observe`: what settings are proposed from."""

    @abstractmethod
    def settings(self, told: Tensor) -> list[Setting]:
        """What to try, from what was `told` about all rows [n, N]."""

    @abstractmethod
    def took(self, result: Result) -> Tensor:
        """[B, M] float64: which gates a row passed, which route it took, or its steps."""

    @abstractmethod
    def report(self, found: Found) -> SettingsReport:
        """What was found, told of the module as it is now set."""


def calibrate_setting(
    knob: Knob,
    loader: Iterable[Any],
    *,
    max_drop: float,
    delta: float | None,
    target: str,
    metric: Metric | None,
    seed: int,
) -> SettingsReport:
    """Sets the knob; options as of `calibrate`. Exits have no part in it, and stay as they are.

    Raises:
        CalibrationError: An empty loader or one that cannot be read again, missing or wrong labels, too few rows.
    """
    with _alone(knob, loader):
        tried, base, most = _judged(knob, loader, target, metric)
        rows = len(base)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        size, _ = split_sizes(rows, max_drop, delta)
        first, second = order[:size], order[size:]
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
        saving = [(i, level) for i, level in accepted if float(path[i].cost.mean()) < most]
        best = min(saving, key=lambda found: float(path[found[0]].cost.mean()), default=None)
        chosen = None if best is None else path[best[0]]
        knob.set(knob.full if chosen is None else chosen.setting)
        needed = rows_needed(max_drop, FIRST_START * delta) if delta is not None else None
        loss = torch.zeros_like(base) if chosen is None else (base - chosen.score).clamp(min=0)
        drop = torch.zeros_like(base) if chosen is None else base - chosen.score
        found = Found(
            qualified=chosen is not None,
            target="metric" if metric is not None else target,
            max_drop=max_drop,
            delta=delta,
            rows=rows,
            search_rows=len(first),
            test_rows=len(second),
            rows_needed=None if needed is None else needed + LEAST_SEARCH_ROWS,
            expected_cost=most if chosen is None else float(chosen.cost.mean()),
            loss_test=float(loss[second].mean()) if len(second) else None,
            drop=float(drop.mean()),
            p_value=None if best is None else known.get(best[0]),
            level=None if best is None else best[1],
            tested=len(path),
            accepted=len(accepted),
            shares=None if chosen is None else chosen.shares,
            curve=_curve(tried, base),
        )
        return knob.report(found)


def setting_within(
    knob: Knob, loader: Iterable[Any], budget: float, *, target: str, metric: Metric | None
) -> SettingsReport:
    """Sets the knob to the most accurate of its settings whose mean cost on `loader` is at most `budget`; no guarantee.

    Raises:
        CalibrationError: As `calibrate_setting`; no setting keeps the budget.
    """
    with _alone(knob, loader):
        tried, base, _ = _judged(knob, loader, target, metric, knob.full)
        costs = [float(t.cost.mean()) for t in tried]
        kept = [i for i, cost in enumerate(costs) if cost <= budget + 1e-9]
        if not kept:
            raise CalibrationError(
                "no setting keeps the budget", got=budget, wanted=f"at least {min(costs):.3g}, what the cheapest costs"
            )
        best = max(kept, key=lambda i: (float(tried[i].score.mean()), -costs[i]))
        knob.set(tried[best].setting)
        found = Found(
            qualified=True,
            target="metric" if metric is not None else target,
            max_drop=0.0,
            delta=None,
            rows=len(base),
            search_rows=len(base),
            test_rows=0,
            rows_needed=None,
            expected_cost=costs[best],
            loss_test=None,
            drop=float((base - tried[best].score).mean()),
            p_value=None,
            level=None,
            tested=len(tried),
            accepted=len(kept),
            shares=tried[best].shares,
            curve=_curve(tried, base),
            budget=float(budget),
        )
        return knob.report(found)


@contextmanager
def _alone(knob: Knob, loader: Iterable[Any]) -> Iterator[None]:
    """Every exit is closed inside; the knob is as before where it fails."""
    require_repeatable(loader, "every setting runs the model", "the calibration loader")
    fast, before = knob.fast, knob.now()
    exits = fast.thresholds.tolist()
    try:
        fast.set_thresholds([2.0] * len(exits))
        yield
    except BaseException:
        knob.set(before)
        raise
    finally:
        fast.set_thresholds(exits)


def _curve(tried: Sequence[Judged], base: Tensor) -> list[dict[str, Any]]:
    return [
        {"setting": list(t.setting), "cost": float(t.cost.mean()), "drop": float((base - t.score).mean())} for t in tried
    ]


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


def _judged(
    knob: Knob, loader: Iterable[Any], target: str, metric: Metric | None, *besides: Setting
) -> tuple[list[Judged], Tensor, float]:
    """Every setting that the knob proposes, and `besides`; the score [n] and the mean cost with nothing left out.

    Raises:
        CalibrationError: Fewer than 2 rows with a label.
    """
    device = device_of(knob.fast)
    full, told, valid = _full(knob, loader, target, metric, device)
    rows = int(valid.sum())
    if rows < 2:
        raise CalibrationError("too few rows to calibrate on", got=f"{rows} rows with a label", wanted="at least 2")
    settings = dict.fromkeys([*knob.settings(told), *besides])
    tried = [_judge(knob, loader, s, full, target, metric, device, valid) for s in settings]
    agreeing = target == "agreement" and metric is None
    base = torch.ones(rows, dtype=torch.float64) if agreeing else torch.cat(full.scores)[valid]
    return tried, base, float(torch.cat(full.costs)[valid].mean())


@dataclass(frozen=True)
class Full:
    """What the model says and costs with nothing left out: float64 [n] each, and for agreement its predictions by batch."""

    scores: list[Tensor]
    costs: list[Tensor]
    predictions: list[Tensor]


def _full(
    knob: Knob, loader: Iterable[Any], target: str, metric: Metric | None, device: torch.device
) -> tuple[Full, Tensor, Tensor]:
    """The answers with nothing left out, what the knob is told [n, N] as it is set, and which rows have a label."""
    full, fast = Full([], [], []), knob.fast
    told = [knob.told(fast.observe(*batch.args, **batch.kwargs)).cpu() for batch in batches(loader, device)]
    valid = []
    present = knob.now()
    knob.set(knob.full)
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        prediction = result.outputs[-1]
        if bool(prediction.isnan().any()):
            raise CalibrationError("NaN in the outputs of the full model", where=batch.where)
        score, ok = _score(prediction, prediction, batch, target, metric)
        full.scores.append(score)
        full.costs.append(result.cost.double().cpu())
        if target == "agreement" and metric is None:
            full.predictions.append(prediction.cpu())
        valid.append(ok)
    knob.set(present)
    if not valid:
        raise CalibrationError("the calibration loader is empty", got="no batch", wanted="at least one batch")
    return full, torch.cat(told), torch.cat(valid)


def _judge(
    knob: Knob,
    loader: Iterable[Any],
    setting: Setting,
    full: Full,
    target: str,
    metric: Metric | None,
    device: torch.device,
    valid: Tensor,
) -> Judged:
    knob.set(setting)
    fast = knob.fast
    scores, costs, took = [], [], []
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        reference = full.predictions[batch.index].to(device) if full.predictions else result.outputs[-1]
        scores.append(_score(result.outputs[-1], reference, batch, target, metric)[0])
        costs.append(result.cost.double().cpu())
        took.append(knob.took(result).double().cpu())
    if sum(len(s) for s in scores) != len(valid):
        raise CalibrationError(
            "the calibration loader gave other rows when it was read again",
            got=f"{sum(len(s) for s in scores)} rows",
            wanted=f"the same {len(valid)}",
            hint="pass shuffle=False and no augmentation",
        )
    share = torch.cat(took)[valid].mean(0).tolist()
    return Judged(setting, torch.cat(scores)[valid], torch.cat(costs)[valid], tuple(share))


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
    """Every `of`-th batch of a loader, from `first` on."""

    loader: Iterable[Any]
    first: int
    of: int

    def __iter__(self) -> Any:
        seen = -1
        for seen, item in enumerate(self.loader):
            if seen % self.of == self.first:
                yield item
        if seen < self.first:
            raise CalibrationError(
                "the calibration loader has too few batches: each kind of decision has batches of their own",
                got=seen + 1,
                wanted=f"at least {self.of}",
                hint="a smaller batch_size",
            )
