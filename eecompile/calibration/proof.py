"""How far thresholds for a budget are from the best there are: branch and bound over all threshold vectors at once.

Only the confidences of the calibration rows matter as thresholds, so there are finitely many vectors. A box holds, for
each exit, an interval of them. Within a box a row leaves for certain at the first exit whose lowest threshold it reaches in
every vector, and may leave at the exits before that it reaches in some. With a price p >= 0 per unit of cost

    sum over rows of min over those exits of (loss + p * cost)  -  p * budget * rows   <=   sum of losses

for every vector of the box that keeps the budget (Lagrangian relaxation, weak duality): rows choose by themselves, and
heads that may be closed are free. The best price of a few is taken. The box with the smallest bound is split first, at the
median of the rows that are undecided; one with a single undecided exit is solved exactly by prefix sums. A box whose bound
is no better than the best vector known is done. When none is left that vector is proved optimal; until then the smallest
bound says how much better any vector could be at most.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eecompile.calibration.evidence import Evidence

START = torch.logspace(-2, 2, 25, dtype=torch.float64)
AROUND = torch.tensor([0.0, 0.5, 0.8, 1.0, 1.25, 2.0], dtype=torch.float64)
SLACK = 1e-9


@dataclass(frozen=True)
class Proof:
    """Thresholds, and what is known about better ones.

    Attributes:
        thresholds: float32 `[E]`; keep the budget, ties counted.
        loss: Sum of the losses under them.
        bound: No thresholds within the budget have a smaller sum.
        boxes: How many were looked at.
    """

    thresholds: Tensor
    loss: float
    bound: float
    boxes: int

    @property
    def exact(self) -> bool:
        return self.bound >= self.loss - 1e-6


@dataclass(frozen=True)
class _Box:
    """Lowest and highest index of every exit's threshold: a higher index lets more rows leave."""

    lo: tuple[int, ...]
    hi: tuple[int, ...]
    price: float


