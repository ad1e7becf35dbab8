"""Settings inside a model that provably lose little against the model with nothing skipped: gates, routers to branches,
halting.

**The path.** Such a setting changes what later parts see, so no kept output says what it would give: the model runs once for
each. The settings are few and lie on one line, which a `Line` knows: one number for all gates, or how far a branch must
lead, or how far halting scores must add up; and the setting as it is. They are proposed from the first rows, then every
batch runs under all of them.

**The test.** As for exits: `choose.py`. If none qualifies, nothing is skipped, or the base is kept.

**The base.** Training moves the trunk to what its gates or halting leave of it, and with nothing skipped the model may be
worse than as it decides: to lose little against that would be no promise. Where a setting is clearly better on the first
part of the rows, losses are counted against the best one, and it is what is set if none qualifies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from eecompile.calibration.choose import Chosen, Path, is_binary, split
from eecompile.calibration.collect import Members, Source, classes_of
from eecompile.calibration.options import Options, split_sizes
from eecompile.calibration.report import (
    CalibratedGate,
    CalibratedHalt,
    CalibratedRoute,
    CalibrationReport,
    Part,
    Subgroups,
    Words,
)
from eecompile.errors import CalibrationError
from eecompile.ir.settings import BRANCHES, EXITS, GATES, HALTING, Settings
from eecompile.result import Result
from eecompile.training.batches import Batch
from eecompile.training.workers import processes, shared

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

FIRST_ROWS = 256  # whose scores settings are proposed from
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
THRESHOLDS = (*SHARES, 0.98, 1.0)
ENOUGH, CLEARLY = 30, 3.0  # rows and standard errors, for another setting to count as better than nothing skipped


class Line(ABC):
    """One family of settings that calibration may choose from."""

    family: ClassVar[str]
    words: Words

    def __init__(self, fast: CompiledModule) -> None:
        self.fast = fast

    def neutral(self, settings: Settings) -> Settings:
        """Nothing is skipped."""
        return settings.neutral(self.family)

    @abstractmethod
    def scores(self, result: Result) -> Tensor:
        """[B, N] float32 that settings are proposed from."""

    @abstractmethod
    def propose(self, scores: Tensor) -> list[Any]:
        """Values of the family to try, from the scores [n, N] of some rows."""

    @abstractmethod
    def shares(self, result: Result) -> Tensor:
        """[B, M] float64: the gates that a row passed, the route that it took, or its steps."""

    @abstractmethod
    def parts(self, settings: Settings, shares: Sequence[float] | None) -> list[Part]:
        """What was set, for the report; `shares` are means over the rows, None where nothing is skipped."""


class Gates(Line):
    """One threshold for all gates, at quantiles of their scores."""

    family = GATES
    words = Words("Calibration of gates", "thresholds of the gates", "all gates open", "all gates are open")

    def scores(self, result: Result) -> Tensor:
        assert result.trace.gate_scores is not None
        return result.trace.gate_scores.float()

    def propose(self, scores: Tensor) -> list[Any]:
        values = scores.flatten().nan_to_num(nan=1.0).sort().values
        return [float(values[int(q * (len(values) - 1))].clamp(1e-6, 1.0)) for q in SHARES[:9]]

    def shares(self, result: Result) -> Tensor:
        assert result.gates is not None
        return result.gates.double()

    def parts(self, settings: Settings, shares: Sequence[float] | None) -> list[Part]:
        gates = self.fast.gates
        found = zip(gates, settings[GATES], shares or (1.0,) * len(gates), strict=True)
        return [CalibratedGate(g.name, g.region, threshold, share, g.saves) for g, threshold, share in found]


class Routes(Line):
    """How far the likeliest branch must lead the model's own way, at quantiles of that lead; and no row on its own way."""

    family = BRANCHES
    words = Words(
        "Calibration of routes", "margins of the routes", "all rows on its own way", "all rows take the model's own way"
    )

    def scores(self, result: Result) -> Tensor:
        assert result.trace.route_weights is not None
        weights = result.trace.route_weights.float()
        return weights[:, :-1].max(1, keepdim=True).values - weights[:, -1:]

    def propose(self, scores: Tensor) -> list[Any]:
        leads, count = scores.flatten().nan_to_num(nan=-1.0), len(self.fast.routes) - 1
        # above the largest lead that stays: ties go to the branch
        at = [float(leads.quantile(1 - share)) for share in SHARES]
        closed = self.fast.settings.neutral(BRANCHES)[BRANCHES][0]
        return [*([max(t, 0.0)] * count + [max(-t, 0.0)] for t in at), [0.0] * count + [closed]]

    def shares(self, result: Result) -> Tensor:
        assert result.route is not None
        there = (result.route >= 0).unsqueeze(1)
        return torch.nn.functional.one_hot(result.route.clamp_min(0), len(self.fast.routes)).double() * there

    def parts(self, settings: Settings, shares: Sequence[float] | None) -> list[Part]:
        routes = self.fast.routes
        found = zip(routes, settings[BRANCHES], shares or [0.0] * (len(routes) - 1) + [1.0], strict=True)
        return [CalibratedRoute(r.name, margin, share, r.cost) for r, margin, share in found]


