"""The passes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eecompile.passes.annotate import Annotate
from eecompile.passes.base import Pass, PassResult, check_order, run_passes
from eecompile.passes.find_blocks import FindBlocks
from eecompile.passes.find_cuts import FindCuts
from eecompile.passes.insert_exits import InsertExits
from eecompile.passes.lower import Lower
from eecompile.passes.normalize import Normalize
from eecompile.passes.place_exits import PlaceExits
from eecompile.passes.stage import StagePass
from eecompile.passes.verify import Verify
from eecompile.strategies.base import Recipe


def analysis(
    example: tuple[torch.Tensor, ...] | None = None, measure: bool = False, blocks: str | None = None
) -> list[Pass]:
    """What every strategy needs to know before it can be placed."""
    return [Normalize(), Annotate(example, measure), FindBlocks(blocks), FindCuts()]


def insertion(
    recipe: Recipe, example: tuple[torch.Tensor, ...] | None, thresholds: Sequence[float] | None, seed: int
) -> list[Pass]:
    """What puts a recipe into the graph and lowers it. Each primitive is its own passes; absent ones add none."""
    passes: list[Pass] = []
    if recipe.exits is not None:
        passes += [
            PlaceExits(recipe.exits, example),
            InsertExits(recipe.exits.head, tuple(thresholds or ()), seed=seed),
        ]
    return [*passes, StagePass(), Lower(), Verify(example)]


__all__ = [
    "Annotate",
    "FindBlocks",
    "FindCuts",
    "InsertExits",
    "Lower",
    "Normalize",
    "Pass",
    "PassResult",
    "PlaceExits",
    "StagePass",
    "Verify",
    "analysis",
    "check_order",
    "insertion",
    "run_passes",
]