class Prover:
    """Branch and bound over one evidence without state.

    Args:
        evidence: Confidences, losses and costs of the calibration rows.
        budget: Largest mean cost.
    """

    def __init__(self, evidence: Evidence, budget: float) -> None:
        self.evidence, self.total = evidence, budget * evidence.rows
        self.n, self.e, self.stay = evidence.rows, evidence.exits, evidence.keep_open
        self.values: list[Tensor] = []  # per exit its thresholds, the one that lets fewest rows leave first
        ranks = []
        for k in range(self.e):
            mine = evidence.confidences[:, k]
            usable = torch.unique(mine[(mine >= 0) & (mine < 1 if self.stay else mine <= 1)]).flip(0)
            below = torch.cat((usable[1:], usable[-1:]))
            middle = (usable + below) / 2  # no rounding of a confidence decides
            values = torch.cat((torch.tensor([evidence.never]), torch.where(middle > below, middle, usable)))
            rank = 1 + torch.searchsorted(-usable, -mine)  # the first threshold that the row reaches
            rank[(mine >= 1) & self.stay] = 0
            rank[mine < 0] = len(values)
            self.values.append(values)
            ranks.append(rank)
        self.rank = torch.stack(ranks, 1) if ranks else torch.zeros(self.n, 0, dtype=torch.int64)
        self.whole = bool((evidence.loss == evidence.loss.round()).all())
        self.best: tuple[float, Tensor] | None = None

    def prove(self, thresholds: Tensor, boxes: int) -> Proof:
        """The best vector found from `thresholds` on, which keep the budget, within so many boxes."""
        self.best = (self.evidence.measure(thresholds)[0], thresholds)
        root = _Box((0,) * self.e, tuple(len(v) - 1 for v in self.values), 0.0)
        heap: list[tuple[float, int, _Box]] = []
        count = self._look(root, START, heap, 0)
        while heap and heap[0][0] < self.best[0] - 1e-6 and count < boxes:
            _, _, box = heapq.heappop(heap)
            for half in self._halves(box):
                count = self._look(half, box.price * AROUND, heap, count)
        bound = min([self.best[0], *(b for b, _, _ in heap[:1])])
        return Proof(self.best[1], self.best[0], bound, count)

    def _look(self, box: _Box, prices: Tensor, heap: list[tuple[float, int, _Box]], count: int) -> int:
        """Solves a box, drops it, or puts it on the heap with its bound."""
        assert self.best is not None
        lo, hi = torch.tensor(box.lo), torch.tensor(box.hi)
        certain, possible = self.rank <= lo, self.rank <= hi
        here = torch.ones(self.n, self.e + 1, dtype=torch.bool)  # not certain to have left before
        here[:, 1:] = ~certain.cumsum(1).bool()
        undecided = (possible & ~certain & here[:, :-1]).any(0)
        open_exits = tuple(bool(self.stay or i >= 1) for i in box.lo)
        if int(undecided.sum()) <= 1:
            self._solve(box, int(undecided.long().argmax()) if bool(undecided.any()) else None)
            return count + 1
        allowed = torch.cat((possible & here[:, :-1], here[:, -1:]), 1)
        cost = self.evidence.costs(open_exits)
        if float(torch.where(allowed, cost, math.inf).amin(1).sum()) > self.total + SLACK * self.n:
            return count + 1
        loss = torch.where(allowed, self.evidence.loss, math.inf)
        bounds = torch.stack([(loss + p * cost).amin(1).sum() - p * self.total for p in prices])
        at = int(bounds.argmax())
        bound = float(bounds[at])
        bound = math.ceil(bound - 1e-6) if self.whole else bound
        if bound < self.best[0] - 1e-6:
            heapq.heappush(heap, (bound, count, _Box(box.lo, box.hi, max(float(prices[at]), 1e-3))))
        return count + 1

    def _halves(self, box: _Box) -> list[_Box]:
        """The box split at the exit with the most undecided rows, at the median of their ranks."""
        lo, hi = torch.tensor(box.lo), torch.tensor(box.hi)
        certain = self.rank <= lo
        here = torch.ones(self.n, self.e, dtype=torch.bool)
        here[:, 1:] = ~certain.cumsum(1).bool()[:, :-1]
        open_rows = (self.rank <= hi) & ~certain & here
        k = int(open_rows.sum(0).argmax())
        middle = int(self.rank[open_rows[:, k], k].median())  # above lo, at most hi
        lower, upper = list(box.hi), list(box.lo)
        lower[k], upper[k] = middle - 1, middle
        return [_Box(box.lo, tuple(lower), box.price), _Box(tuple(upper), box.hi, box.price)]

    def _solve(self, box: _Box, k: int | None) -> None:
        """The best vector of a box in which at most exit k is undecided."""
        fixed = torch.stack([v[i] for v, i in zip(self.values, box.lo, strict=True)]) if self.e else torch.zeros(0)
        self._offer(fixed)
        if k is None:
            return
        without = fixed.clone()
        without[k] = 2.0  # no row leaves there
        open_exits = tuple(bool(self.stay or j == k or i >= 1) for j, i in enumerate(box.lo))
        cost = self.evidence.costs(open_exits)
        after = self.evidence.leave(without)
        here = after > k
        loss = self.evidence.loss
        more = torch.where(here, loss[:, k] - loss.gather(1, after[:, None])[:, 0], 0.0)
        gain = torch.where(here, cost[k] - cost[after], 0.0)
        size = len(self.values[k]) + 1
        by_rank = torch.zeros(2, size, dtype=torch.float64)
        by_rank[0].index_add_(0, self.rank[:, k], more)
        by_rank[1].index_add_(0, self.rank[:, k], gain)
        sums = by_rank.cumsum(1)
        spent = float(cost[after].sum()) + sums[1]
        start = float(loss.gather(1, after[:, None]).sum())
        ok = spent <= self.total + SLACK * self.n
        index = torch.arange(size)
        ok &= (index >= max(box.lo[k], 0 if self.stay else 1)) & (index <= box.hi[k])
        if not bool(ok.any()):
            return
        at = int((start + sums[0]).masked_fill(~ok, math.inf).argmin())
        chosen = fixed.clone()
        chosen[k] = self.values[k][at]
        self._offer(chosen)

    def _offer(self, thresholds: Tensor) -> None:
        """Keeps a vector if it is within the budget and better than the best one known."""
        assert self.best is not None
        loss, cost = self.evidence.measure(thresholds)
        if cost <= self.total / max(self.n, 1) + SLACK and loss < self.best[0] - 1e-9:
            self.best = (loss, thresholds)
