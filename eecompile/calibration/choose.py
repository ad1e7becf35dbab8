"""Learn then Test: the cheapest of several settings that provably lose little, whatever it is that they set.

The settings stand in a path, from hardly any loss to more and more, that was found on one part of the rows. On the other
part the hypotheses "E[loss] > max_drop" are tested in that order (`risk.fallback`). All rejected ones satisfy the bound at
once with probability 1 - delta over the calibration data, so the cheapest of them may be chosen by looking at all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eecompile.calibration.options import Options, starts
from eecompile.calibration.risk import fallback, p_values

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What was chosen.

    Attributes:
        value: None where nothing qualified that saves anything.
        p_value: Of "the mean loss is above max_drop", tested at `level`; None without a test.
        tested: Settings in the path; `accepted` of them qualified.
        smallest: The smallest p-value of all that were tested.
    """

    value: T | None
    p_value: float | None
    level: float | None
    tested: int
    accepted: int
    smallest: float | None


@dataclass
class Path(Generic[T]):
    """Settings by growing loss.

    Attributes:
        drop: Of a setting, float64 [n]: score of the full model less the score under the setting.
        cost: Its mean cost on all rows.
        full_cost: Mean cost of leaving nothing out.
        binary: Whether scores are 0 or 1.
    """

    settings: Sequence[T]
    drop: Callable[[T], Tensor]
    cost: Callable[[T], float]
    full_cost: float
    binary: bool

    def choose(self, test: Tensor, options: Options) -> Chosen[T]:
        """The cheapest setting that keeps the bound: on all rows for `delta=None`, else as shown on the rows of `test`."""
        known: dict[int, float] = {}

        def p_value(i: int) -> float:
            loss = self.drop(self.settings[i])[test].clamp(min=0).sum()
            known[i] = float(p_values(loss, len(test), options.max_drop, binary=self.binary))
            return known[i]

        accepted: list[tuple[int, float | None]]
        if options.delta is None:
            most = options.max_drop + 1e-9
            accepted = [(i, None) for i, s in enumerate(self.settings) if float(self.drop(s).mean()) <= most]
        else:
            accepted = [*fallback(p_value, len(self.settings), starts(len(self.settings), options.delta))]
        costs = [self.cost(self.settings[i]) for i, _ in accepted]
        best = min(range(len(costs)), key=costs.__getitem__, default=None)
        counts = len(self.settings), len(accepted), min(known.values(), default=None)
        if best is None or costs[best] >= self.full_cost - 1e-12:
            return Chosen(None, None, None, *counts)
        i, level = accepted[best]
        return Chosen(self.settings[i], known.get(i), level, *counts)


def is_binary(scores: Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def split(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the search, those with the smallest keys, and rows of the test."""
    order = torch.argsort(keys, stable=True)
    return order[:size], order[size:]
