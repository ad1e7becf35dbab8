"""The list of rows whose gate is open, for executors that leave the decision on the device.

There are n live rows, n = `count[0]` on the device. With `open_i` of the decision (see `choose`: bool, or 0.5 and above; a
NaN opens)

    positions = the i < n with open_i, in order, then -1
    control   = how many, the smallest bucket that holds them (K for none), 1 if there is any

Numbers are compared as they are, in any floating dtype; nothing is computed.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._lists import control_size, write_lists
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, power_of_2, runs_on, tl, triton
from eecompile.kernels.choose import is_open

# --- definition -----------------------------------------------------------------------------------


def open_rows(decision: Tensor, count: Tensor, buckets: Tensor, positions: Tensor, control: Tensor) -> None:
    """The definition, in plain torch, without a value on the host.

    Args:
        decision: `[capacity]` bool or floating.
        count: `[1]` int32 or more; the first element is n.
        buckets: `[K]` int32, ascending.
        positions: `[capacity]` int64; written.
        control: `[control_size(capacity)]` int32 or more, as of `decide`; written. Must not be `count`.

    Raises:
        StrategyError: Shapes that do not fit.
    """
    _check(decision, positions, control)
    index = torch.arange(decision.shape[0], device=decision.device)
    write_lists((index < count[0]) & is_open(decision), index, buckets, positions, positions, control)


def _check(decision: Tensor, positions: Tensor, control: Tensor) -> None:
    n = decision.shape[0] if decision.ndim else 0
    if decision.ndim != 1 or positions.shape != (n,) or control.shape[0] < control_size(n):
        raise StrategyError(
            "the buffers of a list of open rows do not fit together",
            got=f"decision {list(decision.shape)}, list {list(positions.shape)}, control {list(control.shape)}",
            wanted="decision [n], list [n], control [n + 4] or more",
        )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:
    from eecompile.kernels._online import bucket_of

    @triton.jit(do_not_specialize=["capacity", "K"])
    def open_rows_kernel(
        decision,
        count,
        buckets,
        positions,
        control,
        stride,
        capacity,
        K,
        N: tl.constexpr,
        MAX_K: tl.constexpr,
    ):
        """One block for all rows: a list in order needs to know how many came before."""
        n = tl.minimum(tl.load(count), capacity)
        found = tl.zeros((), tl.int32)
        for start in range(0, n, N):
            i = start + tl.arange(0, N)
            inside = i < n
            d = tl.load(decision + i.to(tl.int64) * stride, mask=inside, other=0).to(tl.float32)
            keep = (inside & ((d < 0.5) == 0)).to(tl.int32)
            at = found + tl.cumsum(keep, 0) - keep
            tl.store(positions + at, i.to(tl.int64), mask=keep > 0)
            found += tl.sum(keep, 0)
        for start in range(0, capacity, N):
            i = start + tl.arange(0, N)
            tl.store(positions + i, tl.full((N,), -1, tl.int64), mask=(i >= found) & (i < capacity))
        tl.store(control, found)
        tl.store(control + 1, bucket_of(found, buckets, K, MAX_K))
        tl.store(control + 2, (found > 0).to(tl.int32))


# --- launch ---------------------------------------------------------------------------------------


def launch_open_rows(decision: Tensor, count: Tensor, buckets: Tensor, positions: Tensor, control: Tensor) -> None:
    """`open_rows` as one kernel."""
    _check(decision, positions, control)
    capacity = decision.shape[0]
    LAUNCHES["open_rows"] += 1
    open_rows_kernel[(1,)](
        decision,
        count,
        buckets,
        positions,
        control,
        decision.stride(0),
        capacity,
        buckets.numel(),
        N=min(power_of_2(capacity), 1024),
        MAX_K=power_of_2(max(buckets.numel(), 2)),
    )


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::open_rows", mutates_args=("positions", "control"))
def open_rows_op(decision: Tensor, count: Tensor, buckets: Tensor, positions: Tensor, control: Tensor) -> None:
    """`open_rows` as `torch.ops.eecompile.open_rows`: the kernel where it can run, else the definition."""
    run = launch_open_rows if runs_on(decision) else open_rows
    run(decision, count, buckets, positions, control)


@open_rows_op.register_fake
def _fake(decision: Tensor, count: Tensor, buckets: Tensor, positions: Tensor, control: Tensor) -> None:
    return None
