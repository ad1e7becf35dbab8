"""Threshold vectors on the front of loss against cost. Deterministic; E up to dozens, n in the ten thousands.

For a price `lam` per unit of loss, `sum cost + lam * sum loss` is minimised by coordinate descent. One
coordinate is solved exactly: with the other thresholds fixed, each row that reaches exit k either leaves
there or goes on to a known end, so with the rows sorted by confidence the best threshold is the smallest
prefix sum of the differences, over the ends of groups of equal confidence (ties leave together, as
`confidence >= threshold` makes them). Opening an exit also charges its head to all rows that pass it, so
"closed" is compared as a case of its own.

Prices from high to low, warm-started both ways and from "all closed", then the slopes across the widest gaps,
give the convex hull of the front. Between its points lie further ones: budgets that the hull leaves unused
are filled by the same coordinate step with the loss as a constraint, and neighbours are interpolated in
ranks. Every candidate is then measured, and the Pareto front kept.

With criteria that have state (patience) a confidence depends on which exits before are open, so there the
candidates are patterns of open exits, each with one threshold for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import TypeAlias

import torch
from torch import Tensor

from eecompile.calibration.evidence import Evidence, pattern
from eecompile.ir.settings import CLOSED

PRICES = 16
REFINEMENTS = 40
BUDGETS = 24
SWEEPS = 6
ALL_PATTERNS_UP_TO = 8

Point: TypeAlias = tuple[float, float, Tensor]


class Search:
    """Coordinate descent over the thresholds of one evidence without state.

    Args:
        evidence: Of the rows to search on.
        late: Whether time has run out: then what was found so far is given.
    """

    def __init__(self, evidence: Evidence, late: Callable[[], bool] = lambda: False) -> None:
        self.evidence, self.late = evidence, late
        self.n, self.e = evidence.rows, evidence.exits
        values, order = evidence.confidences.sort(dim=0, descending=True, stable=True)
        self.values, self.order = values.T.contiguous(), order.T.contiguous()
        last = torch.ones(1, self.e, dtype=torch.bool)
        ends = torch.cat((values[1:] != values[:-1], last)) & (values >= 0)
        self.ends = ends.T.contiguous()
        self.loss = evidence.loss.T.contiguous()
        self.columns = evidence.confidences.T.contiguous()
        self.never = evidence.never
        self.closed = torch.full((self.e,), self.never)
        # with exits that stay open, rows with a confidence of 1 leave whatever the threshold
        self.forced = (self.values >= 1).sum(1).tolist() if evidence.keep_open else [0] * self.e
        self.measured: dict[tuple[float, ...], tuple[float, float]] = {}

    def threshold(self, k: int, position: int) -> float:
        """A float32 threshold with which exactly the rows up to `position` leave: between it and the next."""
        above = self.values[k, position]
        if position + 1 == self.n:
            return float(above)
        below = self.values[k, position + 1].clamp(min=0)
        middle = (above + below) / 2
        return float(middle if middle > below else above)

    def at_rank(self, k: int, rank: int) -> float:
        """The threshold of exit k that `rank` rows reach (more with ties); closed for 0."""
        if rank <= 0 or self.values[k, rank - 1] < 0:
            return self.never
        position = rank - 1
        while not self.ends[k, position]:
            position += 1
        return self.threshold(k, position)

    def sweep(self, thresholds: Tensor, price: float | None, budget: float = math.inf) -> Tensor:
        """One step for every exit, last to first.

        With a `price` the sum of cost and priced loss falls or stays; without, the cost, while the sum of the
        losses stays within `budget`.
        """
        new = thresholds.clone()
        leaves = (self.columns >= new[:, None]) & (new <= 1)[:, None]
        before = [torch.zeros(self.n, dtype=torch.bool)]
        for k in range(self.e - 1):
            before.append(before[-1] | leaves[k])
        takes = torch.full((self.n,), self.e)
        pays = self.loss[self.e].clone()
        early = torch.zeros((), dtype=torch.float64)
        if price is None:
            early = self._early(leaves)
        for k in reversed(range(self.e)):
            is_open = list(pattern(new))
            is_open[k] = True
            with_k = self.evidence.costs(tuple(is_open))
            is_open[k] = self.evidence.keep_open
            without = self.evidence.costs(tuple(is_open))
            reach = ~before[k]
            cost_on, here = with_k[takes], reach.double()
            opening = float(here @ (cost_on - without[takes]))  # its head, for those that go on
            base = float(here @ pays)
            gain = (with_k[k] - cost_on) * here
            more = (self.loss[k] - pays) * here
            if price is None:
                value = gain[self.order[k]].cumsum(0)
                total = more[self.order[k]].cumsum(0)
                usable = self.ends[k] & (total <= budget + 1e-9 - float(early[k]) - base)
                feasible = float(early[k]) + base <= budget + 1e-9
            else:
                value = gain.add_(more, alpha=price)[self.order[k]].cumsum(0)
                usable, feasible = self.ends[k], True
            value = value.masked_fill_(~usable, math.inf)
            if self.forced[k]:
                value[: self.forced[k] - 1] = math.inf
            best = int(value.argmin())
            least = float(value[best]) + opening
            if self.forced[k] and not math.isfinite(least):
                best, least = self.forced[k] - 1, -math.inf
            if self.forced[k] or least < -1e-9 or (not feasible and math.isfinite(least)):
                new[k] = self.threshold(k, best)
                out = self.columns[k] >= new[k]
                takes = torch.where(out, k, takes)
                pays = torch.where(out, self.loss[k], pays)
            else:
                new[k] = self.never
        return new

    def _early(self, leaves: Tensor) -> Tensor:
        """`[E]`: sum of the losses of rows that leave before exit k."""
        gone = torch.zeros(self.n, dtype=torch.bool)
        sums = []
        total = torch.zeros((), dtype=torch.float64)
        for k in range(self.e):
            sums.append(total)
            total = total + self.loss[k][leaves[k] & ~gone].sum()
            gone |= leaves[k]
        return torch.stack(sums)

    def descend(self, thresholds: Tensor, price: float | None, budget: float = math.inf) -> Tensor:
        for _ in range(SWEEPS):
            if self.late() or torch.equal(new := self.sweep(thresholds, price, budget), thresholds):
                break
            thresholds = new
        return thresholds

    def ranks(self, thresholds: Tensor) -> list[int]:
        reach = torch.searchsorted(-self.values, -thresholds[:, None], right=True)[:, 0].tolist()
        return [int(r) if t <= 1 else 0 for r, t in zip(reach, thresholds.tolist(), strict=True)]

    def between(self, a: Tensor, b: Tensor, share: float) -> Tensor:
        """The vector that lies `share` of the way from a to b in ranks."""
        pairs = zip(self.ranks(a), self.ranks(b), strict=True)
        ranks = [round(x + share * (y - x)) for x, y in pairs]
        return torch.tensor([self.at_rank(k, rank) for k, rank in enumerate(ranks)], dtype=torch.float32)

    def even(self, most: float) -> list[Tensor]:
        """Vectors whose mean loss among the rows that leave at or before each exit is about the same share of `most`."""
        found = []
        for share in (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0):
            at, left = self.closed.clone(), torch.ones(self.n, dtype=torch.bool)
            gone, lost = 0, 0.0
            for k in range(self.e):
                order = self.order[k][left[self.order[k]]]
                values = self.columns[k][order]
                count = gone + torch.arange(1, len(order) + 1)
                mean = (lost + self.loss[k][order].cumsum(0)) / count
                usable = (mean <= share * most + 1e-12) & (values >= 0)
                usable[:-1] &= values[1:] != values[:-1]
                if not bool(usable.any()):
                    continue
                position = int(usable.nonzero()[-1])
                at[k] = values[position]
                left &= self.columns[k] < at[k]
                gone, lost = int(count[position]), float(mean[position] * count[position])
            found.append(at)
        return found

    def cheapest(self, budget: float) -> Tensor:
        """The cheapest vector of a few descents whose losses sum up to at most `budget`."""
        found = [self.closed]
        for price in torch.logspace(math.log10(max(2.0 * self.n, 10.0)), -1, PRICES // 2, dtype=torch.float64).tolist():
            found.append(self.descend(found[-1], price))
        kept = [v for v in found if self.measure(v)[0] <= budget + 1e-9]
        return self.descend(min(kept, key=lambda v: self.measure(v)[1], default=self.closed), None, budget)

    def candidates(self, most: float) -> list[Tensor]:
        """Vectors around the front, up to a mean loss of about `most`."""
        closed = self.closed
        all_rows = torch.tensor([self.at_rank(k, self.n) for k in range(self.e)])
        prices = torch.logspace(math.log10(max(2.0 * self.n, 10.0)), -1, PRICES, dtype=torch.float64).tolist()
        found: list[Tensor] = []
        used = []
        at = closed
        for price in prices:
            used.append(price)
            at = self.descend(at, price)
            found += [at, self.descend(closed, price)]
            if self.measure(at)[0] > 2 * most * self.n:
                break
        at = all_rows
        for price in reversed(used):
            at = self.descend(at, price)
            found.append(at)
        # one rank for all exits, and one threshold for all
        pooled = self.values.flatten().sort(descending=True).values
        for quantile in torch.linspace(0.02, 1, 40).tolist():
            rank = math.ceil(quantile * self.n)
            found.append(torch.tensor([self.at_rank(k, rank) for k in range(self.e)]))
            shared = float(pooled[math.ceil(quantile * len(pooled)) - 1])
            if shared >= 0:
                found.append(torch.full((self.e,), shared))
        hull = self.front(found)
        found += self.refine(hull, most)
        hull = self.front(found)
        for budget in sorted({*range(4), *(most * self.n * i / BUDGETS for i in range(BUDGETS + 1))}):
            starts = [vector for total, _, vector in hull if total <= budget + 1e-9]
            found.append(self.descend(starts[-1] if starts else closed, None, budget))
        hull = self.front(found)
        gap = most * self.n / BUDGETS / 4
        for (low, _, a), (high, _, b) in pairwise(hull):
            if self.late():
                break
            steps = min(8, max(2, math.ceil((high - low) / gap))) if gap > 0 and low <= most * self.n else 2
            found += [self.between(a, b, i / steps) for i in range(1, steps)]
        return found

    def refine(self, hull: list[Point], most: float) -> list[Tensor]:
        """Further vectors in the widest gaps: the price is the slope between the two neighbours of a gap."""
        found = [vector for _, _, vector in hull]
        tried: set[tuple[float, float]] = set()
        least = most * self.n / BUDGETS
        for _ in range(REFINEMENTS):
            gaps = [
                (high[0] - low[0], low, high)
                for low, high in pairwise(lower_hull(self.front(found)))
                if low[0] <= most * self.n and (low[0], high[0]) not in tried
            ]
            if not gaps or self.late():
                break
            width, low, high = max(gaps, key=lambda gap: gap[0])
            if width <= max(least, 1.0):
                break
            tried.add((low[0], high[0]))
            price = self.n * (low[1] - high[1]) / width
            found += [
                self.descend(low[2], price),
                self.descend(high[2], price),
                self.descend(self.closed, price),
            ]
        return found

    def measure(self, thresholds: Tensor) -> tuple[float, float]:
        key = tuple(thresholds.tolist())
        if key not in self.measured:
            self.measured[key] = self.evidence.measure(thresholds)
        return self.measured[key]

    def front(self, found: list[Tensor]) -> list[Point]:
        return front(self.measure, found)


def front(measure: Callable[[Tensor], tuple[float, float]], found: list[Tensor]) -> list[Point]:
    """Pareto front, by growing loss: (sum of losses, mean cost, thresholds), each cheaper than the one
    before."""
    unique = {tuple(vector.tolist()): vector for vector in found}
    measured = sorted(((*measure(vector), key) for key, vector in unique.items()), key=lambda m: (m[0], m[1], m[2]))
    kept: list[Point] = []
    for total, cost, key in measured:
        if not kept or cost < kept[-1][1] - 1e-12:
            kept.append((total, cost, unique[key]))
    return kept


def patterns(e: int) -> list[tuple[bool, ...]]:
    """Which exits to open, for criteria with state: all subsets of few exits, else regular ones."""
    if e <= ALL_PATTERNS_UP_TO:
        return [p for p in product((False, True), repeat=e) if any(p)]
    found = {tuple(k >= first and (k - first) % step == 0 and k <= last for k in range(e))
             for first in range(e) for step in (1, 2, 3, 4) for last in range(first, e)}  # fmt: skip
    return sorted(found)


def stateful_candidates(evidence: Evidence) -> list[Tensor]:
    """Every pattern with every value that the confidence takes as the common threshold (multiples of
    1/patience)."""
    found = []
    for is_open in [(True,) * evidence.exits] if evidence.keep_open else patterns(evidence.exits):
        values = torch.unique(evidence.of(is_open)[:, list(is_open)])
        steps = values[values > 0]
        if len(steps) > 32:
            steps = steps[torch.linspace(0, len(steps) - 1, 32).long()]
        chosen = torch.tensor(is_open)
        found += [torch.where(chosen, step, torch.tensor(CLOSED)) for step in steps]
    return found


def lower_hull(points: list[Point]) -> list[Point]:
    """The convex lower hull of a front, by growing loss."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return hull


def candidates(evidence: Evidence, most: float, late: Callable[[], bool] = lambda: False) -> list[Point]:
    """The Pareto front of everything tried, until it is `late`: (sum of losses, mean cost, thresholds) by growing loss."""
    closed = torch.full((evidence.exits,), CLOSED)
    if evidence.rows == 0 or evidence.exits == 0:
        return [(0.0, 1.0, closed)]
    if evidence.recompute is not None:
        return front(evidence.measure, [closed, *stateful_candidates(evidence)])
    search = Search(evidence, late)
    return search.front([closed, *search.candidates(most)])
