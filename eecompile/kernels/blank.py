"""Marks what an early exit never computed.

An output leaf other than the prediction (a hidden state, a cache) exists only for the rows that got as far
as `available` exits. The other rows become NaN, or 0 / False where the dtype has no NaN, so that a row that
was computed for nothing in the reference and one that was not computed at all in an executor look the same.
Untouched rows keep their bits: -0.0 and NaN payloads included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._autograd import differentiable

# --- definition -----------------------------------------------------------------------------------


def blank(leaf: Tensor, exit_index: Tensor, available: int, batch_axis: int) -> Tensor:
    """The definition, in plain torch; always a new tensor.

    Args:
        leaf: Any dtype; `[B]` rows along `batch_axis`.
        exit_index: `[B]` int64.
        available: The first exit index at which the leaf has been computed.
        batch_axis: Axis of the batch; -1 where the leaf has none: then it is blanked once no row got to
            `available`.

    Returns:
        The leaf with NaN (floating, complex) or 0 / False in the rows where `exit_index < available`.

    Raises:
        StrategyError: The axis is not one of the leaf's, or has another size than `exit_index`.
    """
    gone = exit_index < available
    fill = math.nan if leaf.is_floating_point() or leaf.is_complex() else 0
    if batch_axis == -1:
        return leaf.masked_fill(gone.all(), fill)
    if not 0 <= batch_axis < leaf.ndim or leaf.shape[batch_axis] != exit_index.shape[0]:
        raise StrategyError(
            "a leaf does not have the batch where it should",
            got=f"shape {list(leaf.shape)}, batch axis {batch_axis}",
            wanted=f"{exit_index.shape[0]} rows along that axis, or -1 for a leaf without a batch",
        )
    return leaf.masked_fill(gone.view(-1, *(1,) * (leaf.ndim - batch_axis - 1)), fill)


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::blank", mutates_args=())
def blank_op(leaf: Tensor, exit_index: Tensor, available: int, batch_axis: int) -> Tensor:
    """`blank` as `torch.ops.eecompile.blank`."""
    return blank(leaf, exit_index, available, batch_axis)


@blank_op.register_fake
def _fake(leaf: Tensor, exit_index: Tensor, available: int, batch_axis: int) -> Tensor:
    return torch.empty_like(leaf)


differentiable(blank_op, blank)
