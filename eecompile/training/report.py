"""Reports: what an operation found, as a dict that JSON takes and as a table for people."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


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
class EpochRow:
    """One epoch of training.

    Attributes:
        stage: "heads", "joint" or "trunk".
        epoch: From 1, over all stages.
        steps: Optimiser steps since the start.
        loss: Mean training loss of the objective.
        scores: Mean accuracy (or metric) while training, of every exit and, last, the model itself.
        lr: Learning rate of the first parameter group at the end of the epoch.
        seconds: Wall time of the epoch, validation included.
        val_loss: The objective on the validation loader, None without one.
        val_scores: As `scores`, on the validation loader.
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


@dataclass
class FitReport(Report):
    """What `fit` did.

    Attributes:
        rows: One per epoch, those before a resume included.
        exits: Names of the exits, in the order of `scores`.
        score: What `scores` hold: "accuracy" or "metric".
        objective: The objective, as a dict.
        steps: Optimiser steps in all.
        resumed_from: Step of the checkpoint that this run started from, None for a fresh run.
        stopped_early: Whether the validation loss stopped getting better.
        best_epoch: The epoch whose parameters were kept, where `patience` was given.
        checkpoint: Path of the last checkpoint, None without `checkpoint_dir`.
        seconds: Wall time of this call.
    """

    title: ClassVar[str] = "Training"

    rows: list[EpochRow] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    score: str = "accuracy"
    objective: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    resumed_from: int | None = None
    stopped_early: bool = False
    best_epoch: int | None = None
    checkpoint: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [json_safe(vars(row)) for row in self.rows],
            **{key: json_safe(value) for key, value in vars(self).items() if key != "rows"},
        }

    def __rich__(self) -> RenderableType:
        names = [*self.exits, "model"]
        validated = any(row.val_loss is not None for row in self.rows)
        columns = ["stage", "epoch", "steps", "loss", *(["val loss"] if validated else []), *names, "lr", "s"]
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
        return stacked(table(self.title, columns, rows), "; ".join(notes))
