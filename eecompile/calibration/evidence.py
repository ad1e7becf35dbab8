"""What thresholds are chosen from: for every row and exit a confidence and a loss, and what leaving costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eecompile.ir.settings import CLOSED
from eecompile.training.curve import first_exit

Costs = Callable[[tuple[bool, ...]], Tensor]
Confidences = Callable[[tuple[bool, ...]], Tensor]


def sane(confidences: Tensor) -> Tensor:
    """Confidences with -1, which never reaches a threshold, in place of NaN and inf."""
    return torch.where(confidences.isfinite(), confidences, torch.tensor(-1.0, dtype=confidences.dtype))


@dataclass
class Evidence:
    """n rows, E exits.

    Attributes:
        confidences: float32 `[n, E]` with all exits open, -1 where not finite.
        loss: float64 `[n, E + 1]` of leaving at each exit; the last column, the model's own end, is 0.
        costs: Open pattern to float64 `[E + 1]`.
        recompute: For criteria with state: open pattern to confidences `[n, E]`. None where they do not
            depend on it.
        keep_open: Whether every exit stays open, so that a threshold is at most 1: rows with a confidence of 1 leave.
    """

    confidences: Tensor
    loss: Tensor
    costs: Costs
    recompute: Confidences | None = None
    keep_open: bool = False
    _known: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return self.loss.shape[0]

    @property
    def exits(self) -> int:
        return self.loss.shape[1] - 1

    @property
    def never(self) -> float:
        """The threshold of an exit that as few rows as possible leave at."""
        return 1.0 if self.keep_open else CLOSED

    def of(self, is_open: tuple[bool, ...]) -> Tensor:
        """Confidences when these exits are open."""
        if self.recompute is None:
            return self.confidences
        if is_open not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            self._known[is_open] = sane(self.recompute(is_open))
        return self._known[is_open]

    def leave(self, thresholds: Tensor) -> Tensor:
        """int64 `[n]`: the exit that each row takes. `thresholds` float32 `[E]`."""
        return first_exit(self.of(pattern(thresholds)), thresholds)

    def losses(self, thresholds: Tensor) -> Tensor:
        """float64 `[n]`: the loss of each row under these thresholds."""
        return self.loss.gather(1, self.leave(thresholds)[:, None])[:, 0]

    def measure(self, thresholds: Tensor) -> tuple[float, float]:
        """Sum of the losses and mean cost under these thresholds."""
        index = self.leave(thresholds)
        total = float(self.loss.gather(1, index[:, None]).sum())
        return total, float(self.costs(pattern(thresholds))[index].mean())

    def part(self, rows: Tensor) -> Evidence:
        """The evidence of some rows."""
        recompute = self.recompute
        some = None if recompute is None else lambda is_open: recompute(is_open)[rows]
        return Evidence(self.confidences[rows], self.loss[rows], self.costs, some, self.keep_open)


def pattern(thresholds: Tensor) -> tuple[bool, ...]:
    return tuple(bool(t) for t in (thresholds <= 1).tolist())


def remembered(costs: Callable[[tuple[bool, ...]], Tensor]) -> Costs:
    """`costs` as float64 on the CPU, each pattern asked for once."""
    known: dict[tuple[bool, ...], Tensor] = {}

    def ask(is_open: tuple[bool, ...]) -> Tensor:
        if is_open not in known:
            known[is_open] = costs(is_open).double().cpu()
        return known[is_open]

    return ask
