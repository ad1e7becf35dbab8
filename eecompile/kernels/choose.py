"""Each row from one of several values: the reference meaning of gates, halting steps, widths and branches.

K values `[.., n, ..]` of one shape; row i of the result is row i of `values[k_i]`, copied bit for bit, never blended.
`index` says which:

| index | k_i |
|---|---|
| `[n]` integer | the index itself; below 0 the first value, past the end the last |
| `[n]` bool | 1 where a gate is open, of two values |
| `[n]` floating | 1 where it is 0.5 or more, of two values; a NaN opens, because nothing is skipped on a guess |
| `[n, K]` floating | that of the largest weight (ties: the lowest; NaN counts as -inf) |

Gradient: every value gets that of its own rows. A floating index gets the straight-through estimate, the gradient of the
blend `(1 - index) * values[0] + index * values[1]`, or `sum_k index[:, k] * values[k]` (Bengio et al. 2013; SkipNet, Wang et
al. 2018).
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, power_of_2, runs_on, tl, triton
from eecompile.kernels.gather import as_words, rows_of

# --- definition -----------------------------------------------------------------------------------


def choose(index: Tensor, values: Sequence[Tensor], batch_axis: int = 0) -> Tensor:
    """The definition, in plain torch. With one value it returns that value itself; the operator copies.

    Args:
        index: `[n]` bool, integer or floating, or `[n, K]` floating; see above.
        values: K tensors of one shape and dtype, n rows along `batch_axis`.
        batch_axis: Axis of the rows.

    Returns:
        Shape and dtype of a value. Differentiable in the values; in the index only as an operator.

    Raises:
        StrategyError: No value, or shapes or dtypes that do not fit.
    """
    _check(index, values, batch_axis)
    picked = chosen(index)
    result = values[-1]
    for k in reversed(range(len(values) - 1)):
        here = picked <= 0 if k == 0 else picked == k
        result = torch.where(per_row(here, result, batch_axis), values[k], result)
    return result


def chosen(index: Tensor) -> Tensor:
    """Which value each row takes, `[n]` int64."""
    if index.ndim == 2:
        return index.masked_fill(index.isnan(), -math.inf).max(-1).indices
    return is_open(index).long() if index.is_floating_point() else index.long()


def is_open(gate: Tensor) -> Tensor:
    """Which gates let their row in, `[n]` bool: `gate` is bool, or floating and open at 0.5 or more and for NaN."""
    return gate if gate.dtype == torch.bool else ~(gate < 0.5)


def per_row(rows: Tensor, like: Tensor, batch_axis: int) -> Tensor:
    """`rows` `[n]` shaped so that it broadcasts along `batch_axis` of `like`."""
    return rows.view(-1, *(1,) * (like.ndim - batch_axis - 1))


def _check(index: Tensor, values: Sequence[Tensor], batch_axis: int) -> None:
    if not values:
        raise StrategyError("there is nothing to choose from", got="no values", wanted="at least one")
    first, integer = values[0], not (index.is_floating_point() or index.dtype == torch.bool)
    for k, value in enumerate(values):
        if value.shape != first.shape or value.dtype != first.dtype:
            raise StrategyError(
                "the values to choose from differ: a skipped block and every branch hand on what the model does there",
                where=f"value {k}",
                got=f"{value.dtype} {list(value.shape)}",
                wanted=f"{first.dtype} {list(first.shape)}",
            )
    if not 0 <= batch_axis < first.ndim:
        raise StrategyError("no such batch axis", got=batch_axis, wanted=f"0 to {first.ndim - 1}")
    n, count = first.shape[batch_axis], len(values)
    fits = [n, count] if index.ndim == 2 and index.is_floating_point() else [n]
    if list(index.shape) != fits or (index.ndim == 1 and not integer and count != 2):
        raise StrategyError(
            "the index does not fit the values",
            got=f"{index.dtype} {list(index.shape)} for {count} values with {n} rows",
            wanted="one integer for each row, one bool or score for two values, or one weight for each row and value",
        )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def choose_kernel(index, values, strides, result, rows, inner, SCORE: tl.constexpr, BLOCK: tl.constexpr):
        """One block of one row of words; `strides` are (outer, row) of each value, and `result` is contiguous."""
        blocks = tl.cdiv(inner, BLOCK)
        pid = tl.program_id(0).to(tl.int64)
        line = pid // blocks
        r, o = line % rows, line // rows
        word = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        k = tl.load(index + r)
        if SCORE:
            k = 1 - (k.to(tl.float32) < 0.5).to(tl.int32)  # 1 for NaN: it opens
        k = tl.minimum(tl.maximum(k.to(tl.int32), 0), len(values) - 1)
        for i in tl.static_range(len(values)):
            if k == i:
                x = tl.load(values[i] + o * strides[i][0] + r * strides[i][1] + word, mask=word < inner)
                tl.store(result + line * inner + word, x, mask=word < inner)


# --- launch ---------------------------------------------------------------------------------------


def launch_choose(index: Tensor, values: Sequence[Tensor], batch_axis: int = 0) -> Tensor:
    """`choose` as one kernel that reads only the rows that are taken."""
    _check(index, values, batch_axis)
    result = torch.empty(values[0].shape, dtype=values[0].dtype, device=values[0].device)
    if not result.numel():
        return result
    views = []
    for side in (*values, result):
        view = rows_of(side, batch_axis)
        views.append(rows_of(side.contiguous(), batch_axis) if view is None else view)
    *words, out = as_words(views)  # type: ignore[arg-type]
    outer, rows, inner = out.shape
    block = min(power_of_2(inner), 1024)
    index = (chosen(index) if index.ndim == 2 else index).contiguous()
    LAUNCHES["choose"] += 1
    choose_kernel[(outer * rows * triton.cdiv(inner, block),)](
        index,
        tuple(words),
        tuple((w.stride(0), w.stride(1)) for w in words),
        out,
        rows,
        inner,
        SCORE=index.is_floating_point(),
        BLOCK=block,
        enable_fp_fusion=True,
    )
    return result


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::choose", mutates_args=())
def choose_op(index: Tensor, values: Sequence[Tensor], batch_axis: int) -> Tensor:
    """`choose` as `torch.ops.eecompile.choose`: the kernel where it can run, else the definition.

    No argument has a default, because autograd loses those next to a list.
    """
    if runs_on(index):
        return launch_choose(index, values, batch_axis)
    result = choose(index, values, batch_axis)
    return result.clone() if len(values) == 1 else result


@choose_op.register_fake
def _fake(index: Tensor, values: Sequence[Tensor], batch_axis: int) -> Tensor:
    _check(index, values, batch_axis)
    return torch.empty_like(values[-1])


def _setup(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], int], output: Tensor) -> None:
    index, values, ctx.batch_axis = inputs
    ctx.count, ctx.through = len(values), index.is_floating_point() and index.requires_grad
    ctx.save_for_backward(index, *(values if ctx.through else ()))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    index, *values = ctx.saved_tensors
    picked = chosen(index).clamp(0, ctx.count - 1)
    to_values: list[Tensor | None] = [
        gradient.masked_fill(per_row(picked != k, gradient, ctx.batch_axis), 0) for k in range(ctx.count)
    ]
    if not ctx.through:
        return None, to_values, None

    def summed(product: Tensor) -> Tensor:
        return product.movedim(ctx.batch_axis, 0).flatten(1).sum(1)

    wide = gradient.float()
    if index.ndim == 1:
        to_index = summed(wide * (values[1].float() - values[0].float()))
    else:
        to_index = torch.stack([summed(wide * v.float()) for v in values], -1)
    return to_index.to(index.dtype), to_values, None


choose_op.register_autograd(_backward, setup_context=_setup)
