"""The progress bar of `fit`: on a terminal only, in the main process only."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eecompile.training.plan import Plan, Position, StagePlan


class Bar:
    """One line per run: stage, epoch, batches of the epoch, loss, time left."""

    def __init__(self, plan: Plan, accelerator: Any, length: int | None) -> None:
        console = Console(stderr=True)
        self._on = plan.progress and console.is_terminal and bool(accelerator.is_main_process)
        self._epochs = sum(stage.epochs for stage in plan.stages)
        self._length = length
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._on,
        )
        self._task = self._progress.add_task("", total=length, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, text: str, total: int | None = None) -> None:
        """A task other than an epoch, with so many steps; by default one for each batch of the loader."""
        self._progress.reset(self._task, total=total or self._length, completed=0, description=text, note="")

    def advance(self) -> None:
        self._progress.advance(self._task)

    def epoch(self, stage: StagePlan, at: Position, epoch: int) -> None:
        text = f"{stage.name}: epoch {epoch}/{self._epochs}"
        self._progress.reset(self._task, total=self._length, completed=at.batch, description=text, note="")

    def step(self, at: Position, loss: float) -> None:
        if self._on:
            self._progress.update(self._task, completed=at.batch, note=f"loss {loss:.4g}")
