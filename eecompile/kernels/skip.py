"""`y` where a row's gate is open, `x` where it is shut: the reference meaning of a skipped block.

`gate` `[n]` is bool, or a score in [0, 1] that opens at 0.5 and above; a NaN opens, because nothing is
skipped on a guess. Rows are copied, never blended, so both sides stay bit for bit.

Gradient: `y` and `x` get that of their own rows. A floating gate gets the straight-through estimate, the
gradient of the blend `gate * y + (1 - gate) * x` (Bengio et al. 2013; SkipNet, Wang et al. 2018).

`pool_gate` takes the decision itself, for executors: from the features of n live rows, a linear gate on
their mean over positions, the list of rows whose gate opens (as `decide` lists survivors), and how many
there are:

    score_i = sigmoid(mean_p x[i, p] . weight + bias),   open_i = not (score_i < thresholds[gate])

The block then runs on the open rows (`gather`), and its result goes back over `x` (`scatter`).
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._lists import control_size, write_lists
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, power_of_2, runs_on, tl, triton
from eecompile.kernels.gather import as_words, rows_of
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


def pool_gate(
    x: Tensor,
    rows: Tensor | None,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    gate: int,
    buckets: Tensor,
    score: Tensor,
    opened: Tensor,
    positions: Tensor,
    control: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The definition, in plain torch, without a value on the host.

    Args:
        x: `[capacity, P, D]` float, any strides; a feature map `[n, C, H, W]` is `x.flatten(2).mT`.
        rows: `[capacity]` int64, the samples of the live rows; None for 0, 1, 2, ...
        count: `[1]` int32 or more; the first element is n.
        weight: `[D]` float.
        bias: `[1]` float.
        thresholds: `[G]` float32, one per gate.
        gate: Index of this gate.
        buckets: `[K]` int32, ascending.
        score: `[B]` float32 per sample, 1 for a NaN; written.
        opened: `[capacity]` int64, the samples of the open rows, then -1; written. Must not be `rows`.
        positions: `[capacity]` int64, where in `x` they are, then -1; written.
        control: `[control_size(capacity)]` int32, as of `decide`; written.
        dtype: Arithmetic; float32 everywhere but in tests.

    Raises:
        StrategyError: Shapes that do not fit.
    """
    _check_pool(x, weight, opened, positions, control)
    capacity = x.shape[0]
    index = torch.arange(capacity, device=x.device)
    inside = index < count[0]
    rows = index if rows is None else rows
    value = torch.sigmoid(x.to(dtype).mean(1) @ weight.to(dtype) + bias.to(dtype))
    safe = torch.where(inside, rows, score.shape[0])
    score.copy_(torch.cat((score, score[:1])).scatter(0, safe, value.nan_to_num(nan=1.0).float())[:-1])
    write_lists(inside & ~(value < thresholds[gate]), rows, buckets, opened, positions, control)


