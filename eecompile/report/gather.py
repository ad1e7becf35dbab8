"""What the page shows, gathered in one pass over labelled data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eecompile.calibration.baselines import Point, constant, mixed
from eecompile.errors import EecompileError
from eecompile.measuring import interleaved
from eecompile.training.batches import Batch, batches, device_of
from eecompile.training.evaluate import evaluate
from eecompile.training.evaluation_report import EvaluationReport
from eecompile.training.scores import check_labels, choice, class_labels
from eecompile.training.workers import main_only, shared, whole

TIMED = 48  # rows that are timed one by one
REPEATS = 3
EXAMPLES = 6  # rows shown of each kind


@dataclass(frozen=True)
class Example:
    """A row that left early.

    Attributes:
        row: Its position in the data.
        image: [H, W] or [3, H, W] in [0, 1] where the first input looks like an image, else None.
    """

    row: int
    exit: str
    label: int
    prediction: int
    confidence: float
    image: Tensor | None


@dataclass(frozen=True)
class Gathered:
    """n rows, E exits; outputs `[n, C]`.

    Attributes:
        evaluation: What `fast.evaluate` says of the same data.
        names: Of the exits and, last, "model".
        index: int64 [n], where each row left.
        labels: int64 [n].
        confidences: float32 [n, E + 1], of every exit.
        right: bool [n, E + 1].
        seconds: Time of single rows by the name of the exit that they left at.
        original_seconds: Time of single rows through the original model; None without one.
        early_right, early_wrong: Rows that left before the model's own end.
    """

    evaluation: EvaluationReport
    names: list[str]
    index: Tensor
    labels: Tensor
    confidences: Tensor
    right: Tensor
    seconds: dict[str, list[float]]
    original_seconds: list[float] | None
    early_right: list[Example]
    early_wrong: list[Example]


def gather(fast: Any, loader: Iterable[Any]) -> Gathered:
    """One pass for the figures, one of `evaluate`, and some rows one by one for their latency.

    Raises:
        EecompileError: No labels, outputs that are no class scores [B, C], or a module without exits.
    """
    if not fast.exits:
        raise EecompileError(
            "a report is about exits, and this module has none",
            got=fast.strategy.name,
            hint="print(fast.evaluate(loader)) shows cost and accuracy of gates, routes and halting",
        )
    loader = whole(loader)
    evaluation = evaluate(fast, loader)
    names = [*(e.name for e in fast.exits), "model"]
    parts: dict[str, list[Tensor]] = {"index": [], "labels": [], "confidences": [], "right": []}
    shown: dict[bool, list[Example]] = {True: [], False: []}
    singles: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count = 0
    for batch, (columns, predictions) in shared(batches(loader, device_of(fast)), partial(_columns, fast)):
        for name, column in columns.items():
            parts[name].append(column)
        labels, right = columns["labels"], columns["right"]
        for b in range(len(labels)):
            k = int(columns["index"][b])
            ok = bool(right[b, k])
            if k < len(names) - 1 and len(shown[ok]) < EXAMPLES:
                sure = float(columns["confidences"][b, k])
                image = _image(batch.args, batch.kwargs, b)
                shown[ok].append(Example(count + b, names[k], int(labels[b]), int(predictions[b, k]), sure, image))
            if len(singles) < TIMED:
                singles.append(_single(batch.args, batch.kwargs, b, len(labels)))
        count += len(labels)
    joined = {name: torch.cat(found) for name, found in parts.items()}
    seconds, original = main_only(lambda: _latencies(fast, names, singles))
    return Gathered(
        evaluation, names, joined["index"], joined["labels"], joined["confidences"], joined["right"], seconds, original,
        shown[True], shown[False]
    )  # fmt: skip


def _columns(fast: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Index, labels, confidences and right of a batch, and what every exit chooses [B, E + 1], on the CPU."""
    result = fast.observe(*batch.args, **batch.kwargs)
    outputs: tuple[Tensor, ...] = result.outputs
    if outputs[-1].ndim != 2:
        raise EecompileError(
            "a report shows classifiers", got=f"outputs {list(outputs[-1].shape)}", wanted="class scores [B, C]"
        )
    labels = class_labels(outputs[-1], check_labels(outputs[-1], batch.labels, batch.where))
    if labels is None:
        raise EecompileError(
            "a report shows classifiers", got="several labels that may hold at once", wanted="one class for each row"
        )
    predictions = torch.stack([choice(o) for o in outputs], 1)
    confidences = torch.stack([c.float() for c in result.confidences], 1)
    found = {"index": result.exit_index, "labels": labels, "confidences": confidences}
    found["right"] = predictions == labels[:, None]
    return {name: column.cpu() for name, column in found.items()}, predictions.cpu()


def _single(args: tuple[Any, ...], kwargs: dict[str, Any], row: int, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def one(value: Any) -> Any:
        return value[row : row + 1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value

    return tuple(one(a) for a in args), {name: one(v) for name, v in kwargs.items()}


def _latencies(fast: Any, names: list[str], singles: list[Any]) -> tuple[dict[str, list[float]], list[float] | None]:
    """Seconds of rows one by one, in turns with the original."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    original: list[float] | None = None if fast.original is None else []
    with torch.no_grad():
        for args, kwargs in singles:
            at = names[int(fast.run(*args, **kwargs).exit_index[0])]
            calls = {"early": partial(fast, *args, **kwargs)}
            if original is not None:
                calls["original"] = partial(fast.original, *args, **kwargs)
            times = interleaved(calls, REPEATS, min_seconds=0.0, warm_up=0)
            seconds[at].append(median(times["early"]))
            if original is not None:
                original.append(median(times["original"]))
    return {name: found for name, found in seconds.items() if found}, original


def _image(args: tuple[Any, ...], kwargs: dict[str, Any], row: int) -> Tensor | None:
    """The row's first input as an image, scaled to [0, 1]; None where it is none."""
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if first is None or first.ndim != 4 or first.shape[1] not in (1, 3) or not first.is_floating_point():
        return None
    image = first[row].detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
    return image[0] if image.shape[0] == 1 else image


def frontier(points: list[tuple[float, float]], cost: float) -> float | None:
    """The best accuracy at a mean cost by choosing among constant exits at random; None where each costs more."""
    named = [Point("", c, -a) for c, a in points]
    return max((-p.drop for p in (constant(named, cost), mixed(named, cost)) if p is not None), default=None)
