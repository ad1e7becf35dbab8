"""Every exit's output on a data set, kept: thresholds are chosen and evaluated from it without running the model again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eecompile.calibration.calibrate import calibrate
from eecompile.criteria import MaxProbability
from eecompile.ir.settings import EXITS, TEMPERATURES, Settings
from eecompile.kernels.confidence import confidence
from eecompile.kernels.select import select
from eecompile.result import Result, Trace
from eecompile.training.batches import split
from eecompile.training.evaluate import evaluate
from examples._registry import DatasetError, atomic
from examples.trunks import console


@dataclass(frozen=True)
class Observed:
    """Rows of a data set as every exit saw them.

    Attributes:
        outputs: float32 [N, E + 1, C]: logits of every exit and, last, of the model.
        labels: int64 [N].
        scores: float32 [N, E], logits of the learned exit scores; None for other criteria.
    """

    outputs: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def only(self, *exits: int) -> Observed:
        """As seen by some of the exits, by number, and the model's own end: of a program with fewer exits."""
        columns = [*exits, self.outputs.shape[1] - 1]
        scores = None if self.scores is None else self.scores[:, list(exits)]
        return Observed(self.outputs[:, columns], self.labels, scores)

    def right(self) -> Tensor:
        """[N, E + 1] bool: whether each exit and, last, the model answers right."""
        return self.outputs.argmax(-1) == self.labels.unsqueeze(1)

    def of(self, fast: Any) -> Replay:
        """As if ``fast`` ran on the rows again."""
        return Replay(fast, self)


class Replay:
    """A compiled module, to `calibrate` and `evaluate`, whose outputs are those that were observed."""

    def __init__(self, fast: Any, seen: Observed, batch: int = 1024) -> None:
        self.fast, self.seen, self.batch = fast, seen, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A loader of row numbers in place of inputs."""
        for index in torch.split(torch.arange(len(self.seen.labels)), self.batch):
            yield index, self.seen.labels[index]

    def calibrate(self, **options: Any) -> Any:
        """`eecompile.calibration.calibrate.calibrate`; sets what it found on the compiled module."""
        report = calibrate(self, self, **options)
        self.fast.settings = report.settings
        return report

    def evaluate(self, **options: Any) -> Any:
        """`eecompile.training.evaluate.evaluate` at the present thresholds."""
        return evaluate(self, self, **options)

    def observe(self, rows: Tensor) -> Result:
        """What ``fast.observe`` gives for the rows, by the same definitions of confidence and selection."""
        return self.observe_at(self.fast.settings, (rows,), {})

    def observe_at(self, settings: Settings, args: Sequence[Tensor], kwargs: Any) -> Result:
        """`observe` under other settings."""
        (rows,) = args
        outputs = tuple(self.seen.outputs[rows].unbind(1))
        scores = None if self.seen.scores is None else tuple(self.seen.scores[rows].unbind(1))
        thresholds, temperatures = torch.tensor(settings[EXITS]), torch.tensor(settings[TEMPERATURES])
        criteria = [record.criterion for record in self.fast.exits]
        last = MaxProbability() if criteria[-1].learned else criteria[-1]
        confidences, state = [], None
        for k, kind in enumerate((*criteria, last)):
            scored = scores[k].unsqueeze(-1) if scores is not None and kind.learned else outputs[k]
            at = thresholds[k] if kind.stateful and k < len(criteria) else None
            value, new = confidence(scored, state, kind.name, temperatures[k], patience=kind.patience, threshold=at)
            confidences.append(value)
            state = new if kind.stateful else None
        output, index, sure = select(outputs, confidences, thresholds)
        cost = self.fast.costs(tuple(t <= 1.0 for t in thresholds.tolist()), settings)[index]
        every = tuple(torch.nan_to_num(value, nan=0.0) for value in confidences)
        return Result(output, index, sure, cost, trace=Trace(outputs, every, scores=scores))


def observe(fast: Any, loader: Iterable[Any], path: Path) -> Observed:
    """One pass of ``fast.observe`` over ``loader``, kept at ``path``; read from there the next time.

    Raises:
        DatasetError: The kept file is damaged, or the program predicts at positions.
    """
    if not path.exists():
        parts: dict[str, list[Tensor]] = {"outputs": [], "labels": [], "scores": []}
        shown = track(loader, path.stem, console=console, disable=not console.is_terminal)
        for number, item in enumerate(shown):
            batch = split(item, number)
            result = fast.observe(*batch.args, **batch.kwargs)
            if result.outputs[-1].ndim != 2:
                raise DatasetError(f"{path.stem}: outputs are {list(result.outputs[-1].shape)}, wanted [B, C]")
            parts["outputs"].append(torch.stack([o.float() for o in result.outputs], 1))
            parts["labels"].append(batch.labels)
            if result.trace.scores is not None:
                parts["scores"].append(torch.stack([s.float() for s in result.trace.scores], 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as written:
            save_file({key: torch.cat(part) for key, part in parts.items() if part}, written)
    try:
        return Observed(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error}). Delete it and run again.") from error