class Halting(Line):
    """How far the halting scores of a row must add up: the same for all chains.

    Nothing is skipped where no row halts; of a block that is repeated, where rows take as many steps as trained.
    """

    family = HALTING
    words = Words("Calibration of halting", "halting thresholds", "no row halted", "no row halts")

    def __init__(self, fast: CompiledModule) -> None:
        super().__init__(fast)
        self.repeated = any(h.repeated for h in fast.halts)
        if self.repeated:
            as_trained = "as many steps as trained"
            self.words = Words(self.words.title, self.words.what, as_trained, f"rows take {as_trained}")

    def neutral(self, settings: Settings) -> Settings:
        return settings.with_values(HALTING, 1.0) if self.repeated else super().neutral(settings)

    def scores(self, result: Result) -> Tensor:
        return self.shares(result).float()

    def propose(self, scores: Tensor) -> list[Any]:
        return [*THRESHOLDS]

    def shares(self, result: Result) -> Tensor:
        assert result.steps is not None
        return result.steps.double().view(len(result.steps), -1).mean(1, keepdim=True)

    def parts(self, settings: Settings, shares: Sequence[float] | None) -> list[Part]:
        chains = self.fast.halts
        most, steps = sum(len(h.steps) for h in chains), None if shares is None else shares[0]
        return [CalibratedHalt(", ".join(h.name for h in chains), settings[HALTING][0], steps, most)]


@dataclass(frozen=True)
class Tried:
    """One setting on all rows.

    Attributes:
        score: float64 [n] of the model's own output, in [0, 1].
        cost: float64 [n], fraction of the full model's FLOPs.
        shares: See `Line.shares`: means over the rows.
    """

    settings: Settings
    score: Tensor
    cost: Tensor
    shares: tuple[float, ...]


def calibrate_line(line: Line, source: Source, settings: Settings, options: Options) -> CalibrationReport:
    """The cheapest of a line's settings that keep the bound; exits stay closed meanwhile, and in the report as they were."""
    tried, full, keys, members = _run(line, source, settings, options)
    first, second = split(keys, split_sizes(len(keys), options.max_drop, options.delta)[0])
    base = _base(tried, full, first)
    parts = Subgroups(members, options)
    path: Path[Tried] = Path(
        drop=lambda t: base.score - t.score,
        rows=len(keys),
        cost=lambda t: float(t.cost.mean()),
        full_cost=float(full.cost.mean()),
        binary=is_binary(torch.stack([base.score, *(t.score for t in tried)])),
        subsets=lambda _: parts.controlled,
        harm=lambda t: parts.harm(t.score, base.score),
        impossible=parts.too_small(second, options.delta),
    )
    chosen = path.choose(tried, first, second, options)
    report = _report(line, settings, (tried, base), (first, second), chosen, options)
    report.add_groups(parts, (chosen.value or base).score, base.score)
    if base is not full:
        report.words = replace(line.words, against="the best setting tried", otherwise="the best setting tried is kept")
        share = [f"{100 * float(t.score.mean()):.1f}%" for t in (full, base)]
        report.notes.append(
            f"With {line.words.against} the score is {share[0]}, at the best setting {share[1]}: losses, "
            "by class and group too, are counted against that."
        )
    return report


def _base(tried: Sequence[Tried], full: Tried, rows: Tensor) -> Tried:
    """What losses are counted against: `full`, or the best of `tried` where it is clearly better on these rows."""
    if len(rows) < ENOUGH:
        return full
    best = max(tried, key=lambda t: float(t.score[rows].mean()), default=full)
    gain = best.score[rows] - full.score[rows]
    return best if float(gain.mean()) > CLEARLY * float(gain.std()) / len(rows) ** 0.5 else full


def line_within(line: Line, source: Source, settings: Settings, budget: float, options: Options) -> CalibrationReport:
    """The most accurate of a line's settings whose mean cost is at most `budget`; no guarantee.

    Raises:
        CalibrationError: No setting keeps the budget.
    """
    tried, full, keys, _ = _run(line, source, settings, options)
    tried = [*tried, full]
    costs = [float(t.cost.mean()) for t in tried]
    kept = [i for i, cost in enumerate(costs) if cost <= budget + 1e-9]
    if not kept:
        raise CalibrationError(
            "no setting keeps the budget", got=budget, wanted=f"at least {min(costs):.3g}, what the cheapest costs"
        )
    best = max(kept, key=lambda i: (float(tried[i].score.mean()), -costs[i]))
    chosen = Chosen(tried[best], None, None, len(tried), len(kept), None)
    rows = torch.arange(len(keys))
    report = _report(line, settings, (tried, full), (rows, rows[:0]), chosen, options)
    report.budget = float(budget)
    return report


