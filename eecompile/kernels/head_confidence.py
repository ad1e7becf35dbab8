"""Hidden states straight to confidence: the logits of a large vocabulary are never written to memory.

    z[i, v] = (hidden[i] . weight[v] + bias[v]) / temperature
    confidence[i] as in `confidence` from the row z[i];   margin[i] = p1 - p2;   top1[i] = the lowest argmax
    of z[i]

Shapes: hidden `[n, D]`, weight `[V, D]` of one dtype (float32, float16, bfloat16), bias `[V]`. Products
accumulate in float32 (float32 inputs are not rounded to TF32), and so does the online softmax (Milakov and
Gimelshein 2018). A row that cannot be read (a NaN or a +inf among its logits, or nothing but -inf) has
confidence and margin NaN, which is never sure, and class -1.

One launch: every block streams a range of the vocabulary once and leaves the statistics of its range; the
last block of each group of rows merges them, in the order of the vocabulary, so that ties stay with the
lowest index.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import math

import torch
from torch import Tensor

from eecompile.errors import StrategyError, near
from eecompile.kernels._triton import HAVE_TRITON, INTERPRETED, LAUNCHES, power_of_2, runs_on, tl, triton
from eecompile.kernels.confidence import confidence as _confidence

CRITERIA = ("max_probability", "entropy", "margin", "energy")

# --- definition -----------------------------------------------------------------------------------


def head_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    criterion: str = "max_probability",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch; it does write the logits.

    Args:
        hidden: `[n, D]` float.
        weight: `[V, D]` float, of the same dtype.
        bias: `[V]` float, or None.
        temperature: 0-dim float32, above 0.
        criterion: One of "max_probability", "entropy", "margin", "energy".
        dtype: Arithmetic and result; float32 everywhere but in tests.

    Returns:
        Confidence `[n]`, top-1 class `[n]` int64, margin `[n]`.

    Raises:
        StrategyError: Another criterion, or shapes or dtypes that do not fit.
    """
    _check(hidden, weight, bias, criterion)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    value, _ = _confidence(logits, None, criterion, temperature, dtype=dtype)
    margin, _ = _confidence(logits, None, "margin", temperature, dtype=dtype)
    return value, (logits / temperature).max(-1).indices.masked_fill(value.isnan(), -1), margin


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, criterion: str) -> None:
    if criterion not in CRITERIA:
        raise StrategyError("a fused head cannot use this criterion", got=repr(criterion), wanted=near(criterion, CRITERIA))
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and weight.shape[0] > 0
    if not fits or hidden.dtype != weight.dtype or (bias is not None and bias.shape != weight.shape[:1]):
        raise StrategyError(
            "hidden state and class matrix do not fit",
            got=f"{hidden.dtype} {list(hidden.shape)} and {weight.dtype} {list(weight.shape)}",
            wanted="[n, D] and [V, D] of one dtype, bias [V]",
        )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:
    from eecompile.kernels._online import block_statistics, criterion_value, last_block_done, merge

    @triton.jit(do_not_specialize=["n", "V", "splits", "tiles"])
    def head_kernel(
        hidden,
        weight,
        bias,
        temperature,
        partial,
        partial_index,
        counters,
        value,
        top1,
        margin,
        hidden_row,
        weight_row,
        n,
        V,
        D,
        splits,
        tiles,
        padded,
        CRITERION: tl.constexpr,
        BIAS: tl.constexpr,
        WIDEN: tl.constexpr,
        N: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """Block (b, s): rows b * N .. of `hidden` against tiles s * `tiles` .. of the vocabulary.

        `partial` [4, splits, padded] float32 and `partial_index` [2, splits, padded] int32 hold what is
        merged.
        """
        s = tl.program_id(1)  # the slow axis: groups of rows that share a range of weights run side by side
        rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        live = rows < n
        scale = tl.load(temperature)
        top = tl.full((N,), float("-inf"), tl.float32)
        second = tl.full((N,), float("-inf"), tl.float32)
        total = tl.zeros((N,), tl.float32)
        moment = tl.zeros((N,), tl.float32)
        arg = tl.zeros((N,), tl.int32)
        bad = tl.zeros((N,), tl.int32)
        for tile in range(s * tiles, tl.minimum((s + 1) * tiles, tl.cdiv(V, BLOCK_V))):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = columns < V
            w_at = weight + columns.to(tl.int64)[:, None] * weight_row
            h_at = hidden + rows[None, :] * hidden_row
            product = tl.zeros((BLOCK_V, N), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                w = tl.load(w_at + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
                h = tl.load(h_at + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
                if WIDEN:
                    w, h = w.to(tl.float32), h.to(tl.float32)
                product = tl.dot(w, h, product, input_precision="ieee")
            if BIAS:
                product += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
            z = tl.trans(tl.where(inside[:, None], product / scale, float("-inf")))
            broken = (z != z) | (z == float("inf"))
            bad = tl.maximum(bad, tl.max(broken.to(tl.int32), 1))
            z = tl.where(broken, float("-inf"), z)
            top_b, second_b, total_b, moment_b, arg_b = block_statistics(z, columns)
            top, second, total, moment, arg = merge(
                top, second, total, moment, arg, top_b, second_b, total_b, moment_b, arg_b
            )
        plane = splits.to(tl.int64) * padded
        at = s.to(tl.int64) * padded + rows
        tl.store(partial + at, top)
        tl.store(partial + plane + at, second)
        tl.store(partial + 2 * plane + at, total)
        tl.store(partial + 3 * plane + at, moment)
        tl.store(partial_index + at, arg)
        tl.store(partial_index + plane + at, bad)
        if last_block_done(counters + tl.program_id(0), splits):
            top = tl.full((N,), float("-inf"), tl.float32)
            second = tl.full((N,), float("-inf"), tl.float32)
            total = tl.zeros((N,), tl.float32)
            moment = tl.zeros((N,), tl.float32)
            arg = tl.zeros((N,), tl.int32)
            bad = tl.zeros((N,), tl.int32)
            for s0 in range(0, splits, SPLITS):
                part = s0 + tl.arange(0, SPLITS)
                there = (part < splits)[None, :] & (rows >= 0)[:, None]
                of = part.to(tl.int64)[None, :] * padded + rows[:, None]
                tops = tl.load(partial + of, mask=there, other=float("-inf"), cache_modifier=".cg")
                seconds = tl.load(partial + plane + of, mask=there, other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(partial + 2 * plane + of, mask=there, other=0.0, cache_modifier=".cg")
                moments = tl.load(partial + 3 * plane + of, mask=there, other=0.0, cache_modifier=".cg")
                args = tl.load(partial_index + of, mask=there, other=0, cache_modifier=".cg")
                bads = tl.load(partial_index + plane + of, mask=there, other=0, cache_modifier=".cg")
                bad = tl.maximum(bad, tl.max(bads, 1))
                top_b = tl.max(tops, 1)
                best = tl.argmax(tops, 1, tie_break_left=True).to(tl.int32)  # the first split: lowest columns
                chosen = tl.arange(0, SPLITS)[None, :] == best[:, None]
                runner_up = tl.max(tl.where(chosen, float("-inf"), tops), 1)
                base = tl.where(top_b == float("-inf"), 0.0, top_b)
                shift = tops - base[:, None]
                factor = tl.exp(shift)
                spread = tl.where(totals == 0, 0.0, totals * shift)
                top, second, total, moment, arg = merge(
                    top,
                    second,
                    total,
                    moment,
                    arg,
                    top_b,
                    tl.maximum(runner_up, tl.max(seconds, 1)),
                    tl.sum(factor * totals, 1),
                    tl.sum(factor * (moments + spread), 1),
                    tl.sum(tl.where(chosen, args, 0), 1),
                )
            unreadable = (bad > 0) | (top == float("-inf"))
            tl.store(value + rows, criterion_value(top, second, total, moment, bad, V, CRITERION), mask=live)
            tl.store(margin + rows, criterion_value(top, second, total, moment, bad, V, "margin"), mask=live)
            tl.store(top1 + rows, tl.where(unreadable, -1, arg).to(tl.int64), mask=live)


# --- launch ---------------------------------------------------------------------------------------


ROWS = 16
"""Rows of a block: the least that tl.dot takes. Every statistic is held once per row and thread, so more
spill."""


def blocks(wide: bool, aligned: bool) -> tuple[int, int, int]:
    """Classes and features of a tile, and warps; `wide` for float32.

    Chosen so that nothing spills on the four targets of `aot`. Unaligned rows are loaded through registers.
    """
    return (64, 16, 4) if wide else (128, 64 if aligned else 32, 8)


def launch_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    criterion: str = "max_probability",
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_confidence` as one kernel. `splits`: blocks that share the vocabulary; by default two per
    processor."""
    _check(hidden, weight, bias, criterion)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (n, D), V, device = hidden.shape, weight.shape[0], hidden.device
    aligned = all(k % 16 == 0 for k in (D, hidden.stride(0), weight.stride(0)))
    block_v, block_d, warps = blocks(hidden.dtype == torch.float32, aligned)
    groups, count = triton.cdiv(n, ROWS), triton.cdiv(V, block_v)
    if splits is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        splits = max(1, 2 * processors // groups)
    per_split = triton.cdiv(count, min(splits, count))
    splits = math.ceil(count / per_split)  # none without a tile
    padded = groups * ROWS
    partial = torch.empty((4, splits, padded), dtype=torch.float32, device=device)
    partial_index = torch.empty((2, splits, padded), dtype=torch.int32, device=device)
    value = torch.empty((n,), dtype=torch.float32, device=device)
    margin = torch.empty((n,), dtype=torch.float32, device=device)
    top1 = torch.empty((n,), dtype=torch.int64, device=device)
    if not n:
        return value, top1, margin
    LAUNCHES["head_confidence"] += 1
    head_kernel[(groups, splits)](
        hidden,
        weight,
        temperature if bias is None else bias,
        temperature,
        partial,
        partial_index,
        torch.zeros((groups,), dtype=torch.int32, device=device),
        value,
        top1,
        margin,
        hidden.stride(0),
        weight.stride(0),
        n,
        V,
        D,
        splits,
        per_split,
        padded,
        CRITERION=criterion,
        BIAS=bias is not None,
        WIDEN=INTERPRETED and hidden.dtype == torch.bfloat16,  # whose dot takes bfloat16 for integers
        N=ROWS,
        BLOCK_V=block_v,
        BLOCK_D=block_d,
        SPLITS=min(power_of_2(splits), 1024 // ROWS),
        num_warps=warps,
        num_stages=2 if torch.version.hip else 4,
        enable_fp_fusion=True,
    )
    return value, top1, margin


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::head_confidence", mutates_args=())
def head_confidence_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    criterion: str = "max_probability",
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_confidence` as `torch.ops.eecompile.head_confidence`: the kernel where it can run."""
    run = launch_head_confidence if runs_on(hidden) else head_confidence
    return run(hidden, weight, bias, temperature, criterion)


@head_confidence_op.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    criterion: str = "max_probability",
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, weight, bias, criterion)
    rows = hidden.shape[:1]
    return (
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=torch.float32),
    )
