"""Budgeted batch classification: the thresholds with which a set of rows costs no more than so much on average.

Two ways to choose them from the validation rows, both with a mean cost there that is at most the budget, ties counted:

* "search": the most accurate vector. The Pareto front of `calibration/search.py` with the signed loss (full score less
  early score), then every exit's threshold in turn solved exactly within what is left of the budget, until none moves;
  from there branch and bound over all exits at once (`calibration/proof.py`). Where that ends within its boxes, the vector
  is proved to be the best of all; else its distance from the best is at most the gap that is reported. Criteria with state
  (patience) have no proof: their confidences depend on which exits are open.
* "quota" (MSDNet, Huang et al. 2018, section 4): a share of the rows leaves at each exit, in a geometric series over the
  exits; its ratio is the largest that the budget pays for, and each exit takes its quota of the surest rows left. Quotas are
  cumulative, rounded to rows. Without ties just so many rows leave, so the mean cost falls with the ratio, and bisection
  finds the largest one (to 1e-13 of its logarithm). With ties more may leave than the quota says; the budget is still kept.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from eecompile.calibration.evidence import Evidence, pattern
from eecompile.calibration.options import MOST_SEARCH_ROWS
from eecompile.calibration.proof import Prover
from eecompile.calibration.search import Search, candidates
from eecompile.errors import CalibrationError
from eecompile.ir.settings import CLOSED

METHODS = ("search", "quota")
BISECTIONS = 50
STEEPEST = 12.0  # of the quota's ratio, as a natural logarithm: beyond it all rows leave at one exit
STARTS = 4
FILLS = 8


class Solver:
    """Thresholds for any budget, from one evidence.

    Args:
        evidence: Confidences and costs of the calibration rows.
        score: float64 `[n, E + 1]` of leaving at each exit.
    """

    def __init__(self, evidence: Evidence, score: Tensor) -> None:
        loss = score[:, -1:] - score
        self.evidence = Evidence(evidence.confidences, loss, evidence.costs, evidence.recompute, evidence.keep_open)
        self.n, self.e = evidence.rows, evidence.exits
        some = self.evidence
        if self.n > 2 * MOST_SEARCH_ROWS:
            some = self.evidence.part(torch.arange(0, self.n, math.ceil(self.n / MOST_SEARCH_ROWS)))
        all_rows = torch.zeros(self.e)
        most = max(self.evidence.measure(all_rows)[0] / max(self.n, 1), 0.01)
        closed = torch.full((self.e,), CLOSED)
        found = [all_rows, *([] if evidence.keep_open else [closed]), *(v for _, _, v in candidates(some, most))]
        if not evidence.keep_open:
            found += [torch.where(torch.arange(self.e) == k, 0.0, closed) for k in range(self.e)]
        self.found = [(*self.evidence.measure(v), v) for v in found if not evidence.keep_open or all(pattern(v))]
        self.least = min(cost for _, cost, _ in self.found)
        self.gap: float | None = None  # mean score by which any thresholds could be better at most; None: not known

    def solve(self, budget: float, method: str, boxes: int = 0) -> tuple[Tensor, float | None]:
        """Thresholds `[E]` with a mean cost of at most `budget`, and the quota's ratio.

        Args:
            boxes: How many boxes of thresholds the branch and bound of "search" may look at; `gap` says what it proved.

        Raises:
            CalibrationError: Nothing is as cheap as that.
        """
        if self.least > budget + 1e-9:
            raise CalibrationError(
                "the budget does not pay for the cheapest answers there are",
                got=f"{budget:g}",
                wanted=f"at least {self.least:.4g} of the full model's cost",
                hint="put an exit nearer to the input",
            )
        self.gap = None
        if method == "quota":
            return self.quota(budget)
        fits = sorted((m for m in self.found if m[1] <= budget + 1e-9), key=lambda m: (m[0], m[1]))
        starts = [v for _, _, v in fits[:STARTS]]
        best = starts[0]
        if self.evidence.recompute is None:
            with contextlib.suppress(CalibrationError):  # the quota's exits may be dearer than the least
                starts.append(self.quota(budget)[0])
            search = Search(self.evidence)
            filled = [self.fill(search, v, budget) for v in starts]
            best = min(filled, key=lambda v: self.evidence.measure(v))
            if boxes:
                proof = Prover(self.evidence, budget).prove(best, boxes)
                best, self.gap = proof.thresholds, 0.0 if proof.exact else (proof.loss - proof.bound) / max(self.n, 1)
        return best, None

    def fill(self, search: Search, thresholds: Tensor, budget: float) -> Tensor:
        """Exit by exit, the threshold with the smallest loss that the budget allows; until none moves."""
        best = self.evidence.measure(thresholds)
        for _ in range(FILLS):
            before = best
            for k in range(self.e):
                new = self.step(search, thresholds, k, budget)
                measured = self.evidence.measure(new)
                if measured[1] <= budget + 1e-9 and measured < best:
                    thresholds, best = new, measured
            if best == before:
                break
        return thresholds

    def step(self, search: Search, thresholds: Tensor, k: int, budget: float) -> Tensor:
        """Exit k solved exactly with the other thresholds fixed: every prefix of its rows by confidence is looked at."""
        is_open = list(pattern(thresholds))
        is_open[k] = True
        costs = self.evidence.costs(tuple(is_open))
        without = thresholds.clone()
        without[k] = CLOSED
        after = self.evidence.leave(without)  # where each row goes if none leaves at exit k
        here = (after > k).double()
        gain = (costs[k] - costs[after]) * here
        more = (search.loss[k] - search.loss.gather(0, after[None])[0]) * here
        order = search.order[k]
        cost = costs[after].sum() + gain[order].cumsum(0)
        loss = more[order].cumsum(0)
        usable = search.ends[k] & (cost <= budget * self.n + 1e-9)
        if search.forced[k]:
            usable[: search.forced[k] - 1] = False
        if not bool(usable.any()):
            return thresholds
        position = int(loss.masked_fill(~usable, math.inf).argmin())
        new = thresholds.clone()
        new[k] = search.threshold(k, position)
        closed = thresholds.clone()
        closed[k] = search.never
        if search.forced[k] or float(loss[position]) < 0:
            return new
        return min((new, closed), key=self.evidence.measure)

    def quota(self, budget: float) -> tuple[Tensor, float]:
        """The geometric quota with the largest ratio that the budget pays for."""
        low, high = -STEEPEST, STEEPEST
        chosen = self.by_ratio(low)
        if self.evidence.measure(chosen)[1] > budget + 1e-9:
            raise CalibrationError(
                "the budget does not pay for the cheapest quota",
                got=f"{budget:g}",
                wanted=f"at least {self.evidence.measure(chosen)[1]:.4g} of the full model's cost",
                hint='use method="search", or put an exit nearer to the input',
            )
        at = low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self.by_ratio(middle)
            if self.evidence.measure(found)[1] <= budget + 1e-9:
                low, chosen, at = middle, found, middle
            else:
                high = middle
        return chosen, math.exp(at)

    def by_ratio(self, log_ratio: float) -> Tensor:
        """Thresholds with which a share in proportion to ratio^k leaves at exit k, of the surest rows that are left; those
        that ties let leave early count for the next exit."""
        logs = torch.arange(self.e + 1, dtype=torch.float64) * log_ratio
        wanted = torch.softmax(logs, 0).cumsum(0).mul(self.n).round().long().tolist()  # by each exit
        left = torch.ones(self.n, dtype=torch.bool)
        found = torch.full((self.e,), self.evidence.never)
        confidences = self.evidence.of((True,) * self.e)
        for k in range(self.e):
            mine = confidences[left, k].sort(descending=True).values
            mine = mine[mine >= 0]
            count = min(wanted[k] - (self.n - int(left.sum())), len(mine))
            if count > 0:
                found[k] = mine[count - 1].clamp(max=1.0)
            left &= ~((confidences[:, k] >= found[k]) & (found[k] <= 1))
        return found
