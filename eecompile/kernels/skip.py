"""`y` where a row's gate is open, `x` where it is shut: the reference meaning of a skipped block.

`gate` `[n]` is bool, or a score in [0, 1] that opens at 0.5 and above; a NaN opens, because nothing is
skipped on a guess. Rows are copied, never blended, so both sides stay bit for bit.

Gradient: `y` and `x` get that of their own rows. A floating gate gets the straight-through estimate, the
gradient of the blend `gate * y + (1 - gate) * x` (Bengio et al. 2013; SkipNet, Wang et al. 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels.route import per_row

# --- definition -----------------------------------------------------------------------------------


def skip(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    """The definition, in plain torch.

    Args:
        gate: `[n]`, bool or floating.
        y: What the block computed; n rows along `batch_axis`.
        x: What goes past it; shape and dtype of `y`.
        batch_axis: Axis of the rows.

    Returns:
        Shape and dtype of `y`. Differentiable in `y` and `x`; in the gate only as an operator.

    Raises:
        StrategyError: Shapes or dtypes that do not fit.
    """
    _check(gate, y, x, batch_axis)
    return torch.where(per_row(is_open(gate), y, batch_axis), y, x)


def is_open(gate: Tensor) -> Tensor:
    """`[n]` bool: which gates let their row into the block."""
    return gate if gate.dtype == torch.bool else ~(gate < 0.5)


def _check(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int) -> None:
    if y.shape != x.shape or y.dtype != x.dtype:
        raise StrategyError(
            "a skipped block must hand on what it was given",
            got=f"{y.dtype} {list(y.shape)}",
            wanted=f"{x.dtype} {list(x.shape)}",
        )
    if not 0 <= batch_axis < y.ndim or gate.ndim != 1 or gate.shape[0] != y.shape[batch_axis]:
        raise StrategyError(
            "the gate does not fit the block",
            got=f"gate {list(gate.shape)}, block {list(y.shape)}, batch axis {batch_axis}",
            wanted="one gate per row",
        )


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::skip", mutates_args=())
def skip_op(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    """`skip` as `torch.ops.eecompile.skip`."""
    return skip(gate, y, x, batch_axis)


@skip_op.register_fake
def _fake(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    _check(gate, y, x, batch_axis)
    return torch.empty_like(y)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    gate, y, x, ctx.batch_axis = inputs
    ctx.through = gate.is_floating_point() and gate.requires_grad
    ctx.save_for_backward(gate, *((y, x) if ctx.through else ()))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
    gate, *sides = ctx.saved_tensors
    opened = per_row(is_open(gate), gradient, ctx.batch_axis)
    to_gate = None
    if ctx.through:
        y, x = sides
        blend = gradient.float() * (y.float() - x.float())
        to_gate = blend.movedim(ctx.batch_axis, 0).flatten(1).sum(1).to(gate.dtype)
    return to_gate, gradient.masked_fill(~opened, 0), gradient.masked_fill(opened, 0), None


skip_op.register_autograd(_backward, setup_context=_setup)
