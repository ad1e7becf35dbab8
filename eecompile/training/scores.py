"""How good a prediction is for each row, and whether the labels make sense at all.

Labels are class indices, `[B]` for scores `[B, C]`, or 0 and 1 of the scores' own shape, one answer for each score: one
logit that says yes or no, several labels that may hold at once. A score is float64 `[B]`, higher is better: 1 where the
largest logit is the label's (lowest index among equals), or where every answer is right (yes is a logit above 0), else 0.
With positions, `[B, S, C]`, it is the share of a row's positions, those labelled -100 left out, that are right. The unit is
always the row, because a row leaves as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.kernels.confidence import yes_or_no

if TYPE_CHECKING:
    from eecompile.public_records import ExitRecord

IGNORE = -100
Metric = Callable[[Any, Any], Tensor]

NOT_CLASSES = "for a task that is not classification pass loss= to fit and metric= to evaluate and calibrate"
NUMBERS = (
    "for regression pass loss=torch.nn.functional.mse_loss to fit, and to evaluate and calibrate a metric in [0, 1], "
    "such as metric=lambda z, y: ((z - y).abs() < 0.1).all(-1).double()"
)


def check_labels(
    logits: Tensor, labels: Any, where: str = "this batch", error: type[EecompileError] = EecompileError
) -> Tensor:
    """Labels as int64 on the device of `logits`, after every check.

    Args:
        logits: `[B, C]` or `[B, S, C]`, any float dtype.
        labels: Class indices `[B]` or `[B, S]`, any integer dtype; or 0 and 1 of the shape of `logits`, any dtype, of which
            the last axis may be missing where C is 1. -100 marks what is to be left out.
        where: Names the batch in the message.
        error: The class to raise.

    Returns:
        Class indices with one axis less than `logits`, or 0 and 1 in its shape.

    Raises:
        EecompileError: No labels, wrong type, dtype or shape, or a value outside of 0 to C - 1 and not -100.
    """
    if labels is None:
        raise error("there are no labels", where=where, wanted="(inputs, labels), or a dict with 'labels'")
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels, device=logits.device)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise error(
                "the labels are not class indices",
                where=where,
                got=type(labels).__name__,
                wanted="an integer tensor",
                hint=NOT_CLASSES,
            ) from problem
    if logits.ndim not in (2, 3):
        raise error(
            "the prediction does not hold class scores",
            where=where,
            got=f"shape {list(logits.shape)}",
            wanted="[B, C] or [B, S, C]",
            hint=NOT_CLASSES,
        )
    if labels.is_nested:
        raise error("the labels are a nested tensor", where=where, wanted=f"an integer tensor, {IGNORE} where there is none")
    one = logits.shape[-1] == 1
    if labels.shape == logits.shape or (one and labels.shape == logits.shape[:-1]):
        return _answers(logits, labels, where, error)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise error(
            "the labels have the wrong dtype",
            where=where,
            got=f"{labels.dtype} {list(labels.shape)} for a prediction {list(logits.shape)}",
            wanted=f"class indices {list(logits.shape[:-1])} of an integer dtype, or an answer {list(logits.shape)} for "
            "each score",
            hint=NOT_CLASSES,
        )
    if labels.shape != logits.shape[:-1]:
        raise error(
            "the labels do not fit the prediction",
            where=where,
            got=f"labels {list(labels.shape)} for a prediction {list(logits.shape)}",
            wanted=f"labels {list(logits.shape[:-1])}",
            hint="use labels.squeeze(-1)" if labels.shape == (*logits.shape[:-1], 1) else None,
        )
    labels = labels.to(device=logits.device, dtype=torch.int64)
    checked: Tensor = labels
    wrong = ((labels < 0) | (labels >= logits.shape[-1])) & (labels != IGNORE)
    if bool(wrong.any()):
        bad = labels[wrong]
        raise error(
            "labels out of range",
            where=where,
            got=f"{bad.numel()} of {labels.numel()} labels, values from {int(bad.min())} to {int(bad.max())}",
            wanted=f"0 to {logits.shape[-1] - 1} ({logits.shape[-1]} classes), or {IGNORE} to leave one out",
            hint="check that the labels start at 0 and that the model has as many classes as the data",
        )
    return checked


def _answers(logits: Tensor, labels: Tensor, where: str, error: type[EecompileError]) -> Tensor:
    """Labels that say yes or no to each score, int64 in the shape of `logits`."""
    labels = labels.reshape(logits.shape).to(logits.device)
    wrong = (labels != 0) & (labels != 1) & (labels != IGNORE)
    if bool(wrong.any()):
        raise error(
            "the labels are neither classes nor yes or no",
            where=where,
            got=f"{int(wrong.sum())} of {labels.numel()} values like {labels[wrong][0].item():.4g}, one for each score",
            wanted="0 or 1 for each score"
            + ("" if logits.shape[-1] == 1 else f", or class indices {list(logits.shape[:-1])} of an integer dtype"),
            hint=NUMBERS,
        )
    return labels.to(torch.int64)


def over_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits whose last axis is what `labels`, checked, choose from: `[..., C]`, or `[..., C, 2]` of no and yes."""
    return yes_or_no(logits, True) if labels.ndim == logits.ndim else logits


def labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """bool `[B]` or `[B, S]`: what has a label at all; `labels` are checked."""
    real = labels != IGNORE
    return real.any(-1) if labels.ndim == logits.ndim else real


def class_labels(logits: Tensor, labels: Tensor) -> Tensor | None:
    """int64 `[B]`, the class of each row; None with positions, and where several labels may hold at once."""
    if logits.ndim == 2 and labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    return labels if labels.ndim == 1 else None


def choice(logits: Tensor, each: bool = False) -> Tensor:
    """What a prediction chooses, int64: the class `[B]` or `[B, S]`; with `each` yes or no, in the shape of `logits`.

    One score alone says yes or no, 1 or 0.
    """
    if each:
        return yes_or_no(logits, True).argmax(-1)
    return yes_or_no(logits).argmax(-1)


def right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each row, and whether it has a label at all.

    Args:
        logits: `[B, C]` or `[B, S, C]`.
        labels: int64, checked.

    Returns:
        Score float64 `[B]` (0 where there is no label) and valid bool `[B]`.
    """
    real = labelled(logits, labels)
    hit = over_classes(logits, labels).argmax(-1) == labels
    if labels.ndim == logits.ndim:
        hit = (hit | (labels == IGNORE)).all(-1)
    hit = hit & real
    if hit.ndim == 1:
        return hit.double(), real
    count = real.sum(-1)
    return hit.sum(-1).double() / count.clamp_min(1), count > 0


def agreement(early: Tensor, full: Tensor, labels: Tensor | None = None, each: bool = False) -> Tensor:
    """Share of a row's positions, padding (-100) left out, where two predictions choose the same.

    Args:
        labels: Checked.
        each: Whether each score is a yes or no of its own, all of which are compared; as labels have it where there are any.

    Returns float64 `[B]`; a row without a real position agrees.
    """
    each = each if labels is None else labels.ndim == full.ndim
    same = choice(early, each) == choice(full, each)
    if each:
        same = (same if labels is None else same | (labels == IGNORE)).all(-1)
    if same.ndim == 1:
        return same.double()
    if labels is None:
        return same.double().mean(-1)
    real = labelled(full, labels)
    count = real.sum(-1)
    return torch.where(count > 0, (same & real).sum(-1).double() / count.clamp_min(1), 1.0)


def measure(
    metric: Metric,
    prediction: Any,
    labels: Any,
    rows: int,
    where: str,
    error: type[EecompileError] = EecompileError,
) -> Tensor:
    """The user's metric, checked: one finite score per row, float64 `[rows]`."""
    score: Any = metric(prediction, labels)
    if not isinstance(score, Tensor) or score.shape != (rows,):
        raise error(
            "the metric does not give one score per row",
            where=where,
            got=f"shape {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__,
            wanted=f"a tensor of shape [{rows}], higher is better",
            hint="use reduction='none' and average over everything but the batch",
        )
    if not bool(score.isfinite().all()):
        raise error("the metric is not finite", where=where, got=f"{int((~score.isfinite()).sum())} of {rows} rows")
    return score.detach().double()


def check_finite(
    outputs: Sequence[Tensor], exits: Sequence[ExitRecord], where: str, error: type[EecompileError] = EecompileError
) -> None:
    """Refuses NaN in the outputs of these exits and, last, of the model: its largest score would be the first."""
    for name, output in zip([*(e.name for e in exits), "the model's own output"], outputs, strict=True):
        bad = output.isnan()
        if bool(bad.any()):
            rows = int(bad.flatten(1).any(1).sum())
            raise error(
                "NaN in the outputs",
                where=f"{name}, {where}",
                got=f"NaN in {rows} of {output.shape[0]} rows",
                wanted="numbers",
                hint="look at these inputs, and whether training diverged",
            )


def row_scores(outputs: Sequence[Tensor], labels: Any, metric: Metric | None, where: str) -> tuple[Tensor, Tensor]:
    """Scores float64 `[B, N]` of N outputs, and bool `[B]` of the rows with a label, on the CPU.

    Raises:
        EecompileError: As `measure` and `check_labels`.
    """
    rows = outputs[-1].shape[0]
    if metric is not None:
        measured = [measure(metric, output, labels, rows, where).cpu() for output in outputs]
        return torch.stack(measured, 1), torch.ones(rows, dtype=torch.bool)
    checked = check_labels(outputs[-1], labels, where)
    pairs = [right(output, checked) for output in outputs]
    return torch.stack([score for score, _ in pairs], 1).cpu(), pairs[-1][1].cpu()
