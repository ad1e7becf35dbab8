"""What `fit` did: epochs, exits, heads, and what decides inside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.training.decisions import KINDS, Decisions, GateRow, HaltRow, RouteRow
from eecompile.training.head_report import HeadRow, cut_short, heads_table
from eecompile.training.report import Report, json_safe, number, percent, stacked, table


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
        for kind in KINDS:
            for name in (kind.name, f"val_{kind.name}"):
                if data.get(name) is not None:
                    setattr(row, name, kind(**data[name]))
        return row

    def take(self, decided: Mapping[str, Decisions], prefix: str = "") -> None:
        """Fills in what was decided, by kind; `prefix` is "val_" for the validation loader."""
        for name, found in decided.items():
            setattr(self, prefix + name, found)

    def decided(self, name: str) -> Decisions | None:
        """What one kind decided: on the validation loader where there is one."""
        found: Decisions | None = getattr(self, f"val_{name}") or getattr(self, name)
        return found


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
            scores = row.val_scores if row.val_loss is not None else row.scores
            points = [d.point for d in map(row.decided, NAMES) if d is not None]
            cost = next((c for c, _ in points if c is not None), None)
            score = next((s for _, s in points if s is not None), scores[-1] if scores else None)
            if cost is not None:
                found.append({"epoch": row.epoch, "stage": row.stage, "cost": cost, "score": score})
        return found

    @property
    def collapse(self) -> str | None:
        """How the gates or the router had collapsed by the end; None where they had not."""
        return next(filter(None, (d.collapse(names) for d, names in self._last())), None)

    @property
    def stuck(self) -> dict[str, str]:
        """Gates that no longer depended on the input by the end: "open" or "closed", by name."""
        ways = [d.stuck for d, _ in self._last() if isinstance(d, GateRow)]
        return {self.gates[i]: way for stuck in ways for i, way in stuck.items()}

    def _last(self) -> list[tuple[Decisions, Sequence[str]]]:
        """What was decided in the last epoch, with the names of what it is about."""
        found = [(row.decided(name), self._names(name)) for row in self.rows[-1:] for name in NAMES]
        return [(d, names) for d, names in found if d is not None]

    def _names(self, name: str) -> list[str]:
        return {"gates": self.gates, "routes": self.routes}.get(name, [])

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
        inside = {
            kind.name: kind.columns(self._names(kind.name), [d for d in (getattr(r, kind.name) for r in self.rows) if d])
            for kind in KINDS
        }
        decided = [column for columns in inside.values() for column in columns]
        columns = ["stage", "epoch", "steps", "loss", *(["val loss"] if validated else []), *names, *decided, "lr", "s"]
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
                    *(cell for name, columns in inside.items() for cell in self._cells(row, name, len(columns))),
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
        notes += [kind.note for kind in KINDS if inside[kind.name]]
        lines = ["; ".join(notes)]
        if self.loss:
            lines.append(self.loss)
        lines += filter(None, (d.warning(names) for d, names in self._last()))
        parts: list[RenderableType] = [table(self.title, columns, rows), *lines]
        if self.heads:
            parts += [
                table("Heads", *heads_table(self.heads)),
                "; ".join([*self._kept(), *cut_short(self.heads), *self.notes]),
            ]
        elif self.batch_by_batch:
            parts.append(f"Heads were trained batch by batch: {self.batch_by_batch}")
        return stacked(*parts)

    def _kept(self) -> list[str]:
        passes = "once" if self.draws == 1 else f"{self.draws} times"
        kept = f"the trunk ran over the training data {passes}; heads were fitted to that until the loss stopped falling"
        chosen = f"kinds and weight decay chosen on {self.held_out} rows held out"
        return [kept, chosen if self.held_out else "too few rows to choose on: kinds kept"]

    def _cells(self, row: EpochRow, name: str, count: int) -> list[str]:
        """What one kind decided in an epoch, for so many columns."""
        found = row.decided(name)
        return ["-"] * count if found is None else found.cells(getattr(row, name), self.score == "accuracy")[:count]


NAMES = tuple(kind.name for kind in KINDS)
