"""A sample of a loader that fits a budget of time: most of it to fit heads on, the rest to choose and measure on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eecompile.calibration.collect import static_output
from eecompile.errors import EecompileError
from eecompile.training.batches import Batch, batches, empty_loader, no_labels
from eecompile.training.scores import IGNORE

LABELS, BYTES = 16_384, 2**29  # of a sample, at most: a row of text may have a label for each word
READING, PASSES = 0.15, 0.3  # shares of the budget: to read the sample, and for one pass of the model for each probe
AT_LEAST = 0.1  # share of the budget that a step has, whatever went before
LEAST = 50  # rows to choose on
EVERY = 4  # one batch of so many is to choose on: heads need more rows to be as good as those of `fit`


class Clock:
    """A budget of seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def over(self) -> bool:
        return self.left < 0

    def until(self, share: float) -> float:
        """Seconds until this share of the budget is spent; `AT_LEAST` of it where that is less."""
        return max(share * self.seconds - self.spent, AT_LEAST * self.seconds)


@dataclass(frozen=True)
class Sample:
    """Batches of a loader.

    Attributes:
        fit: Three batches of four, as a loader would give them.
        val: Every fourth, from the second on, for validation.
        seconds: Time of the model for one batch.
    """

    fit: list[tuple[Any, Any]]
    val: list[Batch]
    seconds: float

    @property
    def val_items(self) -> list[tuple[Any, Any]]:
        return [_item(batch) for batch in self.val]

    @property
    def batch(self) -> int:
        """Rows of a batch."""
        return _rows(self.fit[0][0])

    @property
    def rows(self) -> tuple[int, int]:
        """Rows to fit heads on, and rows to choose on."""
        return sum(_rows(inputs) for inputs, _ in self.fit), sum(_rows(inputs) for inputs, _ in self.val_items)


def sample(model: nn.Module, loader: Iterable[Any], clock: Clock, probes: int) -> Sample:
    """As much of the loader as the budget allows for so many probes.

    Raises:
        EecompileError: An empty loader, batches without labels, or too few rows or batches.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Batch] = []
    seconds, most, labels, size, start = 0.0, 2, 0, 0, clock.spent
    for batch in batches(loader, device):
        if batch.labels is None:
            raise EecompileError("advice needs labels", where=batch.where, got="none", wanted="(inputs, labels)")
        if not found:
            seconds = _seconds(model, batch)
            most = max(2, int(PASSES * clock.seconds / (probes * seconds)))
        found.append(batch)
        leaves = [t for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
        labels, size = labels + _labels(batch), size + sum(t.numel() * t.element_size() for t in leaves)
        late = clock.spent - start > READING * clock.seconds and len(found) > 1
        if len(found) >= most or labels >= LABELS or size >= BYTES or late:
            break
    if not found:
        raise empty_loader()
    if not labels:
        raise no_labels()
    fit = [_item(b) for i, b in enumerate(found) if i % EVERY != 1]
    made = Sample(fit, found[1::EVERY], seconds)
    if not made.val or made.rows[1] < LEAST:
        raise EecompileError(
            "too few rows for advice",
            got=f"{sum(made.rows)} rows in {len(found)} batches",
            wanted=f"two batches or more, with {LEAST} rows in every fourth, from the second on",
            hint="more rows, a smaller batch size, or more minutes",
        )
    return made


def _seconds(model: nn.Module, batch: Batch) -> float:
    static_output(model, batch, "the model")
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model(*batch.args, **batch.kwargs)
            taken.append(time.perf_counter() - start)
    return max(median(taken), 1e-6)


def _item(batch: Batch) -> tuple[Any, Any]:
    return (batch.kwargs or batch.args), batch.labels


def _labels(batch: Batch) -> int:
    return sum(int((t != IGNORE).sum()) for t in tree_leaves(batch.labels) if isinstance(t, Tensor))


def _rows(inputs: Any) -> int:
    return next((len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), 0)
