"""What gates, a router and halting did over an epoch of training: a record of each, from sums over the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.ir.settings import BRANCHES, HALTING
from eecompile.result import Result
from eecompile.training.objectives import Objective, PonderNet, Sum
from eecompile.training.objectives.pondernet import stopping
from eecompile.training.report import number, percent

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

STUCK = 0.01  # share of the rows that are decided otherwise, below which a decision does not depend on the input
SAME = 0.005  # standard deviation over the rows of a probability that no longer depends on the input
WIDE = 6  # a column for each of so many gates
Scores = tuple[Tensor, Tensor]  # [B, E + 1] float64 of every output, and bool [B] of the rows with a label; on the CPU


class Decisions(ABC):
    """What the decisions of one kind did over an epoch.

    Attributes:
        name: Field of `EpochRow`.
        what: Who decides, for a warning; `advice` ends it.
        note: What the columns say.
    """

    name: ClassVar[str]
    what: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    note: ClassVar[str]

    @staticmethod
    @abstractmethod
    def sums(fast: CompiledModule, result: Result, objective: Objective, scores: Scores | None) -> Tensor | None:
        """[N] float64, sums over the rows of a batch; None where nothing of the kind decides."""

    @classmethod
    @abstractmethod
    def of(cls, sums: Sequence[float], rows: int) -> Decisions:
        """From `sums` over so many rows."""

    @classmethod
    @abstractmethod
    def columns(cls, names: Sequence[str], rows: Sequence[Decisions]) -> list[str]:
        """Headings for what has these names; `rows` are those of all epochs."""

    @abstractmethod
    def cells(self, trained: Decisions | None, accuracy: bool) -> list[str]:
        """One for each column at least; `trained` is what was seen in training where this is of the validation data."""

    @property
    def point(self) -> tuple[float | None, float | None]:
        """Mean cost of a row, and mean score of the rows by the decision that they took, where these are known."""
        return None, None

    def collapse(self, names: Sequence[str]) -> str | None:
        """How the decisions have collapsed; None where they still depend on the input."""
        return None

    def warning(self, names: Sequence[str]) -> str | None:
        """A line for the report."""
        lost = self.collapse(names)
        return None if lost is None else f"Warning: {self.what} collapsed: {lost}. {self.advice}"


@dataclass
class GateRow(Decisions):
    """What the gates did over an epoch.

    Attributes:
        cost: Mean fraction of the full model's FLOPs with all exits closed.
        open: Share of the rows that each gate let in, as gates decided in this run.
        decided: Share of the rows whose score reaches the gate's threshold.
    """

    name = "gates"
    what = "the gates"
    advice = "Raise target_cost= or open_bias=, train longer, or lower lr=."
    note = "cost: mean fraction of the full model's FLOPs; of each gate the share of rows that it lets in"

    cost: float
    open: list[float]
    decided: list[float]

    @staticmethod
    def sums(fast: CompiledModule, result: Result, objective: Objective, scores: Scores | None) -> Tensor | None:
        trace = result.trace
        if result.gates is None or trace.gate_scores is None or trace.end_cost is None:
            return None
        threshold = fast.gate_thresholds
        decided = (~(trace.gate_scores.detach().float() < threshold) & (threshold <= 1)).double().sum(0)
        return torch.cat((trace.end_cost.detach().double().sum().reshape(1), result.gates.detach().double().sum(0), decided))

    @classmethod
    def of(cls, sums: Sequence[float], rows: int) -> GateRow:
        cost, *shares = (s / rows for s in sums)
        return cls(cost, shares[: len(shares) // 2], shares[len(shares) // 2 :])

    @classmethod
    def columns(cls, names: Sequence[str], rows: Sequence[Decisions]) -> list[str]:
        return ["cost", *(names if len(names) <= WIDE else ["open gates"])] if names else []

    def cells(self, trained: Decisions | None, accuracy: bool) -> list[str]:
        count = len(self.open)
        shares = self.open if count <= WIDE else [sum(self.open) / count]
        return [percent(self.cost, 1), *(percent(s, 0) for s in shares)]

    @property
    def point(self) -> tuple[float | None, float | None]:
        return self.cost, None

    @property
    def stuck(self) -> dict[int, str]:
        """Gates that open for every row or for none, but for one in a hundred: they do not depend on the input."""
        return {i: "open" if s > 0.5 else "closed" for i, s in enumerate(self.decided) if not STUCK <= s <= 1 - STUCK}

    def collapse(self, names: Sequence[str]) -> str | None:
        ways = list(self.stuck.values())
        if len(ways) < len(self.decided):
            return None
        count = ways.count("open")
        if count in (0, len(ways)):
            return f"all gates are {ways[0]} whatever the input is"
        return f"no gate depends on the input: {count} always open, {len(ways) - count} always closed"

    def warning(self, names: Sequence[str]) -> str | None:
        ways = ", ".join(f"{names[i]} always {way}" for i, way in self.stuck.items())
        return super().warning(names) or (f"Gates that do not depend on the input: {ways}" if ways else None)


@dataclass
class RouteRow(Decisions):
    """What the router did over an epoch.

    Attributes:
        cost: Mean fraction of the full model's FLOPs, with all exits closed where rows go to branches.
        share: Share of the rows that took each route, as decisions were taken in this run.
        accuracy: Mean score of the rows on each route; None where there is none.
        decided: Share of the rows that each route is decided for by the router's probabilities.
        spread: Standard deviation over the rows of each route's probability; None in records from before it was kept.
    """

    name = "routes"
    what = "the router"
    advice = "Lower price= or raise target_cost=, give balance= a weight, train longer, or lower lr=."
    note = "cost: mean fraction of the full model's FLOPs; of each route the rows that took it, and the accuracy there"

    cost: float
    share: list[float]
    accuracy: list[float | None]
    decided: list[float]
    spread: list[float] | None = None

    @staticmethod
    def sums(fast: CompiledModule, result: Result, objective: Objective, scores: Scores | None) -> Tensor | None:
        route, weights, end_cost = result.route, result.trace.route_weights, result.trace.end_cost
        if route is None or weights is None:
            return None
        rows, count = weights.shape
        score, valid = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, 1, dtype=torch.float64)
        if scores is not None:
            # of rows that go to exits the score there, of others the model's own
            at = torch.full((rows, 1), scores[0].shape[1] - 1) if BRANCHES in fast.settings else route.cpu().unsqueeze(1)
            score, valid = scores[0].gather(1, at).squeeze(1), scores[1].double().unsqueeze(1)
        took = F.one_hot(route.cpu().clamp_min(0), count).double() * (route.cpu() >= 0).unsqueeze(1)
        cost = (end_cost if end_cost is not None else fast.route_costs()[route]).detach().double().cpu()
        p = weights.detach().double().cpu()
        sums = [cost.sum().reshape(1), took.sum(0), (took * valid).sum(0), (took * valid * score.unsqueeze(1)).sum(0)]
        return torch.cat([*sums, decided(fast, result).double().cpu(), p.sum(0), p.square().sum(0)])

    @classmethod
    def of(cls, sums: Sequence[float], rows: int) -> RouteRow:
        k = (len(sums) - 1) // 6
        took, labelled, score, decided, p, squares = (sums[1 + i * k : 1 + (i + 1) * k] for i in range(6))
        spread = [max(s / rows - (m / rows) ** 2, 0.0) ** 0.5 for m, s in zip(p, squares, strict=True)]
        accuracy = [s / n if n else None for s, n in zip(score, labelled, strict=True)]
        return cls(sums[0] / rows, [t / rows for t in took], accuracy, [d / rows for d in decided], spread)

    @classmethod
    def columns(cls, names: Sequence[str], rows: Sequence[Decisions]) -> list[str]:
        return ["cost", *(f"to {name}" for name in names)] if names else []

    def cells(self, trained: Decisions | None, accuracy: bool) -> list[str]:
        shown, pairs = percent if accuracy else number, zip(self.share, self.accuracy, strict=True)
        return [percent(self.cost, 1), *(f"{percent(s, 0)} ({shown(a, 1)})" for s, a in pairs)]

    @property
    def point(self) -> tuple[float | None, float | None]:
        known = [(s, a) for s, a in zip(self.share, self.accuracy, strict=True) if a is not None]
        total = sum(s for s, _ in known)
        return self.cost, sum(s * a for s, a in known) / total if total else None

    def collapse(self, names: Sequence[str]) -> str | None:
        """One route for all rows but one in a hundred, or the same probabilities for all rows."""
        there = sum(self.decided)  # rows that had left before have no route
        if there <= 0:
            return None
        for name, share in zip(names, self.decided, strict=True):
            if share >= (1 - STUCK) * there:
                return f"all rows go to {name} whatever the input is"
        if self.spread is not None and max(self.spread) < SAME:
            return f"every row has the same probabilities (their spread is {max(self.spread):.2g} at most)"
        return None


def decided(fast: CompiledModule, result: Result) -> Tensor:
    """[K] rows that each route is decided for by the router's probabilities as they are, whatever training does."""
    weights, route = result.trace.route_weights, result.route
    assert weights is not None and route is not None
    count = weights.shape[1]
    if BRANCHES not in fast.settings:
        return F.one_hot(route, count).sum(0)
    there = (route >= 0).unsqueeze(1)
    return (F.one_hot((weights.detach() - fast.route_margins).argmax(1), count) * there).sum(0)


