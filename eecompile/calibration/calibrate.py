"""`calibrate`: a temperature per exit, then the cheapest thresholds that provably lose little.

**The drop.** A row's drop is the full model's score less the early one. For `target="accuracy"` scores are 0 or 1, for
"agreement" the early score is whether the answer is the full model's; a metric, and outputs with positions, where a row's
score is the share of its positions, give scores in [0, 1]. Gains, where only the early answer is right, count.

**The test.** Learn then Test (Angelopoulos et al. 2021) in the form of Pareto testing (Laufer-Goldshtein et
al. 2023). The rows are split at random by `seed`. On the first part temperatures are fitted and a path of
threshold vectors is found, from hardly any exit to more and more loss, each cheaper than the one before. On
the second part the hypotheses "E[drop] > max_drop" are tested along the path, each at the level that is carried
on by rejecting the one before. All rejected ones satisfy the bound at once with probability 1 - delta over
the calibration data, so the cheapest of them may be chosen by looking at all rows.

**Not stopping at one unlucky point.** The path begins with a ramp of vectors that let only the surest rows
leave, so that the first test is all but certain to pass if any can. 85% of delta starts there; 5% each
starts at a quarter, half and three quarters of the path (`risk.fallback`), so one unlucky vector ends a
chain but not the search. The price is small: a zero-loss test at 0.85 delta needs 315 rows in place of 299
(1%, 5%).

**Several parts.** Gates, routes and halting (`lines.py`) come first, then the exits given these. Batches take turns, so that
no part sees another's rows: each of n parts may lose max_drop / n with probability 1 - delta / n against the model as it is
set so far; the union bound gives the sum. Exits also have the share of a part that did not qualify.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eecompile.calibration.baselines import auroc, baselines
from eecompile.calibration.choose import Path, is_binary, split
from eecompile.calibration.collect import Collected, Source, collect, second_pass
from eecompile.calibration.earned import check_models
from eecompile.calibration.evidence import Evidence, pattern, remembered, sane
from eecompile.calibration.lines import calibrate_line, exits_are_set, lines_of
from eecompile.calibration.options import MOST_SEARCH_ROWS, Options, combination_of, split_sizes
from eecompile.calibration.report import EXIT_WORDS, CalibrationReport, Subgroups, calibrated_exits
from eecompile.calibration.search import Search, candidates
from eecompile.calibration.stateful import agreement_confidences, all_or_none
from eecompile.calibration.temperature import fit_temperature, negative_log_likelihood
from eecompile.criteria import Energy, Entropy, Margin, MaxProbability
from eecompile.errors import CalibrationError
from eecompile.ir.settings import EXITS, TEMPERATURES, Settings
from eecompile.runtime.confidences import confidences_of
from eecompile.training.batches import device_of, require_repeatable
from eecompile.training.subgroups import check_groups
from eecompile.training.workers import whole

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

AGAINST = "the drop is against the trained model at its own end; evaluate compares with the model as it was given"
BY_LOGITS = (MaxProbability, Entropy, Margin, Energy)
ROWS_TO_COMPARE_CRITERIA = 2000
RAMP = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def calibrate(fast: CompiledModule, loader: Iterable[Any], **options: Any) -> CalibrationReport:
    """Chooses what makes rows leave or skip: of gates, of routers to branches, of halting, then of exits.

    The module stays as it is; `fast.calibrate` sets what the report holds as `settings`. Under `accelerate launch` or
    `torchrun` the processes share the batches; all of them call this, and get the same report.

    Args:
        fast: The compiled module, trained.
        loader: Calibration data that training has not seen, drawn like the data in use; `(inputs, labels)` or
            Hugging Face batches. Read once; a second time, in the same order, where outputs have positions
            or are too large to be kept (`temperature=True` only), and once for each part of what is set.
        options: As `eecompile.calibration.options.Options` has them: `max_drop=0.01`, `delta=0.05`,
            `target="accuracy"`, `temperature=True`, `metric=None`, `keep_open=None`, `seed=0`.

    Returns:
        CalibrationReport. Where no thresholds qualify (`qualified` is False), all exits are closed and
        `guarantee` says why, and how many rows would be needed. With gates, branches or halting alone a report of
        those; with exits too that is in its `before`, and the promises together bound the drop by `max_drop` with
        probability `1 - delta`.

    Raises:
        CalibrationError: An empty loader; labels that are missing, out of range or of a wrong shape; NaN in
            an output; options out of range; fewer than 2 rows.
    """
    asked, loader = Options.of(fast, options), whole(loader)
    lines, exits = lines_of(fast), exits_are_set(fast)
    parts = len(lines) + exits
    delta = None if asked.delta is None else asked.delta / parts
    if parts > 1:
        require_repeatable(loader, "every kind of decision has batches of its own", "the calibration loader")
    settings, left, before = fast.settings, asked.max_drop, []
    for i, line in enumerate(lines):
        mine = replace(asked, max_drop=asked.max_drop / parts, delta=delta)
        report = calibrate_line(line, source_of(fast, Turns.of(loader, i, parts), mine), settings, mine)
        settings = report.settings
        left -= mine.max_drop if report.qualified else 0.0
        before.append(report)
    if exits:
        mine = replace(asked, max_drop=left, delta=delta)
        report = Exits(fast, Turns.of(loader, parts - 1, parts), settings, mine).calibrated()
    else:
        report = before.pop()
    report.before = before
    return report


def source_of(fast: CompiledModule, loader: Iterable[Any], options: Options) -> Source:
    loader = whole(loader)
    check_groups(options.groups, loader)
    return Source(fast, loader, options, device_of(fast))


class Exits:
    """Thresholds and temperatures of the exits under otherwise fixed settings.

    Args:
        settings: Of the program; thresholds and temperatures are chosen anew.
    """

    def __init__(self, fast: CompiledModule, loader: Iterable[Any], settings: Settings, options: Options) -> None:
        self.fast, self.loader, self.options = fast, loader, options
        self.source = source_of(fast, loader, options)
        self.settings = settings
        self.keep_open = options.stays_open(fast)
        self.costs = remembered(lambda is_open: fast.costs(is_open, settings))
        self.notes: list[str] = [AGAINST] if getattr(fast, "given", None) is not None else []
        self.nll: list[tuple[float | None, float | None]] = [(None, None)] * (len(fast.exits) + 1)

    def calibrated(self) -> CalibrationReport:
        options, data = self.options, self.collected(self.options.temperature)
        first, second = split(data.keys, split_sizes(data.rows, options.max_drop, options.delta)[0])
        data, evidence = self.evidence(data, float(data.keys[first[-1]]))
        drops = replace(evidence, loss=data.score[:, -1:] - data.score)
        vectors = self._cheapest(data, drops) if options.delta is None else self._candidates(drops.part(first))
        closed, full, groups = self.settings.neutral(EXITS), data.score[:, -1], Subgroups(data.members, options)
        path = Path(
            drop=drops.losses,
            rows=data.rows,
            cost=lambda vector: evidence.measure(vector)[1],
            full_cost=evidence.measure(torch.tensor(closed[EXITS]))[1],
            binary=is_binary(data.score),
            subsets=lambda vector: [*groups.controlled, *(self._leaving(drops, vector) if options.conditional else ())],
            harm=lambda vector: groups.harm(full - drops.losses(vector), full),
            impossible=groups.too_small(second, options.delta),
        )
        chosen = path.choose(vectors, first, second, options)
        settings = closed if chosen.value is None else self.settings.with_values(EXITS, chosen.value)
        thresholds = torch.tensor(settings[EXITS])
        index, costs = evidence.leave(thresholds), self.costs(pattern(thresholds))
        report = CalibrationReport.of(
            options,
            chosen,
            settings=settings,
            words=EXIT_WORDS,
            kind="exits",
            drop=drops.losses(thresholds),
            rows=(first, second),
            skipped_rows=data.skipped,
            expected_cost=float(costs[index].mean()),
            parts=self.parts(settings, index, costs),
            safer=[self.settings.with_values(EXITS, vector) for vector in chosen.safer],
            notes=self.notes,
        )
        report.add_groups(groups, full - drops.losses(thresholds), full)
        report.by_criterion = self.by_criterion(data, drops, first)
        if data.predictions is not None:
            taken = data.predictions.gather(1, index[:, None])[:, 0]
            report.disagreement = float((taken != data.predictions[:, -1]).double().mean())
        for k, part in enumerate(report.parts):
            leaving = index <= k
            part.gap = float(drops.losses(thresholds)[leaving].mean()) if bool(leaving.any()) else None
            if k < evidence.exits:
                part.auroc = auroc(evidence.confidences[:, k], drops.loss[:, k] > 0)
        report.baselines = baselines(drops, report, data.static, options.static)
        return report

    def by_criterion(self, data: Collected, drops: Evidence, rows: Tensor) -> dict[str, float]:
        """Mean cost of each criterion that reads logits alone, at a drop of `max_drop` on these rows, the present one first.

        Empty where the present one reads something else, exits differ in it or answer together, or logits were not kept.
        """
        used = {record.criterion for record in self.fast.exits}
        own = next(iter(used))
        if len(used) > 1 or type(own) not in BY_LOGITS or combination_of(self.fast) != "last":
            return {}
        if data.kept is None or data.predictions is None:
            return {}
        keys, logits, _ = data.kept.joined()
        rows = rows[: min(len(keys), ROWS_TO_COMPARE_CRITERIA)]  # those with the smallest keys, as they are kept
        mine = logits[keys.argsort(stable=True)[: len(rows)]].to(self.source.device).unbind(1)
        temperatures = torch.tensor(self.settings[TEMPERATURES], device=self.source.device)
        found = {}
        for kind in sorted(BY_LOGITS, key=lambda kind: kind is not type(own)):
            confidences = torch.stack(confidences_of(kind(reduce=own.reduce), False, mine, temperatures)[:-1], 1)
            search = Search(replace(drops.part(rows), confidences=sane(confidences.float().cpu())))
            found[kind.name] = search.measure(search.cheapest(self.options.max_drop * len(rows)))[1]
        return found

    def _leaving(self, drops: Evidence, vector: Tensor) -> list[Tensor]:
        """bool [n] for each open exit: the rows that leave there or before."""
        index = drops.leave(vector)
        return [index <= k for k, is_open in enumerate(pattern(vector)) if is_open]

    def parts(self, settings: Settings, index: Tensor, costs: Tensor) -> list[Any]:
        """What is reported of every exit and of the model's own end, with rows leaving at `index` [n]."""
        names = [record.name for record in self.fast.exits] + ["model"]
        return calibrated_exits(names, (settings[EXITS], settings[TEMPERATURES]), index, costs, self.nll)

    def collected(self, temperatures: bool) -> Collected:
        """One pass over the data with every exit open: a closed one would not count for patience."""
        data = collect(self.source, self.settings.with_values(EXITS, 0.0), temperatures=temperatures, seed=self.options.seed)
        if data.rows < 2:
            raise CalibrationError(
                "too few rows to calibrate on",
                got=f"{data.rows} rows with a label",
                wanted=f"at least {self.options.rows_needed or 2} rows",
            )
        check_models(self.fast, data.score, self.options.score)
        return data

    def evidence(self, data: Collected, largest_key: float) -> tuple[Collected, Evidence]:
        """Temperatures from the rows with keys up to `largest_key`, then what thresholds are chosen from."""
        confidences = self._temperatures(data, largest_key)
        if combination_of(self.fast) == "confident" and data.kept is not None:
            # with other temperatures another exit may be the surest: the answers themselves have changed
            require_repeatable(self.loader, "the surest exit answers, at new temperatures", "the calibration loader")
            data = self.collected(False)
            confidences = data.confidences
        return data, self.evidence_of(data, confidences)

    def _temperatures(self, data: Collected, largest_key: float) -> Tensor:
        """Fits temperatures on the rows of the search; confidences `[n, E + 1]` with them."""
        kept, old, settings = data.kept, self.settings[TEMPERATURES], self.settings
        if kept is None:
            if self.options.temperature:
                why = "a metric was given" if self.options.metric is not None else "the loader gives no labels"
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
            self.nll[k] = negative_log_likelihood(z, y, old[k]), negative_log_likelihood(z, y, new[k])
        self.settings = settings.with_values(TEMPERATURES, new)
        if not kept.whole:
            require_repeatable(self.loader, "temperatures need a second pass for these outputs", "the calibration loader")
            return second_pass(self.source, self.settings.with_values(EXITS, 0.0), data)
        order = slice(None) if torch.equal(keys, data.keys) else data.keys.argsort().argsort()
        device = self.source.device
        outputs = [logits[order, k].to(device) for k in range(logits.shape[1])]
        scores = None if data.scores is None else [s.to(device) for s in data.scores.unbind(1)]
        found = self.fast.confidences_of(outputs, torch.tensor(self.settings[TEMPERATURES], device=device), scores)
        return torch.stack([c.float().cpu() for c in found], 1)

    def evidence_of(self, data: Collected, confidences: Tensor) -> Evidence:
        """What thresholds are chosen from, with confidences `[n, E + 1]`."""
        loss = (data.score[:, -1:] - data.score).clamp(min=0)
        found = Evidence(sane(confidences[:, :-1]), loss, self.costs, keep_open=self.keep_open)
        criteria = [record.criterion for record in self.fast.exits]
        if any(criterion.stateful for criterion in criteria):
            if data.predictions is None:
                self.notes.append("outputs with positions and patience: exits are opened all or none")
                found.recompute = all_or_none(found.confidences)
            else:
                found.recompute = agreement_confidences(data.predictions[:, :-1], confidences[:, :-1], criteria)
        return found

    def _candidates(self, drops: Evidence) -> list[Tensor]:
        """Threshold vectors around the front of loss against cost on the rows of the search, gains counted and not, and a
        ramp of very safe ones."""
        most = 1.5 * self.options.max_drop + 3 / drops.rows
        losses = replace(drops, loss=drops.loss.clamp(min=0))
        path = [v for total, _, v in candidates(losses, most) if total <= most * drops.rows and any(pattern(v))]
        found = list(path)
        if bool((drops.loss < 0).any()):
            found += [v for total, _, v in candidates(drops, most) if total <= most * drops.rows and any(pattern(v))]
        if drops.recompute is None:
            search = Search(losses)
            found += [search.between(search.closed, path[0], share) for share in RAMP] if path else []
            if self.options.conditional:
                found += search.even(self.options.max_drop)
        unique = {tuple(v.tolist()): v for v in found if any(pattern(v))}
        return list(unique.values())

    def _cheapest(self, data: Collected, drops: Evidence) -> list[Tensor]:
        """Vectors on the front of drop, gains counted, against cost, and the cheapest within `max_drop` refined."""
        budget = self.options.max_drop * data.rows
        some = drops
        if data.rows > 2 * MOST_SEARCH_ROWS:
            some = drops.part(data.keys.argsort(stable=True)[:MOST_SEARCH_ROWS])
        found = [vector for _, _, vector in candidates(some, self.options.max_drop)]
        if drops.recompute is None:
            search = Search(drops)
            feasible = [v for v in found if search.measure(v)[0] <= budget + 1e-9]
            best = min(feasible, key=lambda v: search.measure(v)[1], default=search.closed)
            found.append(search.descend(best, None, budget))
        return found


@dataclass(frozen=True)
class Turns:
    """Every `of`-th batch of a loader, from `first` on."""

    loader: Iterable[Any]
    first: int
    parts: int

    @classmethod
    def of(cls, loader: Iterable[Any], first: int, parts: int) -> Iterable[Any]:
        """The loader itself where there is one part."""
        return loader if parts == 1 else cls(loader, first, parts)

    def __iter__(self) -> Any:
        seen = -1
        for seen, item in enumerate(self.loader):
            if seen % self.parts == self.first:
                yield item
        if seen < self.first:
            raise CalibrationError(
                "the calibration loader has too few batches: each kind of decision has batches of its own",
                got=seen + 1,
                wanted=f"at least {self.parts} batches",
                hint="a smaller batch_size",
            )
