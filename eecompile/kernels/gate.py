"""Whether a row goes into a gated region: its score against the gate's threshold.

    open_i = (not (score_i < thresholds[index]) or opened_i < least) and thresholds[index] <= 1

so a threshold of 0 keeps the gate open, one above 1 keeps it closed, and a NaN opens it, because nothing is skipped on
a guess. `opened` counts the gates that let the row in before; fewer than `least` force this one open.

Gradient: straight through, that of the score (Bengio et al. 2013).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError

# --- definition -----------------------------------------------------------------------------------


def gate(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """The definition, in plain torch.

    Args:
        score: `[n]` floating, in [0, 1].
        thresholds: `[G]` float32.
        index: Which gate, 0 to G - 1.
        opened: `[n]` floating, how many gates let the row in so far; None for 0.
        least: How many must have, this one included.

    Returns:
        `[n]` float32, 1 for open and 0 for closed.

    Raises:
        StrategyError: Shapes that do not fit.
    """
    _check(score, thresholds, index, opened)
    threshold = thresholds[index]
    open_ = ~(score.float() < threshold)
    if least > 0:
        open_ = torch.ones_like(open_) if opened is None else open_ | (opened < least)
    return (open_ & (threshold <= 1)).float()


def _check(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None) -> None:
    if score.ndim != 1 or thresholds.ndim != 1 or not 0 <= index < thresholds.shape[0]:
        raise StrategyError(
            "a gate's score or threshold does not fit",
            got=f"score {list(score.shape)}, thresholds {list(thresholds.shape)}, gate {index}",
            wanted="one score per row, one threshold per gate",
        )
    if opened is not None and opened.shape != score.shape:
        raise StrategyError("the count of open gates does not fit", got=list(opened.shape), wanted=list(score.shape))


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::gate", mutates_args=())
def gate_op(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """`gate` as `torch.ops.eecompile.gate`."""
    return gate(score, thresholds, index, opened, least)


@gate_op.register_fake
def _fake(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    return torch.empty_like(score, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, Tensor | None, int], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return gradient.to(ctx.dtype), None, None, None, None


gate_op.register_autograd(_backward, setup_context=_setup)