@dataclass
class HaltRow(Decisions):
    """What halting did over an epoch.

    Attributes:
        steps: Mean steps of a row, over its positions where each halts by itself. While probabilities of stopping are
            trained, and no row stops, the mean of their distribution.
        divergence: Mean KL divergence of that distribution from the objective's prior; None where there is none.
    """

    name = "halts"
    note = "mean steps: of a row; KL: of where rows stop from the prior, while training"

    steps: float
    divergence: float | None = None

    @staticmethod
    def sums(fast: CompiledModule, result: Result, objective: Objective, scores: Scores | None) -> Tensor | None:
        if result.steps is None or HALTING not in fast.settings:
            return None
        if result.trace.step_scores is None:
            return result.steps.double().view(len(result.steps), -1).mean(1).sum().reshape(1)
        log_p = stopping(result.trace.step_scores.detach())
        sums = [(log_p.exp() * torch.arange(1, log_p.shape[1] + 1, device=log_p.device)).sum(1)]
        parts = objective.parts if isinstance(objective, Sum) else (objective,)
        sums += [part.divergence(log_p) for part in parts if isinstance(part, PonderNet)][:1]
        return torch.stack([t.double().sum() for t in sums])

    @classmethod
    def of(cls, sums: Sequence[float], rows: int) -> HaltRow:
        return cls(*(s / rows for s in sums))

    @classmethod
    def columns(cls, names: Sequence[str], rows: Sequence[Decisions]) -> list[str]:
        prior = any(isinstance(r, HaltRow) and r.divergence is not None for r in rows)
        return ["mean steps", *(["KL"] if prior else [])] if rows else []

    def cells(self, trained: Decisions | None, accuracy: bool) -> list[str]:
        divergence = trained.divergence if isinstance(trained, HaltRow) else self.divergence
        return [number(self.steps, 3), number(divergence, 3)]


KINDS: tuple[type[Decisions], ...] = (GateRow, RouteRow, HaltRow)


def rows_of(sums: Mapping[str, Sequence[float]], rows: int) -> dict[str, Decisions]:
    """Records of the kinds that decide, by name."""
    return {kind.name: kind.of(sums[kind.name], rows) for kind in KINDS if rows and kind.name in sums}