def _check_pool(x: Tensor, weight: Tensor, opened: Tensor, positions: Tensor, control: Tensor) -> None:
    n = x.shape[0]
    fits = x.ndim == 3 and x.shape[1] > 0 and weight.shape == x.shape[2:] and opened.shape == (n,)
    if not fits or positions.shape != (n,) or control.shape[0] < control_size(n):
        raise StrategyError(
            "the buffers of a gate do not fit together",
            got=f"x {list(x.shape)}, weight {list(weight.shape)}, lists {list(opened.shape)}",
            wanted="x [n, P, D] with P > 0, weight [D], lists [n], control [n + 4]",
        )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:
    from eecompile.kernels._online import bucket_of, compact, last_block_done

    @triton.jit
    def skip_kernel(
        gate,
        y,
        x,
        result,
        rows,
        inner,
        y_outer,
        y_row,
        x_outer,
        x_row,
        IS_BOOL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One block of one row of words; `result` is contiguous."""
        blocks = tl.cdiv(inner, BLOCK)
        pid = tl.program_id(0).to(tl.int64)
        line = pid // blocks
        r, o = line % rows, line // rows
        word = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gate + r)
        if IS_BOOL:
            shut = (g == 0).to(tl.int32)
        else:
            shut = (g.to(tl.float32) < 0.5).to(tl.int32)  # false for NaN: it opens
        if shut > 0:
            value = tl.load(x + o * x_outer + r * x_row + word, mask=word < inner)
        else:
            value = tl.load(y + o * y_outer + r * y_row + word, mask=word < inner)
        tl.store(result + line * inner + word, value, mask=word < inner)

    @triton.jit(do_not_specialize=["capacity", "K", "gate"])
    def pool_gate_kernel(
        x,
        rows,
        count,
        weight,
        bias,
        thresholds,
        buckets,
        score,
        opened,
        positions,
        control,
        stride_row,
        stride_position,
        stride_feature,
        P,
        D,
        capacity,
        K,
        gate,
        IDENTITY: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        MAX_K: tl.constexpr,
    ):
        """One live row per block; the last block to finish writes the lists."""
        n = tl.load(count)
        i = tl.program_id(0).to(tl.int64)
        flag = tl.zeros((), tl.int32)
        if i < n:
            total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
                for p0 in range(0, P, BLOCK_P):
                    p = p0 + tl.arange(0, BLOCK_P)
                    mask = (p < P)[:, None] & (d < D)[None, :]
                    at = p.to(tl.int64)[:, None] * stride_position + d.to(tl.int64)[None, :] * stride_feature
                    total += tl.load(x + i * stride_row + at, mask=mask, other=0.0).to(tl.float32) * w[None, :]
            logit = tl.sum(tl.sum(total, 1), 0) / P + tl.load(bias).to(tl.float32)
            value = 1.0 / (1.0 + tl.exp(-logit))
            flag = 1 - (value < tl.load(thresholds + gate)).to(tl.int32)
            row = i
            if not IDENTITY:
                row = tl.load(rows + i)
            tl.store(score + row, tl.where(value == value, value, 1.0))
        tl.store(control + 4 + i, flag)
        if last_block_done(control + 3, tl.num_programs(0)):
            found = compact(control + 4, rows, positions, opened, n, capacity, IDENTITY, BLOCK_N)
            tl.store(control, found)
            tl.store(control + 1, bucket_of(found, buckets, K, MAX_K))
            tl.store(control + 2, (found > 0).to(tl.int32))


# --- launch ---------------------------------------------------------------------------------------


def launch_skip(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    """`skip` as one kernel that reads only the side that is taken."""
    _check(gate, y, x, batch_axis)
    result = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return result
    views = []
    for side in (y, x, result):
        view = rows_of(side, batch_axis)
        views.append(rows_of(side.contiguous(), batch_axis) if view is None else view)
    of_y, of_x, out = as_words(views)  # type: ignore[arg-type]
    outer, rows, inner = out.shape
    block = min(power_of_2(inner), 1024)
    LAUNCHES["skip"] += 1
    skip_kernel[(outer * rows * triton.cdiv(inner, block),)](
        gate.contiguous(),
        of_y,
        of_x,
        out,
        rows,
        inner,
        of_y.stride(0),
        of_y.stride(1),
        of_x.stride(0),
        of_x.stride(1),
        IS_BOOL=gate.dtype == torch.bool,
        BLOCK=block,
        enable_fp_fusion=True,
    )
    return result


def launch_pool_gate(
    x: Tensor,
    rows: Tensor | None,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    gate: int,
    buckets: Tensor,
    score: Tensor,
    opened: Tensor,
    positions: Tensor,
    control: Tensor,
) -> None:
    """`pool_gate` as one kernel."""
    _check_pool(x, weight, opened, positions, control)
    capacity, P, D = x.shape
    block_p = min(power_of_2(P), 64)
    LAUNCHES["pool_gate"] += 1
    pool_gate_kernel[(capacity,)](
        x,
        opened if rows is None else rows,
        count,
        weight,
        bias,
        thresholds,
        buckets,
        score,
        opened,
        positions,
        control,
        *x.stride(),
        P,
        D,
        capacity,
        buckets.numel(),
        gate,
        IDENTITY=rows is None,
        BLOCK_P=block_p,
        BLOCK_D=min(power_of_2(D), 2048 // block_p),
        BLOCK_N=min(power_of_2(capacity), 1024),
        MAX_K=power_of_2(max(buckets.numel(), 2)),
        enable_fp_fusion=True,
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


@torch.library.custom_op("eecompile::pool_gate", mutates_args=("score", "opened", "positions", "control"))
def pool_gate_op(
    x: Tensor,
    rows: Tensor | None,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    thresholds: Tensor,
    gate: int,
    buckets: Tensor,
    score: Tensor,
    opened: Tensor,
    positions: Tensor,
    control: Tensor,
) -> None:
    """`pool_gate` as `torch.ops.eecompile.pool_gate`: the kernel where it can run, else the definition."""
    run = launch_pool_gate if runs_on(x) else pool_gate
    run(x, rows, count, weight, bias, thresholds, gate, buckets, score, opened, positions, control)


@pool_gate_op.register_fake
def _fake_pool(x: Tensor, rows: Tensor | None, count: Tensor, weight: Tensor, *rest: object) -> None:
    return None
