"""Learn then Test: the cheapest of several settings that provably lose little, whatever it is that they set.

**Search.** On one part of the rows every setting gets its test (`risk.planned`) and the p-value that is to be expected of
it; those that are no cheaper than a safer one are dropped, the others stand in order.

**Test.** On the other part the hypotheses "E[drop] > max_drop" are tested in that order (`risk.fallback`). All rejected ones
satisfy the bound at once with probability 1 - delta over the calibration data, so the cheapest of them may be chosen by
looking at all rows. Where the bound is to hold in parts of the rows too, a setting's p-value is the largest of all parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eecompile.calibration.options import Options, starts
from eecompile.calibration.risk import PlannedTest, fallback, planned

T = TypeVar("T")
MORE_ROWS = 1000


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What was chosen.

    Attributes:
        value: None where nothing qualified that saves anything.
        p_value: Of "the mean drop is above max_drop", tested at `level`; None without a test.
        tested: Settings in the path; `accepted` of them qualified.
        smallest: The smallest p-value of all that were tested.
        safer: Others that qualified and save less, the cheapest first.
        passed_over: Cheaper settings that qualified, but harm a class; why the cheapest did, in words.
        rows_for_next: Calibration rows with which the next cheaper setting is expected to qualify; None where none is.
        cost_with_more: Cost that 1,000 more calibration rows are expected to allow.
        impossible: See `Path`.
    """

    value: T | None
    p_value: float | None
    level: float | None
    tested: int
    accepted: int
    smallest: float | None
    safer: tuple[T, ...] = ()
    passed_over: tuple[str, ...] = ()
    rows_for_next: int | None = None
    cost_with_more: float | None = None
    impossible: str = ""


