"""What a model is for, found from the labels: one class of several, yes or no to each score, or numbers.

| labels for scores `[B, C]` | task | loss |
|---|---|---|
| integers `[B]`, C above 1 | "classification" | cross entropy |
| 0 and 1 `[B, C]` of any dtype, `[B]` too where C is 1 | "multi_label" | binary cross entropy |
| other floating-point numbers `[B, C]`, `[B]` too where C is 1 | "regression" | mean squared error |

As `problem_type` of transformers has it, which counts where the model's `config` gives it, as does its rule that a model
with one score and no `problem_type` regresses. Where labels may mean two things an error names both.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError
from eecompile.passes.split_tail import ends_in_sigmoid
from eecompile.training.batches import iterate, split
from eecompile.training.scores import IGNORE, NUMBERS
from eecompile.training.state import random_state, restore_random_state

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

CLASSES, ANSWERS, REGRESSION, OWN = TASKS = "classification", "multi_label", "regression", "own loss"
LOSSES = {
    ANSWERS: "binary cross entropy: the labels say yes or no to each score",
    REGRESSION: "mean squared error: the labels are numbers. No criterion says how far a number is off: let "
    "calibrate(metric=...) choose the thresholds, or close the exits",
}
PROBLEM_TYPES = {
    "single_label_classification": CLASSES,
    "multi_label_classification": ANSWERS,
    "regression": REGRESSION,
}


def squared_error(output: Tensor, labels: Any) -> Tensor:
    """Mean squared error, 0-dim, of `[B, C]` or `[B, S, C]`; labels may lack the last axis where C is 1.

    Raises:
        EecompileError: Labels of another shape.
    """
    labels = torch.as_tensor(labels, device=output.device)
    if labels.shape != output.shape and labels.shape != (*output.shape[:-1], *(() if output.shape[-1] == 1 else (0,))):
        raise EecompileError(
            "the labels do not fit the prediction", got=list(labels.shape), wanted=f"labels {list(output.shape)}"
        )
    return F.mse_loss(output.float(), labels.reshape(output.shape).float())


def first_batch(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first labels of a loader, None where it has none, and a loader that still begins with them."""
    before = random_state(torch.device("cpu"))
    try:
        items = iter(iterate(loader))
        first = next(items, None)
    finally:
        restore_random_state(before, torch.device("cpu"))
    rest = chain([] if first is None else [first], items) if items is loader else loader
    return (None if first is None else split(first, 0).labels), rest


def task_of(fast: CompiledModule, labels: Any, error: type[EecompileError] = EecompileError) -> str | None:
    """The task that labels are of; None where they do not say, and what is wrong with them shows later.

    Raises:
        EecompileError: They may be of two tasks.
    """
    program = getattr(fast, "program", None)
    if program is None or program.prediction.index is None or labels is None:
        return None
    scores = program.prediction_leaf.shape
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    each = labels.ndim == len(scores) and labels.shape[-1] == scores[-1]
    known = own_task(fast)
    if not each and not (scores[-1] == 1 and labels.ndim == len(scores) - 1):
        return CLASSES if labels.ndim == len(scores) - 1 and not labels.is_floating_point() else None
    if known in (ANSWERS, REGRESSION):
        return known
    real = labels[labels != IGNORE]
    if not bool(((real == 0) | (real == 1)).all()):
        return _numbers(labels, error) if labels.is_floating_point() else None
    one_hot = bool((labels.sum(-1) == 1).all())
    if scores[-1] != 1 and (known == CLASSES or one_hot):
        why = "with a single 1 in every row of the first batch" if one_hot else f"for a model whose task is {CLASSES}"
        raise error(
            "the labels may be one-hot classes, or answers to several questions",
            got=f"0 and 1 {list(labels.shape)} {why}",
            wanted="class indices, or a task",
            hint='classes: labels.argmax(-1); several labels that may hold at once: fast.task = "multi_label"',
        )
    return ANSWERS


def _numbers(labels: Tensor, error: type[EecompileError]) -> str:
    if labels.shape[-1] > 1 and labels.ndim > 1 and bool(((labels >= 0) & (labels <= 1)).all()):
        raise error(
            "the labels may be probabilities, or numbers to regress",
            got=f"{labels.dtype} {list(labels.shape)} between 0 and 1",
            wanted="a loss",
            hint="of classes: loss=torch.nn.functional.cross_entropy; of answers to each score: "
            "loss=torch.nn.functional.binary_cross_entropy_with_logits; " + NUMBERS,
        )
    return REGRESSION


def own_task(fast: CompiledModule) -> str | None:
    """The task as it is known without labels: set or found before, by the model's config, or by its end in a sigmoid."""
    task: str | None = getattr(fast, "task", None)
    if task is not None:
        return task
    config = getattr(getattr(fast, "original", None), "config", None)
    kind = PROBLEM_TYPES.get(str(getattr(config, "problem_type", None)))
    if kind is None and config is not None and getattr(config, "num_labels", None) == 1 and hasattr(config, "problem_type"):
        kind = REGRESSION
    program = getattr(fast, "program", None)
    return ANSWERS if kind is None and program is not None and ends_in_sigmoid(program) else kind


def loss_said(fast: CompiledModule, task: str) -> str:
    """What a report says of the loss that was found; nothing of classes and of a loss of the user's own."""
    if task in (CLASSES, OWN, ""):
        return ""
    found = f"Loss: {LOSSES[task]}"
    criteria = [e.criterion for e in getattr(getattr(fast, "program", None), "exits", ())]
    scores = fast.program.prediction_leaf.shape[-1] if criteria else 1
    if task == ANSWERS and scores != 1 and not any(c.multi_label or c.learned or c.routed for c in criteria):
        kind = type(criteria[0]).__name__
        found += f". The criterion compares classes; criterion=criteria.{kind}(multi_label=True) reads every label"
    return found


def check_task(fast: CompiledModule, labels: Any, error: type[EecompileError] = EecompileError) -> str | None:
    """The task of the first labels of a measurement without a metric.

    Raises:
        EecompileError: They may be of two tasks, or are numbers.
    """
    task = task_of(fast, labels, error)
    if task == REGRESSION:
        raise error("a model of numbers has no accuracy", got="no metric=", wanted="metric= in [0, 1]", hint=NUMBERS)
    return task


def no_choice(fast: CompiledModule) -> str:
    """Why a prediction without labels chooses nothing that could be compared; empty where it does."""
    task = own_task(fast)
    if task == OWN:
        return "a program that was trained with loss="
    if task == REGRESSION:
        return "a model of numbers"
    program: Any = getattr(fast, "program", None)
    one = program is not None and program.prediction.index is not None and program.prediction_leaf.shape[-1] == 1
    return "one score for each row, which may be a yes or no or a number" if one and task != ANSWERS else ""
