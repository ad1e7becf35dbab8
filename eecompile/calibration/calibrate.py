"""`calibrate`: a temperature per exit, then the cheapest thresholds that provably lose little.

**The loss.** For `target="accuracy"` a row's loss is L = [the full model is right and the early answer is
wrong]; for "agreement" L = [the early answer is not the full model's]; with a metric in [0, 1], and for
outputs with positions, where a row's score is the share of its positions, L = max(0, full score - early
score). The drop of accuracy is E[full - early] <= E[max(0, full - early)] = E[L]: gains, where the early
answer is right and the full one wrong, are not counted. So a bound of E[L] bounds the drop. The loss full -
early in {-1, 0, 1} itself would be the drop, but as a bounded loss it must be scaled to (1 + L) / 2, and to
tell 0.5 from 0.505 takes some 60,000 rows without any error (n h(0.5, 0.505) >= log 20) where the binary
loss needs 299 for the same 1% at 95%: near zero a binomial has next to no variance, and in the middle of [0,
1] it has the most.

**The test.** Learn then Test (Angelopoulos et al. 2021) in the form of Pareto testing (Laufer-Goldshtein et
al. 2023). The rows are split at random by `seed`. On the first part temperatures are fitted and a path of
threshold vectors is found, from hardly any exit to more and more loss, each cheaper than the one before. On
the second part the hypotheses "E[L] > max_drop" are tested along the path, each at the level that is carried
on by rejecting the one before. All rejected ones satisfy the bound at once with probability 1 - delta over
the calibration data, so the cheapest of them may be chosen by looking at all rows.

**Not stopping at one unlucky point.** The path begins with a ramp of vectors that let only the surest rows
leave, so that the first test is all but certain to pass if any can. 85% of delta starts there; 5% each
starts at a quarter, half and three quarters of the path (`risk.fallback`), so one unlucky vector ends a
chain but not the search. The price is small: a zero-loss test at 0.85 delta needs 315 rows in place of 299
(1%, 5%).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.collect import Collected, collect, combination_of, second_pass
from eecompile.calibration.earned import check_models
from eecompile.calibration.evidence import CLOSED, Evidence, pattern, remembered, sane
from eecompile.calibration.knobs import exits_are_set, knobs_of
from eecompile.calibration.options import (
    FIRST_START,
    LEAST_SEARCH_ROWS,
    MOST_SEARCH_ROWS,
    check_options,
    split_sizes,
    starts,
    stays_open,
)
from eecompile.calibration.report import CalibratedExit, CalibrationReport, sentence
from eecompile.calibration.risk import fallback, p_values, rows_needed
from eecompile.calibration.search import Search, candidates
from eecompile.calibration.settings import Turns, calibrate_setting
from eecompile.calibration.settings_report import SettingsReport
from eecompile.calibration.stateful import agreement_confidences, all_or_none
from eecompile.calibration.temperature import fit_temperature, negative_log_likelihood
from eecompile.errors import CalibrationError
from eecompile.training.batches import device_of, require_repeatable
from eecompile.training.protocol import Compiled
from eecompile.training.scores import Metric

RAMP = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
LONGEST_PATH = 2000


def calibrate(
    fast: Compiled,
    loader: Iterable[Any],
    *,
    max_drop: float = 0.01,
    delta: float | None = 0.05,
    target: str = "accuracy",
    temperature: bool = True,
    metric: Metric | None = None,
    keep_open: bool | None = None,
    seed: int = 0,
) -> CalibrationReport | SettingsReport:
    """Chooses what makes rows leave or skip and sets it on `fast`: of gates, of routers to branches, then of exits.

    Args:
        fast: The compiled module, trained. Thresholds and temperatures stay as they were if this raises.
        loader: Calibration data that training has not seen, drawn like the data in use; `(inputs, labels)` or
            Hugging Face batches. Read once; a second time, in the same order, where outputs have positions
            or are too large to be kept (`temperature=True` only).
        max_drop: Largest drop, in [0, 1): 0.01 is one percent point of accuracy.
        delta: Largest probability, over the draw of the calibration data, that the drop is larger after all,
            in (0, 1). None: no guarantee, the cheapest thresholds whose drop on this data is at most
            `max_drop`.
        target: "accuracy" (against the labels) or "agreement" (with the full model; needs no labels).
        temperature: Whether temperatures are fitted. Exits with a patience, a learned or a routed criterion keep 1.
        metric: `(prediction, labels) -> [B]` in [0, 1], higher is better, for a task that is not
            classification.
        keep_open: Whether every exit stays open (threshold at most 1), so that a call may be stopped there. None: what
            the strategy asks for, and always where exits answer together, since closing one would change the others.
        seed: Of the split.

    Returns:
        CalibrationReport. Where no thresholds qualify (`qualified` is False), all exits are closed and
        `guarantee` says why, and how many rows would be needed. With gates, branches or halting alone a report of
        those; with exits too that is in its `before`, and the promises together bound the drop by `max_drop` with
        probability `1 - delta` (`settings.py` says how).

    Raises:
        CalibrationError: An empty loader; labels that are missing, out of range or of a wrong shape; NaN in
            an output; options out of range; fewer than 2 rows.
    """
    check_options(fast, max_drop, delta, target, metric)
    before, temperatures = fast.thresholds.tolist(), fast.temperatures.tolist()
    knobs = [(knob, knob.now()) for knob in knobs_of(fast)]
    exits = exits_are_set(fast)
    parts = len(knobs) + exits
    share = None if delta is None else delta / parts
    left, found = max_drop, []
    try:
        for i, (knob, _) in enumerate(knobs):
            turns = Turns(loader, i, parts) if parts > 1 else loader
            found.append(
                calibrate_setting(
                    knob, turns, max_drop=max_drop / parts, delta=share, target=target, metric=metric, seed=seed
                )
            )
            left -= max_drop / parts if found[-1].qualified else 0.0
        if not exits:
            return found[-1]
        rest = Turns(loader, parts - 1, parts) if knobs else loader
        report = Calibration(fast, rest, left, share, target, temperature, metric, seed, stays_open(fast, keep_open)).run()
        report.before = found
        return report
    except BaseException:
        for knob, setting in knobs:
            knob.set(setting)
        fast.set_thresholds(before)
        fast.set_temperatures(temperatures)
        raise


class Calibration:
    """One call of `calibrate`."""

    def __init__(
        self,
        fast: Compiled,
        loader: Iterable[Any],
        max_drop: float,
        delta: float | None,
        target: str,
        temperature: bool,
        metric: Metric | None,
        seed: int,
        keep_open: bool = False,
    ) -> None:
        self.keep_open = keep_open
        self.fast, self.loader, self.metric, self.seed = fast, loader, metric, seed
        self.max_drop, self.delta, self.target, self.temperature = float(max_drop), delta, target, temperature
        self.device = device_of(fast)
        self.costs = remembered(fast.costs)
        self.notes: list[str] = []
        self.nll: list[tuple[float | None, float | None]] = [(None, None)] * (len(fast.exits) + 1)
        self.old = fast.temperatures.tolist()

    def run(self) -> CalibrationReport:
        data = self.collected(self.temperature)
        search_rows, _ = split_sizes(data.rows, self.max_drop, self.delta)
        order = data.keys.argsort(stable=True)
        first, second = order[:search_rows], order[search_rows:]
        data, evidence = self.judged(data, float(data.keys[first[-1]]))
        if self.delta is None:
            return self._empirical(data, evidence)
        path = self._path(evidence.part(first))
        return self._tested(data, evidence, path, first, second)

    def collected(self, temperatures: bool) -> Collected:
        """One pass over the data with every exit open: a closed one would not count for patience."""
        self.fast.set_thresholds([0.0] * len(self.fast.exits))
        data = collect(
            self.fast,
            self.loader,
            target=self.target,
            metric=self.metric,
            temperatures=temperatures,
            seed=self.seed,
            device=self.device,
        )
        if data.rows < 2:
            raise CalibrationError(
                "too few rows to calibrate on",
                got=f"{data.rows} rows with a label",
                wanted=f"at least {self._needed() or 2}",
            )
        check_models(self.fast, data.score, self.target if self.metric is None else "metric")
        return data

    def judged(self, data: Collected, largest_key: float) -> tuple[Collected, Evidence]:
        """Temperatures from the rows with keys up to `largest_key`, then what thresholds are chosen from."""
        confidences = self._temperatures(data, largest_key)
        if combination_of(self.fast) == "confident" and data.kept is not None:
            # with other temperatures another exit may be the surest: the answers themselves have changed
            require_repeatable(self.loader, "the surest exit answers, at new temperatures", "the calibration loader")
            data = self.collected(False)
            confidences = data.confidences
        return data, self._evidence(data, confidences)

    # --- temperatures -------------------------------------------------------------------------------------

    def _temperatures(self, data: Collected, largest_key: float) -> Tensor:
        """Fits and sets temperatures on the rows of the search; confidences `[n, E + 1]` with them."""
        kept = data.kept
        if kept is None:
            if self.temperature:
                why = "a metric was given" if self.metric is not None else "the loader gives no labels"
                self.notes.append(f"temperatures were not fitted: {why}")
            return data.confidences
        keys, logits, labels = kept.joined()
        mine = keys <= largest_key
        new = []
        for k in range(logits.shape[1]):
            criterion = self.fast.exits[k].criterion if k < len(self.fast.exits) else None
            z, y = logits[mine, k], labels[mine]
            if criterion is not None and (criterion.stateful or criterion.learned or criterion.routed):
                new.append(1.0)
                continue
            new.append(fit_temperature(z, y))
            self.nll[k] = negative_log_likelihood(z, y, self.old[k]), negative_log_likelihood(z, y, new[k])
        self.fast.set_temperatures(new)
        if not kept.whole:
            require_repeatable(self.loader, "temperatures need a second pass for these outputs", "the calibration loader")
            return second_pass(self.fast, self.loader, data, self.device)
        order = self._in_order(data, keys)
        outputs = [logits[order, k].to(self.device) for k in range(logits.shape[1])]
        scores = None if data.scores is None else [data.scores[:, k].to(self.device) for k in range(data.scores.shape[1])]
        found = self.fast.confidences_of(outputs, self.fast.temperatures, scores)
        return torch.stack([c.float().cpu() for c in found], 1)

    def _in_order(self, data: Collected, keys: Tensor) -> Tensor | slice:
        return slice(None) if torch.equal(keys, data.keys) else data.keys.argsort().argsort()

    # --- evidence -----------------------------------------------------------------------------------------

    def _evidence(self, data: Collected, confidences: Tensor) -> Evidence:
        full = data.score[:, -1:]
        loss = (full - data.score).clamp(min=0)
        recompute, stay = None, self.keep_open
        criteria = [record.criterion for record in self.fast.exits]
        if any(criterion.stateful for criterion in criteria):
            if data.predictions is None:
                self.notes.append("outputs with positions and patience: exits are opened all or none")
                table = sane(confidences[:, :-1])
                return Evidence(table, loss, self.costs, all_or_none(table), stay)
            recompute = agreement_confidences(data.predictions[:, :-1], confidences[:, :-1], criteria)
        return Evidence(sane(confidences[:, :-1]), loss, self.costs, recompute, stay)

    def _path(self, evidence: Evidence) -> list[Tensor]:
        """Threshold vectors by growing loss on the rows of the search, after a ramp of very safe ones."""
        most = 1.5 * self.max_drop + 3 / evidence.rows
        found = candidates(evidence, most)
        path = [vector for total, _, vector in found if total <= most * evidence.rows and any(pattern(vector))]
        if path and evidence.recompute is None:
            search = Search(evidence)
            closed = search.closed
            path = [search.between(closed, path[0], share) for share in RAMP] + path
        unique: dict[tuple[float, ...], Tensor] = {}
        for vector in path:
            if any(pattern(vector)):
                unique.setdefault(tuple(vector.tolist()), vector)
        kept = list(unique.values())
        step = math.ceil(len(kept) / LONGEST_PATH) if kept else 1
        return kept[::step]

    # --- choosing -----------------------------------------------------------------------------------------

    def _tested(
        self, data: Collected, evidence: Evidence, path: list[Tensor], first: Tensor, second: Tensor
    ) -> CalibrationReport:
        test, n = evidence.part(second), len(second)
        binary = bool(((evidence.loss == 0) | (evidence.loss == 1)).all())
        known: dict[int, float] = {}

        def p_value(i: int) -> float:
            total = torch.tensor(test.measure(path[i])[0])
            known[i] = float(p_values(total, n, self.max_drop, binary=binary))
            return known[i]

        rejected = fallback(p_value, len(path), starts(len(path), self.delta or 0.0))
        chosen, chosen_p, level = torch.full((evidence.exits,), CLOSED), None, None
        best = evidence.measure(chosen)[1]
        for i, at in rejected:
            cost = evidence.measure(path[i])[1]
            if cost < best - 1e-12:
                best, chosen, chosen_p, level = cost, path[i], known[i], at
        qualified = any(pattern(chosen))
        return self._report(
            data, evidence, chosen, first, second, qualified, chosen_p, level, len(path), len(rejected), known
        )

    def _empirical(self, data: Collected, evidence: Evidence) -> CalibrationReport:
        """The cheapest vector whose drop on all rows, gains counted, is at most `max_drop`."""
        signed = Evidence(
            evidence.confidences, data.score[:, -1:] - data.score, self.costs, evidence.recompute, evidence.keep_open
        )
        budget = self.max_drop * data.rows
        rows = torch.arange(data.rows)
        some = signed
        if data.rows > 2 * MOST_SEARCH_ROWS:
            some = signed.part(data.keys.argsort(stable=True)[:MOST_SEARCH_ROWS])
        found = [vector for _, _, vector in candidates(some, self.max_drop)]
        measured = [(*signed.measure(vector), vector) for vector in found]
        closed = torch.full((evidence.exits,), CLOSED)
        feasible = [(cost, vector) for total, cost, vector in measured if total <= budget + 1e-9]
        best = min(feasible, key=lambda m: m[0])[1] if feasible else closed
        if signed.recompute is None:
            best = Search(signed).descend(best, None, budget)
        if signed.measure(best)[0] > budget + 1e-9 or signed.measure(best)[1] >= signed.measure(closed)[1]:
            best = closed
        return self._report(
            data,
            evidence,
            best,
            rows,
            rows[:0],
            any(pattern(best)),
            None,
            None,
            len(found),
            len(feasible),
            {},
        )

    # --- report -------------------------------------------------------------------------------------------

    def _needed(self) -> int | None:
        """Calibration rows with which something could qualify: enough to test on, and some to search on."""
        if self.delta is None:
            return None
        least = rows_needed(self.max_drop, FIRST_START * self.delta)
        return None if least is None else least + LEAST_SEARCH_ROWS

    def _report(
        self,
        data: Collected,
        evidence: Evidence,
        chosen: Tensor,
        first: Tensor,
        second: Tensor,
        qualified: bool,
        p_value: float | None,
        level: float | None,
        tested: int,
        accepted: int,
        known: dict[int, float],
    ) -> CalibrationReport:
        index = evidence.leave(chosen)
        costs = self.costs(pattern(chosen))
        loss = evidence.loss.gather(1, index[:, None])[:, 0]
        drop = data.score[:, -1] - data.score.gather(1, index[:, None])[:, 0]
        self.fast.set_thresholds([float(t) for t in chosen.tolist()])
        temperatures = self.fast.temperatures.tolist()
        names = [record.name for record in self.fast.exits] + ["model"]
        exits = [
            CalibratedExit(
                name=name,
                threshold=float(chosen[k]) if k < evidence.exits else None,
                temperature=float(temperatures[k]),
                share=float((index == k).double().mean()),
                cost=float(costs[k]),
                nll_before=self.nll[k][0],
                nll_after=self.nll[k][1],
            )
            for k, name in enumerate(names)
        ]
        report = CalibrationReport(
            qualified=qualified,
            guarantee="",
            target=self.target if self.metric is None else "metric",
            max_drop=self.max_drop,
            delta=self.delta,
            rows=data.rows,
            search_rows=len(first),
            test_rows=len(second),
            skipped_rows=data.skipped,
            rows_needed=self._needed(),
            expected_cost=float(costs[index].mean()),
            loss_search=float(loss[first].mean()),
            loss_test=float(loss[second].mean()) if len(second) else None,
            drop_search=float(drop[first].mean()),
            drop_test=float(drop[second].mean()) if len(second) else None,
            p_value=p_value,
            level=level,
            tested=tested,
            accepted=accepted,
            seed=self.seed,
            exits=exits,
            notes=self.notes,
        )
        report.guarantee = sentence(report, min(known.values()) if known else None)
        return report
