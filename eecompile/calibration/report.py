"""What `calibrate` found, and what it promises, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.calibration.baselines import Baseline
from eecompile.calibration.choose import Chosen
from eecompile.calibration.collect import Members
from eecompile.calibration.options import FIRST_START, Options
from eecompile.calibration.risk import rows_needed
from eecompile.ir.settings import Settings
from eecompile.training.report import Report, json_safe, number, percent, stacked, table
from eecompile.training.subgroups import SHOWN, GroupRow, below_constant, group_rows, group_tables, harmed


class Part:
    """One thing that was set."""

    def cells(self) -> dict[str, str]:
        """Its row of the table, by column."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json_safe(vars(self))
        return found


@dataclass
class CalibratedExit(Part):
    """One exit, or the model's own end.

    Attributes:
        threshold: None for the model's own end; 2.0 for a closed exit.
        temperature: What logits are divided by before the confidence.
        share: Share of all calibration rows that leave there.
        cost: Of a row that leaves there, as a fraction of the full model's FLOPs.
        nll_before: Negative log likelihood at the old temperature, in nats; None where it was not fitted.
        nll_after: At the new one.
        gap: Drop among the rows that leave there or before; None where none does.
        auroc: How well the confidence separates rows that the full model has right and this exit wrong: the probability that
            such a row is less sure than another. None where there is none.
    """

    name: str
    threshold: float | None
    temperature: float
    share: float
    cost: float
    nll_before: float | None = None
    nll_after: float | None = None
    gap: float | None = None
    auroc: float | None = None

    @property
    def is_open(self) -> bool:
        return self.threshold is None or self.threshold <= 1

    def cells(self) -> dict[str, str]:
        threshold = "-" if self.threshold is None else number(self.threshold, 6) if self.is_open else "closed"
        return {
            "exit": self.name,
            "threshold": threshold,
            "temperature": number(self.temperature),
            "rows": percent(self.share, 1),
            "cost": percent(self.cost, 1),
            "drop up to here": percent(self.gap),
            "AUROC": number(self.auroc, 3),
        }

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "open": self.is_open}


@dataclass
class CalibratedGate(Part):
    """One gate.

    Attributes:
        region: What it may skip.
        threshold: Score from which it opens; 0 is always open.
        open: Share of the calibration rows that it lets in.
        saves: What it saves when closed, as a fraction of the full model's FLOPs.
    """

    name: str
    region: str
    threshold: float
    open: float
    saves: float

    def cells(self) -> dict[str, str]:
        return {
            "gate": self.name,
            "region": self.region,
            "threshold": "always open" if self.threshold == 0 else number(self.threshold),
            "open for": percent(self.open, 1),
            "saves when closed": percent(self.saves),
        }


@dataclass
class CalibratedRoute(Part):
    """One route of a router between branches.

    Attributes:
        margin: What its probability is lowered by before the largest is taken; above 1 it is closed.
        share: Share of the calibration rows that take it.
        cost: Of a row that takes it, as a fraction of the full model's FLOPs.
    """

    name: str
    margin: float
    share: float
    cost: float

    def cells(self) -> dict[str, str]:
        return {
            "route": self.name,
            "margin": "closed" if self.margin > 1 else number(self.margin),
            "rows": percent(self.share, 1),
            "cost": percent(self.cost, 1),
        }


@dataclass
class CalibratedHalt(Part):
    """The chains that rows halt in; they share one threshold.

    Attributes:
        threshold: What scores must add up to; above 1 no row halts.
        steps: Mean steps of the calibration rows; None where nothing qualified.
        most: Steps of a row that never halts.
    """

    name: str
    threshold: float
    steps: float | None
    most: int

    def cells(self) -> dict[str, str]:
        return {
            "chain": self.name,
            "threshold": "never halts" if self.threshold > 1 else number(self.threshold),
            "mean steps": number(self.steps, 3),
            "most": str(self.most),
        }


def loses(drop: float) -> str:
    return f"loses {percent(drop)}" if drop >= 0 else f"gains {percent(-drop)}"


