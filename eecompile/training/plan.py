"""The plan of a training run and its position, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from eecompile.training.decisions import Decisions, rows_of
from eecompile.training.fit_report import EpochRow
from eecompile.training.objectives import Objective
from eecompile.training.scores import Metric


@dataclass(frozen=True)
class StagePlan:
    """One stage: what is trained, for how many epochs, by which objective.

    Attributes:
        objective: None for the objective of the plan.
        gate_mode: How gates decide meanwhile; None leaves that as it is.
        kept_open: Share of the gates, the first ones, that stay open meanwhile.
        full_share: Share of the rows of each batch, the first ones, that every gate lets in.
    """

    name: str
    epochs: int
    trunk: bool
    heads: bool
    objective: Objective | None = None
    gate_mode: str | None = None
    kept_open: float = 0.0
    full_share: float = 0.0


@dataclass(frozen=True)
class Event:
    """What a callback gets.

    Attributes:
        kind: "step" after every optimizer step, or every head that was fitted on kept features; "epoch" after every epoch.
        stage: "heads", "joint" or "trunk", or the name that the strategy gives.
        epoch: From 1, over all stages.
        batch: Batches done in this epoch; 0 for "epoch".
        step: Optimizer steps done.
        loss: Of the step, or the mean of the epoch.
        row: The epoch's row of the report; None for "step".
    """

    kind: Literal["step", "epoch"]
    stage: str
    epoch: int
    batch: int
    step: int
    loss: float
    row: EpochRow | None = None


@dataclass(frozen=True)
class Plan:
    """The options of `fit`, checked and with defaults filled in."""

    stages: tuple[StagePlan, ...]
    objective: Objective
    metric: Metric | None
    lr: float
    trunk_lr: float
    weight_decay: float
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None
    scheduler: str | Callable[[Optimizer], Any] | None
    patience: int | None
    checkpoint_every: int | None
    seed: int
    max_grad_norm: float | None
    progress: bool
    callbacks: tuple[Callable[[Event], None], ...]
    cached: bool | None = None
    draws: int | None = None
    cache_mb: int = 1024
    seconds: float = math.inf  # for heads on kept features, from the start of the run
    decay: float | None = None  # the caller's weight decay; `weight_decay` is what optimizers get
    accelerator: bool = False  # whether the caller gave one
    epochs: int = 1
    task: str = ""  # found from the labels; empty where they do not say

    def objective_in(self, stage: StagePlan) -> Objective:
        return self.objective if stage.objective is None else stage.objective


@dataclass
class Position:
    """Where a run is, with the sums of the running epoch. Numbers only: it is saved as JSON.

    Attributes:
        stage: Index of the running stage.
        epoch: Whole epochs of that stage that are done.
        batch: Batches of the running epoch that are done; heads, where they are fitted on kept features.
        step: Optimizer steps done in all.
        loss_sum: Sum of loss times rows in the running epoch.
        loss_rows: Rows that it is a sum over.
        score_rows: Rows that have a label.
        sums: Sums over the rows of what `step.sums` gives, by name: "scores" of every exit and, last, the model, and what
            was decided of each kind.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_rows: int = 0
    score_rows: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    best_loss: float | None = None
    best_epoch: int | None = None
    bad_epochs: int = 0
    stage_done: bool = False
    stopped_early: bool = False

    def add(self, loss: float, rows: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Adds a batch; `rows` `[2]`: rows, and rows with a label."""
        total, labelled = (float(n) for n in rows.tolist())
        self.loss_sum += loss * total
        self.loss_rows += int(total)
        self.score_rows += labelled
        for name, found in sums.items():
            before = self.sums.get(name, [0.0] * found.numel())
            self.sums[name] = [a + b for a, b in zip(before, found.tolist(), strict=True)]

    def scores(self) -> list[float] | None:
        """Mean score of every exit and, last, the model; None where there is none."""
        return [s / self.score_rows for s in self.sums["scores"]] if self.score_rows else None

    def decided(self) -> dict[str, Decisions]:
        """What was decided inside the model, by kind."""
        return rows_of(self.sums, self.loss_rows)

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0
        self._clear()

    def next_stage(self) -> None:
        self.stage += 1
        self.epoch = self.batch = self.bad_epochs = 0
        self.best_loss, self.stage_done = None, False
        self._clear()

    def _clear(self) -> None:
        self.loss_sum, self.loss_rows, self.score_rows, self.sums = 0.0, 0, 0.0, {}

    def packed(self) -> Tensor:
        """The sums as one float64 tensor, to be added over processes."""
        head = [self.loss_sum, float(self.loss_rows), self.score_rows]
        return torch.tensor(head + [s for _, found in sorted(self.sums.items()) for s in found], dtype=torch.float64)

    def unpack(self, total: Tensor) -> None:
        loss_sum, loss_rows, score_rows, *sums = total.tolist()
        self.loss_sum, self.loss_rows, self.score_rows = loss_sum, int(loss_rows), score_rows
        left = iter(sums)
        self.sums = {name: [next(left) for _ in found] for name, found in sorted(self.sums.items())}
