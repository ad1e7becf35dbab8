"""BranchyNet: classifier branches at chosen depths (Teerapittayanon et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eecompile.criteria import Criterion
from eecompile.strategies.base import ExitStrategy


@dataclass(frozen=True)
class Branchy(ExitStrategy):
    """Side branches on any network: conv branches on feature maps, linear ones on sequences and vectors.

    The first three exits are spaced by cost unless `exits=` says otherwise.
    """

    name: ClassVar[str] = "branchy"
    summary: ClassVar[str] = "classifier branches at chosen depths"
    paper: ClassVar[str] = "BranchyNet, Teerapittayanon et al. 2016, arXiv:1709.01686"

    criterion: str | Criterion = "entropy"
