"""What early answers are compared with: the model as it was given, without exits and with nothing left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from eecompile.ir.settings import BRANCHES, GATES, HALTING
from eecompile.result import Result
from eecompile.training.batches import Batch

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def skips(fast: CompiledModule) -> bool:
    """Whether rows may leave something out on the way to the model's own end: gates, chains that halt, or branches."""
    return any(family in fast.settings for family in (GATES, BRANCHES, HALTING))


def full_prediction(fast: CompiledModule, batch: Batch, result: Result) -> Tensor:
    """The full model's prediction for a batch that `fast.observe` gave `result` for, the model being as it was given.

    Without gates, halting and branches, and with a trunk that was not trained, that is the last of its outputs; else the
    full model runs once more.
    """
    assert result.outputs is not None
    if not skips(fast) and getattr(fast, "given", None) is None:
        return result.outputs[-1]
    found: Tensor = fast.prediction_of(fast.full(*batch.args, **batch.kwargs))
    return found
