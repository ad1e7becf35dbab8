"""One decision: which rows exit here, and the list of the active ones, in one launch without the host.

There are n live rows, n = `count[0]` on the device, at most `capacity`; live row i belongs to sample
`rows[i]`. With `c_i` the confidence of `logits[i]` (see `confidence`; criterion "given": `logits`
`[capacity]` is it already)

    leave_i    = c_i >= thresholds[exit]; a NaN never; at the model's own end (`final`) everyone
    output[rows[i]], exit_index[rows[i]], confidence[rows[i]] = result[i], exit, c_i   where leave_i
    positions  = the i of the active rows, in order, then -1
    survivors  = rows[positions], then -1
    control    = how many stay, the smallest bucket that holds them (K for no row), 1 if any row stays

Arithmetic in float32 whatever the dtype of the logits (float32, float16, bfloat16); results are copied bit
for bit. Ties and NaN as in `confidence`; at the end a NaN confidence is reported as 0. Patience keeps its
state per sample. Nothing else is written: what belongs to samples that stay, and rows past n, keep what
they hold.

With a `clock` (see `clock`) every live row's result and confidence are written, those that stay have the
best output so far, NaN as 0; and where the next stage, at the bucket of the survivors, would be `overdue`,

    clock[STOPPED] = exit;  control = 0, K, 0: no row goes on

The lists and `exit_index` are as ever: they say which rows left here by themselves and which were stopped.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._lists import ALIVE, BUCKET, LIVE, control_size, write_lists
from eecompile.kernels._triton import (
    HAVE_TRITON,
    LAUNCHES,
    extern_libs,
    power_of_2,
    runs_on,
    set_conditional,
    tiles,
    tl,
    triton,
)
from eecompile.kernels.clock import HOST, NONE, STOPPED, overdue
from eecompile.kernels.confidence import CRITERIA
from eecompile.kernels.confidence import confidence as _confidence

# --- definition -----------------------------------------------------------------------------------


def decide(
    logits: Tensor,
    result: Tensor,
    rows: Tensor | None,
    count: Tensor,
    thresholds: Tensor,
    temperatures: Tensor,
    exit: int,
    criterion: str,
    patience: int,
    state: Tensor | None,
    buckets: Tensor,
    output: Tensor,
    exit_index: Tensor,
    confidence: Tensor,
    survivors: Tensor,
    positions: Tensor,
    control: Tensor,
    final: bool = False,
    clock: Tensor | None = None,
    predicted: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The definition, in plain torch, without a value on the host.

    Args:
        logits: `[capacity, C]` float; for "learned" `[capacity, 1]`, for "given" the confidence
            `[capacity]`.
        result: `[capacity, W]`, what a row that leaves puts out; often the logits themselves.
        rows: `[capacity]` int64, the samples of the live rows; None for 0, 1, 2, ...
        count: `[1]` int32 or more; the first element is n.
        thresholds: `[E]` float32. Not read at the end.
        temperatures: `[E + 1]` float32, one per exit and one for the model's own end.
        exit: Index of this exit; E at the end.
        criterion: One of `confidence.CRITERIA`, or "given".
        patience: Exits that must agree.
        state: `[B, 2]` int64 per sample, (-1, 0) at first; written. Only for "patience".
        buckets: `[K]` int32, ascending.
        output: `[B, W]` of the dtype of `result`; written.
        exit_index: `[B]` int64; written.
        confidence: `[B]` float32; written.
        survivors: `[capacity]` int64; written. Must not be `rows`.
        positions: `[capacity]` int64; written.
        control: `[control_size(capacity)]` int32; written.
        final: Whether this is the model's own end: everyone leaves.
        clock: `[5]` int64; written where the program is stopped. None for no deadline, and at the end.
        predicted: `[K]` int64, nanoseconds of what comes next in each bucket; with `clock`.
        dtype: Arithmetic; float32 everywhere but in tests.

    Raises:
        StrategyError: Unknown criterion, or shapes that do not fit.
    """
    _check(logits, result, criterion, state, output, survivors, positions, control, buckets, predicted)
    capacity, samples = result.shape[0], output.shape[0]
    index = torch.arange(capacity, device=result.device)
    inside = index < count[0]
    rows = index if rows is None else rows
    safe = torch.where(inside, rows, 0)
    if criterion == "given":
        value = logits
    else:
        threshold = None if final else thresholds[exit]
        held = state[safe] if state is not None else None
        value, new = _confidence(
            logits, held, criterion, temperatures[exit], patience=patience, threshold=threshold, dtype=dtype
        )
    leave = inside & ((value == value) | (value != value) if final else value >= thresholds[exit])
    # who writes to each sample: the other way round from a scatter, so that no row has to be dropped
    writer = torch.full((samples + 1,), -1, device=rows.device, dtype=torch.int64)
    writer.scatter_(0, torch.where(inside, rows, samples), index)
    writer, leaver = writer[:samples], torch.cat((leave, leave.new_zeros(1)))[writer[:samples]]
    source, written = writer.clamp_min(0), leaver if clock is None else writer >= 0
    if criterion == "patience" and state is not None:
        state.copy_(torch.where((writer >= 0)[:, None], new[source], state))
    output.copy_(torch.where(written[:, None], result[source], output))
    exit_index.masked_fill_(leaver, exit)
    confidence.copy_(torch.where(written, value.nan_to_num(nan=0.0)[source].float(), confidence))
    if final:
        return
    write_lists(inside & ~leave, rows, buckets, survivors, positions, control)
    if clock is not None and predicted is not None:
        late = overdue(clock, predicted, control[ALIVE], control[BUCKET])
        clock[STOPPED].masked_fill_(late, exit)
        for element, none in ((LIVE, 0), (BUCKET, buckets.numel()), (ALIVE, 0)):
            control[element].masked_fill_(late, none)


