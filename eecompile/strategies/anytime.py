"""Anytime prediction: heads everywhere that pays, so that a call can be stopped at any time and has a good answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eecompile.criteria import Criterion
from eecompile.ir.recipes import Where
from eecompile.strategies.base import ExitStrategy


@dataclass(frozen=True)
class Anytime(ExitStrategy):
    """Classifiers all along the model, distilled from its own output.

    Streams, deadlines, budgets and interrupts work with every strategy that has exits; this one puts them close together.
    Until it is calibrated hardly any row leaves by itself (threshold 1), and calibration leaves every exit open, since a
    call may be stopped there.
    """

    name: ClassVar[str] = "anytime"
    summary: ClassVar[str] = "heads everywhere that pays; deadline, budget, interrupt and stream"
    paper: ClassVar[str] = "Anytime prediction, Huang et al. 2018, arXiv:1703.09844; Zero Time Waste, Wolczyk et al. 2021"
    keep_open: ClassVar[bool] = True

    exits: Where = "everywhere"
    criterion: str | Criterion = "max_probability"
    threshold: float | tuple[float, ...] | None = 1.0
    distillation: float = 0.5
