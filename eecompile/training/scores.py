"""How good a prediction is for each row, and whether the labels make sense at all.

A score is float64 `[B]`, higher is better. For class scores `[B, C]` it is 1 where the largest logit is the
label's (lowest index among equals), else 0. For `[B, S, C]` it is the share of a row's positions, those
labelled -100 left out, that are right. The unit is always the row, because a row leaves as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError

IGNORE = -100
Metric = Callable[[Any, Any], Tensor]

_NOT_CLASSES = "for a task that is not classification pass loss= to fit and metric= to evaluate and calibrate"

_SEVERAL = (
    ": fit(loss=torch.nn.functional.binary_cross_entropy_with_logits), and for calibrate and evaluate "
    "metric=lambda z, y: ((z > 0) == (y > 0.5)).all(-1).double()"
)


def check_labels(
    logits: Tensor, labels: Any, where: str = "this batch", error: type[EecompileError] = EecompileError
) -> Tensor:
    """Labels as int64 on the device of `logits`, after every check.

    Args:
        logits: `[B, C]` or `[B, S, C]`, any float dtype.
        labels: Class indices `[B]` or `[B, S]`, any integer dtype; -100 marks what is to be left out.
        where: Names the batch in the message.
        error: The class to raise.

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
                hint=_NOT_CLASSES,
            ) from problem
    if logits.ndim not in (2, 3):
        raise error(
            "the prediction does not hold class scores",
            where=where,
            got=f"shape {list(logits.shape)}",
            wanted="[B, C] or [B, S, C]",
            hint=_NOT_CLASSES,
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise error(
            "the labels have the wrong dtype",
            where=where,
            got=str(labels.dtype),
            wanted="class indices of an integer dtype",
            hint=_several_labels(labels) if logits.shape == labels.shape else _NOT_CLASSES,
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


def _several_labels(labels: Tensor) -> str:
    """What floating-point or boolean labels of the prediction's shape may be, told apart by their values."""
    one_hot = bool((labels.sum(-1) == 1).all()) and bool(((labels == 0) | (labels == 1)).all())
    if one_hot and labels.shape[-1] > 1:
        return "one-hot labels: .argmax(-1); several labels that may hold at once: loss= and metric=, as below" + _SEVERAL
    if bool(((labels >= 0) & (labels <= 1)).all()):
        return "several labels that may hold at once, or one that is yes or no" + _SEVERAL
    return _NOT_CLASSES


def right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each row, and whether it has a label at all.

    Args:
        logits: `[B, C]` or `[B, S, C]`.
        labels: int64 `[B]` or `[B, S]`, checked.

    Returns:
        Score float64 `[B]` (0 where there is no label) and valid bool `[B]`.
    """
    real = labels != IGNORE
    hit = (logits.argmax(-1) == labels) & real
    if labels.ndim == 1:
        return hit.double(), real
    count = real.sum(-1)
    return hit.sum(-1).double() / count.clamp_min(1), count > 0


def agreement(early: Tensor, full: Tensor, labels: Tensor | None = None) -> Tensor:
    """Share of a row's positions, padding (-100) left out, where two predictions choose the same class.

    Returns float64 `[B]`; a row without a real position agrees.
    """
    same = early.argmax(-1) == full.argmax(-1)
    if same.ndim == 1:
        return same.double()
    if labels is None:
        return same.double().mean(-1)
    real = labels != IGNORE
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