def _check(
    logits: Tensor,
    result: Tensor,
    criterion: str,
    state: Tensor | None,
    output: Tensor,
    survivors: Tensor,
    positions: Tensor,
    control: Tensor,
    buckets: Tensor,
    predicted: Tensor | None,
) -> None:
    if criterion not in (*CRITERIA, "given") or (criterion == "patience") != (state is not None):
        raise StrategyError(
            "the criterion and its state do not fit a decision",
            got=f"{criterion!r} {'without' if state is None else 'with'} state",
            wanted=f"one of {', '.join(CRITERIA)}, given; a state for patience only",
        )
    capacity = result.shape[0]
    rank = 1 if criterion == "given" else 2
    fits = (
        logits.ndim == rank
        and logits.shape[0] == capacity
        and survivors.shape == positions.shape == (capacity,)
        and control.shape[0] >= control_size(capacity)
        and result.ndim == output.ndim == 2
        and result.shape[1] == output.shape[1]
        and result.dtype == output.dtype
        and output.is_contiguous()
        and (predicted is None or predicted.shape == buckets.shape)
    )
    if not fits:
        raise StrategyError(
            "the buffers of a decision do not fit together",
            got=f"logits {list(logits.shape)}, result {list(result.shape)}, output {list(output.shape)}, "
            f"survivors {list(survivors.shape)}, control {list(control.shape)}, buckets {list(buckets.shape)}"
            + ("" if predicted is None else f", predicted {list(predicted.shape)}"),
            wanted="logits [n, C], result [n, W], output [B, W] contiguous, survivors [n], control [n + 4], predicted [K]",
        )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:
    from eecompile.kernels._online import bucket_of, compact, confidence_of_rows, last_block_done
    from eecompile.kernels.clock import stop_if_overdue

    @triton.jit(do_not_specialize=["C", "W", "capacity", "K", "exit", "patience", "alive_handle", "bucket_handle"])
    def decide_kernel(
        logits,
        result,
        rows,
        count,
        thresholds,
        temperatures,
        state,
        buckets,
        output,
        exit_index,
        confidence,
        survivors,
        positions,
        control,
        clock,
        predicted,
        stride_row,
        stride_column,
        result_row,
        result_column,
        C,
        W,
        capacity,
        K,
        exit,
        patience,
        alive_handle: tl.uint64,
        bucket_handle: tl.uint64,
        CRITERION: tl.constexpr,
        FINAL: tl.constexpr,
        IDENTITY: tl.constexpr,
        CONDITION: tl.constexpr,
        CLOCK: tl.constexpr,
        R: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_N: tl.constexpr,
        MAX_K: tl.constexpr,
    ):
        n = tl.load(count)
        i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        live = i < n
        row = i
        if not IDENTITY:
            row = tl.load(rows + i, mask=live, other=0)
        opened = live
        if not FINAL:
            threshold = tl.zeros((R,), tl.float32) + tl.load(thresholds + exit)
            opened = live & ((threshold > 1.0) == 0)
        value = confidence_of_rows(
            logits, temperatures, state, i, row, live, opened, stride_row, stride_column, C, exit, patience,
            CRITERION, R, BLOCK_C,
        )  # fmt: skip
        if FINAL:
            leave = live
        else:
            leave = live & (value >= threshold)  # an ordered comparison: false for NaN
        written = leave
        if CLOCK != "none":
            written = live
        if tl.max(written.to(tl.int32), 0) > 0:
            for start in range(0, W, BLOCK_W):
                w = start + tl.arange(0, BLOCK_W)
                mask = written[:, None] & (w < W)[None, :]
                w = w.to(tl.int64)[None, :]
                x = tl.load(result + i[:, None] * result_row + w * result_column, mask=mask)
                tl.store(output + row[:, None] * W + w, x, mask=mask)
        tl.store(exit_index + row, tl.zeros((R,), tl.int64) + exit, mask=leave)
        tl.store(confidence + row, tl.where(value != value, 0.0, value), mask=written)
        if not FINAL:
            tl.store(control + 4 + i, (live & (leave == 0)).to(tl.int32), mask=i < capacity)
            if last_block_done(control + 3, tl.num_programs(0)):
                found = compact(control + 4, rows, positions, survivors, n, capacity, IDENTITY, BLOCK_N)
                bucket = bucket_of(found, buckets, K, MAX_K)
                if CLOCK != "none":
                    found, bucket = stop_if_overdue(clock, predicted, exit, found, bucket, K, CLOCK)
                alive = (found > 0).to(tl.int32)
                tl.store(control, found)
                tl.store(control + 1, bucket)
                tl.store(control + 2, alive)
                if CONDITION:
                    set_conditional(alive_handle, alive)
                    set_conditional(bucket_handle, bucket)