class Subgroups:
    """Classes and groups of the calibration rows."""

    def __init__(self, members: Members, options: Options) -> None:
        self.classes, self.groups, self.max_drop = members.classes(), members.by_group(), options.max_drop
        self.controlled: list[Tensor] = []
        if options.control_groups and self.groups is not None:
            names, of = self.groups
            self.controlled = [of == k for k in range(len(names))]

    def too_small(self, rows: Tensor, delta: float | None) -> str:
        """Which controlled groups have too few of these rows of the test to show anything; empty where none has."""
        least = None if delta is None else rows_needed(self.max_drop, FIRST_START * delta)
        if not self.controlled or self.groups is None or least is None:
            return ""
        names, of = self.groups
        counts = torch.bincount(of[rows], minlength=len(names)).tolist()
        small = [f"{name} has {n}" for n, name in sorted(zip(counts, names, strict=True)) if n < least]
        more = f", and {len(small) - SHOWN} more groups have too few" if len(small) > SHOWN else ""
        listed = ", ".join(small[:SHOWN]) + more
        return f"Each group needs at least {least} of the {len(rows)} rows of the test: group {listed}." if small else ""

    def harm(self, early: Tensor, full: Tensor) -> str:
        """Which class loses more of its recall than `max_drop`, by more than chance; empty where none does."""
        rows = [] if self.classes is None else group_rows(*self.classes, early, full)
        worst = next(iter(harmed(rows, self.max_drop)), None)
        if worst is None:
            return ""
        return f"recall of class {worst.name} from {percent(worst.full_score, 1)} to {percent(worst.score, 1)}"


@dataclass(frozen=True)
class Words:
    """How a report speaks of what was set.

    Attributes:
        what: What may qualify, as in "No thresholds qualify".
        against: What early answers are compared with.
        otherwise: What holds where nothing qualifies.
    """

    title: str
    what: str
    against: str
    otherwise: str


WORTH_TRYING = 0.01  # of the full model's cost
EXIT_WORDS = Words("Calibration", "thresholds", "the full model", "all exits are closed")