def _run(line: Line, source: Source, settings: Settings, options: Options) -> tuple[list[Tried], Tried, Tensor, Members]:
    """What was tried, the model with nothing skipped, random keys of the rows and their groups; one pass over the data.

    Raises:
        CalibrationError: Fewer than 2 rows with a label, and as `Source`.
    """
    settings = settings.neutral(EXITS)
    stream = source.batches()
    head, scores = _head(line, source, stream, settings)
    asked = [settings.with_values(line.family, values) for values in line.propose(scores)]
    asked = list(dict.fromkeys([line.neutral(settings), *asked, settings]))
    generator = torch.Generator().manual_seed(options.seed)
    keys, members = list[Tensor](), Members(options.groups)
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in asked]

    def each(batch: Batch) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor | None]:
        """Under every setting score, cost and shares of the rows with a label; which rows have one, and their class."""
        rows, full, valid, labels = [], None, torch.empty(0), None
        for s in asked:
            result = source.observe(batch, s)
            assert result.outputs is not None
            full = result.outputs[-1] if full is None else full
            score, valid, labels = source.scores([result.outputs[-1]], full, batch)
            rows.append((score[valid, 0], result.cost.double().cpu()[valid], line.shares(result).cpu()[valid]))
        assert full is not None
        return rows, valid, classes_of(full, labels)

    for batch, (rows, valid, of_classes) in shared(chain(head, stream), each):
        for found, row in zip(seen, rows, strict=True):
            found.append(row)
        members.add(batch, of_classes, valid)
        keys.append(torch.rand(int(valid.sum()), generator=generator, dtype=torch.float64))
    if sum(map(len, keys)) < 2:
        raise CalibrationError("too few rows to calibrate on", got=f"{sum(map(len, keys))} rows with a label", wanted="2")
    tried = []
    for s, found in zip(asked, seen, strict=True):
        score, cost, shares = (torch.cat(values) for values in zip(*found, strict=True))
        tried.append(Tried(s, score, cost, tuple(shares.mean(0).tolist())))
    return tried[1:], tried[0], torch.cat(keys), members


def _head(line: Line, source: Source, stream: Iterator[Batch], settings: Settings) -> tuple[list[Batch], Tensor]:
    """The first batches, and the scores [n, N] of the rows that settings are proposed from."""
    head: list[Batch] = []
    scores: list[Tensor] = []
    while sum(map(len, scores)) < FIRST_ROWS and (turn := list(islice(stream, processes()[0]))):
        head += turn
        for _, found in shared(turn, lambda batch: line.scores(source.observe(batch, settings)).cpu()):
            if sum(map(len, scores)) < FIRST_ROWS:
                scores.append(found)
    return head, torch.cat(scores)


def _report(
    line: Line,
    settings: Settings,
    tried: tuple[Sequence[Tried], Tried],
    rows: tuple[Tensor, Tensor],
    chosen: Chosen[Tried],
    options: Options,
) -> CalibrationReport:
    full = tried[1]
    value = chosen.value or full
    skips_nothing = chosen.value is None and full.settings == line.neutral(full.settings)
    drop = full.score - value.score
    return CalibrationReport.of(
        options,
        chosen,
        settings=settings.with_values(line.family, value.settings[line.family]),
        safer=[settings.with_values(line.family, t.settings[line.family]) for t in chosen.safer],
        words=line.words,
        kind=line.family if line.family != BRANCHES else "routes",
        drop=drop,
        rows=rows,
        expected_cost=float(value.cost.mean()),
        parts=line.parts(value.settings, None if skips_nothing else value.shares),
        curve=[
            {
                "setting": list(t.settings[line.family]),
                "cost": float(t.cost.mean()),
                "drop": float((full.score - t.score).mean()),
            }
            for t in tried[0]
        ],
    )


def exits_are_set(fast: CompiledModule) -> bool:
    """Whether calibration sets exits: not those that only train what else is decided."""
    return bool(fast.exits) and not (lines_of(fast) and getattr(getattr(fast, "strategy", None), "training_exits", False))


def lines_of(fast: CompiledModule) -> list[Line]:
    """What the module has to set before its exits."""
    lines: tuple[type[Line], ...] = (Gates, Routes, Halting)
    return [line(fast) for line in lines if line.family in fast.settings]