# --- launch ---------------------------------------------------------------------------------------


def launch_decide(
    logits: Tensor,
    result: Tensor,
    rows: Tensor | None,
    count: Tensor,
    thresholds: Tensor,
    temperatures: Tensor,
    exit: int,
    criterion: str,
    patience: int,
    state: Tensor | None,
    buckets: Tensor,
    output: Tensor,
    exit_index: Tensor,
    confidence: Tensor,
    survivors: Tensor,
    positions: Tensor,
    control: Tensor,
    final: bool = False,
    clock: Tensor | None = None,
    predicted: Tensor | None = None,
    source: str = HOST,
    alive_handle: int | None = None,
    bucket_handle: int = 0,
) -> None:
    """`decide` as one kernel.

    Args:
        source: Whose clock is read, HOST or DEVICE; see `clock`.
        alive_handle: Of a CUDA graph's IF node. None for none; 0 loads the kernel that sets handles, and sets nothing.
        bucket_handle: Of a SWITCH node, 0 for none.
    """
    _check(logits, result, criterion, state, output, survivors, positions, control, buckets, predicted)
    capacity, W = result.shape
    C = 1 if criterion == "given" else logits.shape[1]
    options = tiles(max(C, W), capacity)
    condition = alive_handle is not None or bucket_handle != 0
    LAUNCHES["decide"] += 1
    decide_kernel[(triton.cdiv(capacity, options["R"]),)](
        logits,
        result,
        survivors if rows is None else rows,
        count,
        thresholds,
        temperatures,
        positions if state is None else state,
        buckets,
        output,
        exit_index,
        confidence,
        survivors,
        positions,
        control,
        control if clock is None else clock,
        control if predicted is None else predicted,
        logits.stride(0),
        1 if criterion == "given" else logits.stride(1),
        result.stride(0),
        result.stride(1),
        C,
        W,
        capacity,
        buckets.numel(),
        exit,
        patience,
        alive_handle or 0,
        bucket_handle,
        CRITERION=criterion,
        FINAL=final,
        IDENTITY=rows is None,
        CONDITION=condition,
        CLOCK=NONE if clock is None else source,
        BLOCK_W=options["BLOCK_C"],
        BLOCK_N=min(power_of_2(capacity), 1024),
        MAX_K=power_of_2(max(buckets.numel(), 2)),
        enable_fp_fusion=True,  # said, not left to Triton's default, which is about to change
        **options,
        **({"extern_libs": extern_libs()} if condition else {}),
    )


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op(
    "eecompile::decide",
    mutates_args=("state", "output", "exit_index", "confidence", "survivors", "positions", "control", "clock"),
)
def decide_op(
    logits: Tensor,
    result: Tensor,
    rows: Tensor | None,
    count: Tensor,
    thresholds: Tensor,
    temperatures: Tensor,
    exit: int,
    criterion: str,
    patience: int,
    state: Tensor | None,
    buckets: Tensor,
    output: Tensor,
    exit_index: Tensor,
    confidence: Tensor,
    survivors: Tensor,
    positions: Tensor,
    control: Tensor,
    final: bool,
    clock: Tensor | None,
    predicted: Tensor | None,
) -> None:
    """`decide` as `torch.ops.eecompile.decide`, on the host's clock: the kernel where it can run, else the definition.

    No argument has a default: torch 2.11 drops those at the end, and then cannot find the clock that may be written to.
    """
    run = launch_decide if runs_on(logits) else decide
    run(
        logits, result, rows, count, thresholds, temperatures, exit, criterion, patience, state, buckets,
        output, exit_index, confidence, survivors, positions, control, final, clock, predicted,
    )  # fmt: skip


@decide_op.register_fake
def _fake(logits: Tensor, result: Tensor, rows: Tensor | None, count: Tensor, *rest: object) -> None:
    return None
