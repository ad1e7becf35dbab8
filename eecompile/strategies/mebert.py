"""Multi-exit BERT: a classifier after every Transformer block (DeeBERT, PABEE, BERxiT and relatives)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eecompile.criteria import Criterion
from eecompile.ir.recipes import Where
from eecompile.strategies.base import ExitStrategy


@dataclass(frozen=True)
class MeBert(ExitStrategy):
    """A classifier after every block of an encoder: over the mean of the real positions, or what `fit` finds best.

    Args:
        two_stage: Train trunk and last classifier first, then the exits with the trunk frozen (DeeBERT). False trains
            all at once where the trunk is trained at all.
    """

    name: ClassVar[str] = "mebert"
    summary: ClassVar[str] = "a classifier after each Transformer block"
    paper: ClassVar[str] = "DeeBERT, Xin et al. 2020, arXiv:2004.12993; PABEE, Zhou et al. 2020, arXiv:2006.04152"

    exits: Where = "every-block"
    criterion: str | Criterion = "entropy"
    two_stage: bool = False  # type: ignore[misc]