@dataclass
class Path(Generic[T]):
    """Settings to choose from.

    Attributes:
        drop: Of a setting, float64 [n]: score of the full model less the score under the setting.
        cost: Its mean cost on all rows.
        rows: n.
        full_cost: Mean cost of leaving nothing out.
        binary: Whether scores are 0 or 1.
        subsets: Of a setting, bool [n] each: parts of the rows in which the bound is to hold too.
        harm: Of a setting, why it is not to be taken although it qualifies; empty without a reason.
        impossible: Why nothing can qualify, whatever is tested; empty without a reason.
    """

    drop: Callable[[T], Tensor]
    cost: Callable[[T], float]
    rows: int
    full_cost: float
    binary: bool
    subsets: Callable[[T], Sequence[Tensor]] = lambda _: ()
    harm: Callable[[T], str] = lambda _: ""
    impossible: str = ""
    _costs: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def choose(self, settings: Sequence[T], first: Tensor, second: Tensor, options: Options) -> Chosen[T]:
        """The cheapest setting that keeps the bound: on all rows for `delta=None`, else as shown on the rows of `second`."""
        if options.delta is None:
            most = options.max_drop + 1e-9
            kept = [s for s in settings if all(float(self.drop(s)[rows].mean()) <= most for rows in self._parts(s))]
            return self._cheapest(settings, [(s, None, None) for s in kept], {})
        if self.impossible:
            return Chosen(None, None, None, 0, 0, None, impossible=self.impossible)
        path = self._ordered(settings, first, len(second), options)
        known: dict[int, float] = {}

        def p_value(i: int) -> float:
            setting, tests = path[i]
            drop = self.drop(setting)
            parts = zip(self._parts(setting), tests, strict=True)
            known[i] = max(test.p_value(drop[second[rows[second]]], options.max_drop) for rows, test in parts)
            return known[i]

        accepted = fallback(p_value, len(path), starts(len(path), options.delta))
        chosen = self._cheapest([s for s, _ in path], [(path[i][0], known[i], level) for i, level in accepted], known)
        return self._with_more([s for s, _ in path], chosen, (first, second), options)

    def _cost(self, setting: T) -> float:
        if id(setting) not in self._costs:
            self._costs[id(setting)] = self.cost(setting)
        return self._costs[id(setting)]

    def _parts(self, setting: T) -> list[Tensor]:
        subsets = [s for s in self.subsets(setting) if bool(s.any())]
        return [torch.ones(self.rows, dtype=torch.bool), *subsets]

    def _tests(self, setting: T, rows: Tensor, n: int, options: Options) -> list[PlannedTest]:
        """The test of each part, if `n` rows like `rows` are tested."""
        drop, level = self.drop(setting)[rows], options.delta or 0.05
        doubt, found = max(0.0, 1 - self._cost(setting) / self.full_cost), []
        for part in self._parts(setting):
            mine = part[rows]
            size = round(n * float(mine.double().mean()))
            found.append(planned(drop[mine], size, options.max_drop, level, binary=self.binary, doubt=doubt))
        return found

    def _ordered(self, settings: Sequence[T], rows: Tensor, n: int, options: Options) -> list[tuple[T, list[PlannedTest]]]:
        """The settings that no safer one beats in cost, the safest first."""
        measured = []
        for i, s in enumerate(settings):
            tests = self._tests(s, rows, n, options)
            measured.append((max(test.expected for test in tests), self._cost(s), i, s, tests))
        measured.sort(key=lambda m: m[:3])
        kept, cheapest = [], self.full_cost - 1e-12
        for _, cost, _, s, tests in measured:
            if cost < cheapest:
                kept.append((s, tests))
                cheapest = cost - 1e-12
        return kept

    def _cheapest(
        self, path: Sequence[T], accepted: Sequence[tuple[T, float | None, float | None]], known: dict[int, float]
    ) -> Chosen[T]:
        """The cheapest one that harms no class."""
        counts = len(path), len(accepted), min(known.values(), default=None)
        passed_over: list[str] = []
        costs = [self._cost(s) for s, _, _ in accepted]
        order = sorted(range(len(costs)), key=costs.__getitem__)
        for at, i in enumerate(order):
            if costs[i] >= self.full_cost - 1e-12:
                break
            harm = self.harm(accepted[i][0])
            if not harm:
                safer = tuple(accepted[j][0] for j in order[at + 1 :])
                return Chosen(*accepted[i], *counts, safer, tuple(passed_over))
            passed_over.append(harm)
        return Chosen(None, None, None, *counts, (), tuple(passed_over))

    def _with_more(self, path: Sequence[T], chosen: Chosen[T], rows: tuple[Tensor, Tensor], options: Options) -> Chosen[T]:
        """With what more rows are expected to buy, from the p-values that all rows let expect."""
        every, n = torch.cat(rows), len(rows[1])
        share, level = n / len(every), math.log(options.delta or 1.0)
        cost = self.full_cost if chosen.value is None else self._cost(chosen.value)
        cheaper = sorted((s for s in path if self._cost(s) < cost - 1e-12), key=self.cost, reverse=True)
        best, needed = cost, None
        for s in cheaper:
            test = round(n + MORE_ROWS * share)
            if max(t.expected for t in self._tests(s, every, test, options)) <= level and not self.harm(s):
                best = min(best, self._cost(s))
        if cheaper:
            needed = self._rows_for(cheaper[0], every, share, options)
        return replace(chosen, rows_for_next=needed, cost_with_more=best)

    def _rows_for(self, setting: T, every: Tensor, share: float, options: Options) -> int | None:
        """Calibration rows with which this setting is expected to qualify; None for more than a hundred times as many."""
        level = math.log(options.delta or 1.0)
        rows = len(every)
        while rows <= 100 * len(every):
            if max(t.expected for t in self._tests(setting, every, round(rows * share), options)) <= level:
                return rows
            rows = math.ceil(rows * 1.1)
        return None


def is_binary(scores: Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def split(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the search, those with the smallest keys, and rows of the test, in the order of their keys."""
    order = torch.argsort(keys, stable=True)
    return order[:size], order[size:]
