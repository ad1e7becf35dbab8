"""Reports: what an operation found, as a dict that JSON takes and as a table for people."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from eecompile.training.halt_report import HaltRow
from eecompile.training.head_report import HeadRow, heads_table
from eecompile.training.route_report import ADVICE as ROUTE_ADVICE
from eecompile.training.route_report import RouteRow, collapsed


class Report(ABC):
    """Base of the reports of fit, evaluate and calibrate."""

    title: ClassVar[str] = ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as dicts, lists, strings, numbers, booleans and None; no NaN, no inf."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=110, force_terminal=False, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def json_safe(value: Any) -> Any:
    """`value` with non-finite floats as None, tuples as lists and keys as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """First column to the left, the others to the right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def stacked(*parts: RenderableType) -> RenderableType:
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


@dataclass
class GateRow:
    """What the gates did over an epoch.

    Attributes:
        cost: Mean fraction of the full model's FLOPs with all exits closed.
        open: Share of the rows that each gate let in, as gates decided in this run.
        decided: Share of the rows whose score reaches the gate's threshold.
    """

    cost: float
    open: list[float]
    decided: list[float]

    @classmethod
    def of(cls, means: list[float] | None) -> GateRow | None:
        """From means `[1 + 2 G]` in this order; None where there are none."""
        if not means:
            return None
        count = (len(means) - 1) // 2
        return cls(means[0], means[1 : 1 + count], means[1 + count :])

    @property
    def stuck(self) -> dict[int, str]:
        """Gates that open for every row or for none, but for one in a hundred: they do not depend on the input."""
        return {i: "open" if s > 0.5 else "closed" for i, s in enumerate(self.decided) if not STUCK <= s <= 1 - STUCK}

    @property
    def collapse(self) -> str | None:
        """How the gates have collapsed; None where one of them at least still depends on the input."""
        ways = list(self.stuck.values())
        if len(ways) < len(self.decided):
            return None
        count = ways.count("open")
        if count in (0, len(ways)):
            return f"all gates are {ways[0]} whatever the input is"
        return f"no gate depends on the input: {count} always open, {len(ways) - count} always closed"


STUCK = 0.01
WIDE = 6  # a column for each of so many gates


@dataclass
class EpochRow:
    """One epoch of training.

    Attributes:
        stage: "heads", "joint" or "trunk", or the name that the strategy gives.
        epoch: From 1, over all stages.
        steps: Optimiser steps since the start.
        loss: Mean training loss of the objective.
        scores: Mean accuracy (or metric) while training, of every exit and, last, the model itself.
        lr: Learning rate of the first parameter group at the end of the epoch.
        seconds: Wall time of the epoch, validation included.
        val_loss: The objective on the validation loader, None without one.
        val_scores: As `scores`, on the validation loader.
        gates: What the gates did while training, None without gates.
        val_gates: On the validation loader, where they decide by their thresholds.
        routes: Where the router sent rows while training, None without one.
        val_routes: On the validation loader.
        halts: Steps that rows took while training, None where nothing halts.
        val_halts: On the validation loader, where rows halt by the threshold.
    """

    stage: str
    epoch: int
    steps: int
    loss: float
    scores: list[float] | None
    lr: float
    seconds: float
    val_loss: float | None = None
    val_scores: list[float] | None = None
    gates: GateRow | None = None
    val_gates: GateRow | None = None
    routes: RouteRow | None = None
    val_routes: RouteRow | None = None
    halts: HaltRow | None = None
    val_halts: HaltRow | None = None

    @classmethod
    def read(cls, data: dict[str, Any]) -> EpochRow:
        """Inverse of `asdict`."""
        row = cls(**data)
        kinds: dict[str, type] = {"gates": GateRow, "routes": RouteRow, "halts": HaltRow}
        for name in (*kinds, *(f"val_{kind}" for kind in kinds)):
            if data.get(name) is not None:
                setattr(row, name, kinds[name.removeprefix("val_")](**data[name]))
        return row


@dataclass
class FitReport(Report):
    """What `fit` did.

    Attributes:
        rows: One per epoch, those before a resume included.
        exits: Names of the exits, in the order of `scores`.
        gates: Names of the gates.
        routes: Names of the router's routes, the model's own last.
        score: What `scores` hold: "accuracy" or "metric".
        objective: The objective, as a dict.
        task: "classification", "multi_label" or "regression", as the labels have it; "own loss" with `loss=`.
        loss: What was minimised in place of cross entropy, where that was found from the labels.
        steps: Optimiser steps in all.
        resumed_from: Step of the checkpoint that this run started from, None for a fresh run.
        stopped_early: Whether the validation loss stopped getting better.
        best_epoch: The epoch whose parameters were kept, where `patience` was given.
        checkpoint: Path of the last checkpoint, None without `checkpoint_dir`.
        seconds: Wall time of this call.
        heads: How each exit's head was fitted on kept features; empty where heads were trained batch by batch.
        batch_by_batch: Why they were; empty where they were not.
        held_out: Rows that the kinds of head were chosen on.
        draws: Passes of the trunk over the training data for the features.
        notes: What else there is to know of the features.
    """

    title: ClassVar[str] = "Training"

    rows: list[EpochRow] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    score: str = "accuracy"
    objective: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    loss: str = ""
    steps: int = 0
    resumed_from: int | None = None
    stopped_early: bool = False
    best_epoch: int | None = None
    checkpoint: str | None = None
    seconds: float = 0.0
    heads: list[HeadRow] = field(default_factory=list)
    batch_by_batch: str = ""
    held_out: int = 0
    draws: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The trade-off as training went: epoch, stage, cost and score of the model with its gates and routes, validation
        data where there is some. Empty without gates and routes."""
        found = []
        for row in self.rows:
            validated = row.val_gates is not None or row.val_routes is not None
            gates, routes = (row.val_gates, row.val_routes) if validated else (row.gates, row.routes)
            scores = row.val_scores if validated else row.scores
            if gates is not None or routes is not None:
                score = routes.score if routes is not None else scores[-1] if scores else None
                cost = gates.cost if gates is not None else routes.cost if routes is not None else None
                found.append({"epoch": row.epoch, "stage": row.stage, "cost": cost, "score": score})
        return found

    @property
    def collapse(self) -> str | None:
        """How the gates or the router had collapsed by the end; None where they had not."""
        last = (self.rows[-1].val_gates or self.rows[-1].gates) if self.rows else None
        gates = None if last is None else last.collapse
        return gates or collapsed(self.rows[-1] if self.rows else None, self.routes)

    @property
    def stuck(self) -> dict[str, str]:
        """Gates that no longer depended on the input by the end: "open" or "closed", by name."""
        last = (self.rows[-1].val_gates or self.rows[-1].gates) if self.rows else None
        return {} if last is None else {self.gates[i]: way for i, way in last.stuck.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [json_safe(asdict(row)) for row in self.rows],
            **{key: json_safe(value) for key, value in vars(self).items() if key not in ("rows", "heads")},
            "heads": [json_safe(asdict(row)) for row in self.heads],
            "curve": json_safe(self.curve),
            "collapse": self.collapse,
            "stuck": self.stuck,
        }

    def __rich__(self) -> RenderableType:
        names = [*self.exits, "model"]
        validated = any(row.val_loss is not None for row in self.rows)
        gated = [] if not self.gates else ["cost", *(self.gates if len(self.gates) <= WIDE else ["open gates"])]
        gated += [] if not self.routes else ["cost", *(f"to {name}" for name in self.routes)]
        counted, prior = _halting(self.rows)
        gated += [*(["mean steps"] if counted else []), *(["KL"] if prior else [])]
        columns = ["stage", "epoch", "steps", "loss", *(["val loss"] if validated else []), *names, *gated, "lr", "s"]
        rows = []
        for row in self.rows:
            scores = row.val_scores if row.val_scores is not None else row.scores
            shown = [percent(s) if self.score == "accuracy" else number(s) for s in scores or []]
            rows.append(
                [
                    row.stage,
                    str(row.epoch),
                    str(row.steps),
                    number(row.loss),
                    *([number(row.val_loss)] if validated else []),
                    *(shown or ["-"] * len(names)),
                    *_gates_shown(row, len(self.gates)),
                    *_routes_shown(row, len(self.routes), self.score),
                    *_halts_shown(row, counted, prior),
                    number(row.lr, 3),
                    f"{row.seconds:.1f}",
                ]
            )
        notes = [f"{self.score} of each exit on the {'validation' if validated else 'training'} data"]
        if self.resumed_from is not None:
            notes.append(f"resumed from step {self.resumed_from}")
        if self.best_epoch is not None:
            notes.append(f"parameters of epoch {self.best_epoch}" + (", stopped early" if self.stopped_early else ""))
        if self.checkpoint is not None:
            notes.append(f"checkpoint: {self.checkpoint}")
        if self.gates:
            notes.append("cost: mean fraction of the full model's FLOPs; of each gate the share of rows that it lets in")
        if self.routes:
            notes.append(
                "cost: mean fraction of the full model's FLOPs; of each route the rows that took it, and right of those"
            )
        if counted:
            notes.append("mean steps: of a row" + ("; KL: from the prior, while training" if prior else ""))
        lines = ["; ".join(notes)]
        if self.loss:
            lines.append(self.loss)
        lost = collapsed(self.rows[-1] if self.rows else None, self.routes)
        if lost is not None:
            lines.append(f"Warning: the router collapsed: {lost}. {ROUTE_ADVICE}")
        elif self.collapse is not None:
            lines.append(f"Warning: the gates collapsed: {self.collapse}. {ADVICE}")
        elif self.stuck:
            ways = ", ".join(f"{name} always {way}" for name, way in self.stuck.items())
            lines.append(f"Gates that do not depend on the input: {ways}")
        parts: list[RenderableType] = [table(self.title, columns, rows), *lines]
        if self.heads:
            parts += [table("Heads", *heads_table(self.heads)), "; ".join([*self._kept(), *self.notes])]
        elif self.batch_by_batch:
            parts.append(f"Heads were trained batch by batch: {self.batch_by_batch}")
        return stacked(*parts)

    def _kept(self) -> list[str]:
        kept = f"the trunk ran over the training data {'once' if self.draws == 1 else f'{self.draws} times'}"
        chosen = f"kinds and weight decay chosen on {self.held_out} rows held out"
        return [kept, chosen if self.held_out else "too few rows to choose on: kinds kept"]