@dataclass
class CalibrationReport(Report):
    """Settings that were found, and how sure the bound is.

    Attributes:
        settings: Of the whole program; `fast.calibrate` sets them.
        safer: Settings that satisfy the same bound and save less, the next one first.
        kind: What was set: "exits", "gates", "routes" or "halting".
        parts: Each of them; also under the name of its kind, as in `report.exits`.
        qualified: Whether anything satisfies the bound. If not, nothing is left early or skipped.
        target: "accuracy", "agreement" or "metric".
        rows: Calibration rows used; `search_rows` of them to find candidates, `test_rows` to test them.
        skipped_rows: Rows without a label, left out.
        rows_needed: Fewest calibration rows with which anything could qualify; None for `delta=None` or max_drop 0.
        expected_cost: Mean fraction of the full model's FLOPs on all rows.
        drop_search: Drop itself (full model's mean score less that with early exit) on the rows of the search.
        drop_test: On the rows of the test.
        p_value: Of "the mean drop is above max_drop", on the rows of the test; `smallest_p` is the least of all tested.
        level: Level that it was tested at, at most `delta`.
        tested: Settings in the path; `accepted` of them qualified.
        curve: Every setting of gates, routes or halting that was run: setting, mean cost, drop.
        budget: The mean cost that was asked for instead of a drop; None without.
        disagreement: Share of the rows whose early class is another than the full model's; None where there are no classes.
        passed_over: Cheaper settings that qualified, but take more than max_drop of a class's recall, by more than chance.
        rows_for_next: Calibration rows with which the next cheaper setting is expected to qualify; None where none is.
        cost_with_more: Cost that 1,000 more calibration rows are expected to allow.
        impossible: Why nothing could qualify, whatever was tested; empty without a reason.
        by_criterion: Mean cost of each criterion at a drop of `max_drop` on the rows of the search, the present one first:
            what to try next, no promise. Empty where it is not known.
        conditional: Whether the bound holds among the rows that leave at or before each exit too.
        by_class: Recall of every class of labels, the largest drop first.
        by_group: Drop of every group of `groups=`; with `groups_controlled` the bound holds in each.
        baselines: Simpler choices of the same cost.
        before: What was found first for gates, routes and halting, where there are exits too.
    """

    settings: Settings
    words: Words
    kind: str
    parts: list[Any]
    qualified: bool
    target: str
    max_drop: float
    delta: float | None
    seed: int
    rows: int
    search_rows: int
    test_rows: int
    skipped_rows: int
    rows_needed: int | None
    expected_cost: float
    drop_search: float
    drop_test: float | None
    drop: float
    p_value: float | None
    smallest_p: float | None
    level: float | None
    tested: int
    accepted: int
    notes: list[str] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    budget: float | None = None
    disagreement: float | None = None
    safer: list[Settings] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()
    rows_for_next: int | None = None
    cost_with_more: float | None = None
    impossible: str = ""
    by_criterion: dict[str, float] = field(default_factory=dict)
    conditional: bool = False
    by_class: list[GroupRow] = field(default_factory=list)
    by_group: list[GroupRow] = field(default_factory=list)
    groups_controlled: bool = False
    baselines: list[Baseline] = field(default_factory=list)
    before: list[CalibrationReport] = field(default_factory=list)

    ROWS: ClassVar[tuple[str, ...]] = ("by_class", "by_group", "baselines")
    HIDDEN: ClassVar[tuple[str, ...]] = ("settings", "words", "parts", "before", "safer", *ROWS)

    @classmethod
    def of(
        cls,
        options: Options,
        chosen: Chosen[Any],
        *,
        drop: Tensor,
        rows: tuple[Tensor, Tensor],
        skipped_rows: int = 0,
        **found: Any,
    ) -> CalibrationReport:
        """From what was chosen.

        Args:
            drop: float64 [n], full score less early score of every row.
            rows: Rows of the search and of the test.
            found: Further attributes.
        """
        first, second = rows
        return cls(
            qualified=chosen.value is not None,
            target=options.score,
            max_drop=options.max_drop,
            delta=options.delta,
            seed=options.seed,
            rows=len(drop),
            search_rows=len(first),
            test_rows=len(second),
            skipped_rows=skipped_rows,
            rows_needed=options.rows_needed,
            drop_search=float(drop[first].mean()),
            drop_test=float(drop[second].mean()) if len(second) else None,
            drop=float(drop.mean()),
            p_value=chosen.p_value,
            smallest_p=chosen.smallest,
            level=chosen.level,
            tested=chosen.tested,
            accepted=chosen.accepted,
            passed_over=chosen.passed_over,
            rows_for_next=chosen.rows_for_next,
            cost_with_more=chosen.cost_with_more,
            impossible=chosen.impossible,
            conditional=options.conditional,
            groups_controlled=options.control_groups,
            **found,
        )

    def add_groups(self, groups: Subgroups, early: Tensor, full: Tensor) -> None:
        """Scores float64 [n] of the early answers and of the full model, by class and group."""
        self.by_class = [] if groups.classes is None else group_rows(*groups.classes, early, full)
        self.by_group = [] if groups.groups is None else group_rows(*groups.groups, early, full)

    @property
    def exits(self) -> list[CalibratedExit]:
        return self._parts("exits")

    @property
    def gates(self) -> list[CalibratedGate]:
        return self._parts("gates")

    @property
    def routes(self) -> list[CalibratedRoute]:
        return self._parts("routes")

    @property
    def halting(self) -> list[CalibratedHalt]:
        return self._parts("halting")

    def _parts(self, kind: str) -> list[Any]:
        return self.parts if self.kind == kind else []

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.words.title,
            **{key: json_safe(value) for key, value in vars(self).items() if key not in self.HIDDEN},
            "guarantee": self.guarantee,
            "settings": self.settings.to_dict(),
            **{found.kind: found.to_dict() for found in self.before},
            self.kind: [part.to_dict() for part in self.parts],
            **{name: [json_safe(vars(row)) for row in getattr(self, name)] for name in self.ROWS},
        }

    def __rich__(self) -> RenderableType:
        cells = [part.cells() for part in self.parts]
        shown = table(self.words.title, list(cells[0]), [list(row.values()) for row in cells])
        drop = f"drop {percent(self.drop_search)} on the rows of the search"
        if self.drop_test is not None:
            drop += f", {percent(self.drop_test)} on those of the test"
        given = ["given these, against the model as it is set; costs of exits count nothing as skipped:"]
        text = f"expected cost {percent(self.expected_cost, 1)} of the full model's FLOPs, {self.rows} rows"
        found = [
            *below_constant(self.by_class),
            *self._not_beaten(),
            *self.before,
            shown,
            *(given if self.before else ()),
            text,
            drop,
            self.guarantee,
        ]
        return stacked(*found, *self._advice(), *group_tables(self.by_class, self.by_group, self.max_drop), *self.notes)

    def _not_beaten(self) -> list[str]:
        """The best of the simpler choices that lose no more than the calibrated program; empty where it beats them all."""
        best = min((b for b in self.baselines if not b.beaten), key=lambda b: b.drop, default=None)
        if best is None:
            return []
        one_exit = best.name == "one exit for all rows" and best.what != self.parts[-1].name
        what = "Choosing an exit for each row" if one_exit or best.name == "random exits" else "Early exit"
        return [
            f"{what} does not pay here: {best.name} ({best.what}) costs {percent(best.cost, 1)} and {loses(best.drop)}, "
            f"the calibrated program costs {percent(self.expected_cost, 1)} and {loses(self.drop)}."
            + (f" {best.what} alone would do." if one_exit else "")
        ]

    def _advice(self) -> list[str]:
        found = []
        if self.baselines and not self._not_beaten():
            others = ", ".join(f"{b.name} ({b.what}) {loses(b.drop)}" for b in self.baselines)
            found.append(f"at that cost or less {others}")
        if self.passed_over:
            found.append(
                f"{len(self.passed_over)} cheaper {self.words.what} qualify, but would harm a class: {self.passed_over[0]}; "
                'groups="classes", control_groups=True bounds the drop of each class'
            )
        if self.cost_with_more is not None and self.cost_with_more < self.expected_cost - 5e-4:
            found.append(f"1,000 more rows are expected to allow a cost of {percent(self.cost_with_more, 1)}")
        if self.rows_for_next is not None and self.rows_for_next > self.rows:
            found.append(f"the next cheaper {self.words.what} are expected to qualify with {self.rows_for_next} rows")
        if self.by_criterion:
            (present, cost), *rest = self.by_criterion.items()
            better, least = min(rest, key=lambda one: one[1])
            if least < cost - WORTH_TRYING:
                found.append(
                    f"criterion={better!r} would cost {percent(least, 1)} where {present!r} costs {percent(cost, 1)}, at a "
                    f"drop of {percent(self.max_drop)} on the rows of the search"
                )
        return found

    @property
    def guarantee(self) -> str:
        """The promise, or why there is none, as a sentence."""
        words, rows = self.words, f"on these {self.rows} rows"
        if self.budget is not None:
            kept = f"the most accurate of {self.accepted} {words.what} with a mean cost of at most {percent(self.budget, 1)}"
            return f"No guarantee: {kept} {rows}, of {self.tested} that were tried."
        loss = self._loss()
        if self.delta is None:
            if self.qualified:
                return f"No guarantee was asked for: {rows} {loss}."
            return f"No {words.what} save anything while {loss} {rows}; {words.otherwise}."
        where = " among the rows that exit at or before each exit, and overall," if self.conditional else ""
        where += " in each group, and overall," if self.groups_controlled else ""
        if self.qualified:
            return (
                f"With probability at least {100 * (1 - self.delta):g}% over the calibration data, {loss}{where} on inputs "
                f"drawn like it (Learn then Test on {self.test_rows} rows, p = {self.p_value:.2g} at level "
                f"{self.level:.2g})."
            )
        none = f"No {words.what} qualify for max_drop={self.max_drop:g}, delta={self.delta:g}; {words.otherwise}."
        if self.rows_needed is None:
            return f"{none} No number of rows can show a drop of 0: pass max_drop above 0, or delta=None."
        if self.rows < self.rows_needed:
            return (
                f"{none} {self.rows} rows are too few to show it even without a single error: at least "
                f"{self.rows_needed} are needed, more where early answers are sometimes wrong."
            )
        if self.impossible:
            return f"{none} {self.impossible} Calibrate on more rows, or on fewer groups."
        p = "" if self.smallest_p is None else f" (smallest p = {self.smallest_p:.2g})"
        return (
            f"{none} On the {self.test_rows} rows of the test the safest of {self.tested} candidates lost too much or "
            f"saved nothing{p}. Train longer, allow a larger max_drop, or calibrate on more rows."
        )

    def _loss(self) -> str:
        """What is bounded."""
        drop = f"{100 * self.max_drop:g}%"
        against = "the model as it is set before its exits" if self.before else self.words.against
        of = "" if self.kind == "exits" else "the model with "
        return {
            "accuracy": f"accuracy drops by at most {drop} against {of}{against}",
            "agreement": f"at most {drop} of the answers differ from those of {of}{against}",
            "metric": f"the mean metric drops by at most {self.max_drop:g} against {of}{against}",
        }[self.target]


def calibrated_exits(
    names: Sequence[str],
    settings: tuple[Sequence[float], Sequence[float]],
    index: Tensor,
    costs: Tensor,
    nll: Sequence[tuple[float | None, float | None]],
) -> list[CalibratedExit]:
    """One for each exit and, last, the model's own end.

    Args:
        settings: Thresholds [E] and temperatures [E + 1].
        index: int64 [n], where the rows leave.
        costs: [E + 1].
    """
    thresholds: list[float | None] = [*settings[0], None]
    shares = [float((index == k).double().mean()) for k in range(len(names))]
    found = zip(names, thresholds, settings[1], shares, costs.tolist(), nll, strict=True)
    return [CalibratedExit(name, t, temperature, s, c, *n) for name, t, temperature, s, c, n in found]
