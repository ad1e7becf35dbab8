"""The first exit that is sure enough: the reference meaning of "early exit".

E exits and the model's own end, each with an output `[B, ...]` and a confidence `[B]`. The result has the dtype of the
model's own output: under autocast a head may give another one. Row b takes the
smallest k with `confidences[k][b] >= thresholds[k]`, else E, the model's own end. NaN is never sure, at
threshold 0 either; the confidence that is returned has 0 in its place. Rows are copied, never computed
with, so outputs stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._autograd import differentiable

# --- definition -----------------------------------------------------------------------------------


def select(outputs: Sequence[Tensor], confidences: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch. Without an exit it returns `outputs[0]` itself; the operator copies.

    Args:
        outputs: E + 1 floating tensors `[B, ...]` of one shape; the model's own output is the last.
        confidences: E + 1 tensors `[B]`.
        thresholds: `[E]` float32.

    Returns:
        Output `[B, ...]`, exit index `[B]` int64 in 0..E, confidence `[B]` float32 in [0, 1].

    Raises:
        StrategyError: Numbers or shapes do not fit.
    """
    exits = len(outputs) - 1
    _check(outputs, confidences, thresholds)
    output, value = outputs[exits], confidences[exits]
    index = torch.full(value.shape, exits, dtype=torch.int64, device=value.device)
    for k in reversed(range(exits)):  # backwards, so that an earlier exit overwrites a later one
        sure = confidences[k] >= thresholds[k]
        output = torch.where(sure.view(-1, *(1,) * (output.ndim - 1)), outputs[k].to(output.dtype), output)
        value = torch.where(sure, confidences[k], value)
        index = index.masked_fill(sure, k)
    return output, index, value.float().masked_fill(value.isnan(), 0)


def _check(outputs: Sequence[Tensor], confidences: Sequence[Tensor], thresholds: Tensor) -> None:
    if not outputs or len(outputs) != len(confidences) or thresholds.ndim != 1:
        raise StrategyError(
            "select needs one confidence per output and thresholds in one row",
            got=f"{len(outputs)} and {len(confidences)}, thresholds {list(thresholds.shape)}",
            wanted="E + 1 outputs, E + 1 confidences, thresholds [E]",
        )
    if thresholds.shape[0] != len(outputs) - 1:
        raise StrategyError("select needs one threshold per exit", got=thresholds.shape[0], wanted=len(outputs) - 1)
    last = outputs[-1]
    for k, (output, value) in enumerate(zip(outputs, confidences, strict=True)):
        if output.shape != last.shape or value.ndim != 1:
            raise StrategyError(
                "an exit's output does not look like the model's own",
                where=f"exit {k}",
                got=f"{list(output.shape)}, confidence {list(value.shape)}",
                wanted=f"{list(last.shape)}, confidence [B]",
            )


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::select", mutates_args=())
def select_op(outputs: Sequence[Tensor], confidences: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`select` as `torch.ops.eecompile.select`."""
    output, index, value = select(outputs, confidences, thresholds)
    return output.clone() if len(outputs) == 1 else output, index, value


@select_op.register_fake
def _fake(outputs: Sequence[Tensor], confidences: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(outputs, confidences, thresholds)
    last, value = outputs[-1], confidences[-1]
    return (
        torch.empty_like(last),
        value.new_empty(value.shape, dtype=torch.int64),
        value.new_empty(value.shape, dtype=torch.float32),
    )


differentiable(select_op, select)