def _halting(rows: list[EpochRow]) -> tuple[bool, bool]:
    """Whether rows halt, and whether where they stop has a prior."""
    halts = [row.halts for row in rows if row.halts is not None]
    return bool(halts), any(h.divergence is not None for h in halts)


def _halts_shown(row: EpochRow, counted: bool, prior: bool) -> list[str]:
    steps = row.val_halts or row.halts
    shown = [number(steps.steps if steps is not None else None, 3)] if counted else []
    return [*shown, *([number(row.halts.divergence if row.halts is not None else None, 3)] if prior else [])]


ADVICE = "Raise target_cost= or open_bias=, train longer, or lower lr=."


def _gates_shown(row: EpochRow, count: int) -> list[str]:
    gates = row.val_gates or row.gates
    if not count or gates is None:
        return ["-"] * (0 if not count else 2 if count > WIDE else count + 1)
    if count > WIDE:
        return [percent(gates.cost, 1), percent(sum(gates.open) / count, 0)]
    return [percent(gates.cost, 1), *(percent(s, 0) for s in gates.open)]


def _routes_shown(row: EpochRow, count: int, score: str) -> list[str]:
    routes = row.val_routes or row.routes
    if not count or routes is None:
        return ["-"] * (count + 1 if count else 0)
    shown = percent if score == "accuracy" else number
    pairs = zip(routes.share, routes.accuracy, strict=True)
    return [percent(routes.cost, 1), *(f"{percent(s, 0)} ({shown(a, 1)})" for s, a in pairs)]
