"""BranchyNet: classifier branches at chosen depths (Teerapittayanon et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eecompile.criteria import Criterion
from eecompile.ir.recipes import Where
from eecompile.strategies.base import ExitStrategy
from eecompile.strategies.router import router


@dataclass(frozen=True)
class Branchy(ExitStrategy):
    """Side branches on any network: conv branches on feature maps, linear ones on sequences and vectors.

    Three exits are spaced by cost unless `exits=` says otherwise; none where a router has branches of its own to send rows
    to. With `router=` rows are sent straight to one exit, or into a lighter version of a part of the model.
    """

    name: ClassVar[str] = "branchy"
    summary: ClassVar[str] = "classifier branches at chosen depths"
    paper: ClassVar[str] = "BranchyNet, Teerapittayanon et al. 2016, arXiv:1709.01686"

    exits: Where = "auto"
    criterion: str | Criterion = "entropy"

    def __post_init__(self) -> None:
        if isinstance(self.exits, str) and self.exits == "auto":
            sent = router(self.router)
            object.__setattr__(self, "exits", 3 if sent is None or sent.to_exits else 0)
        super().__post_init__()
