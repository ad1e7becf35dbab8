"""The clock of a device program: when it began, when its output is wanted, and whether it was stopped on the way.

`clock` holds `[5]` int64, nanoseconds but for one:

    clock[START]     when the program began
    clock[DEADLINE]  how long after that its output is wanted; NEVER for no deadline
    clock[STOPPED]   the exit that it was stopped at, -1 for none (see `decide`)
    clock[END]       when it was done
    clock[NOW]       the time, where the host sets it

    tick     clock[element] = now; at START nothing is stopped: clock[STOPPED] = -1
    overdue  now - clock[START] + predicted[bucket] > clock[DEADLINE], where anybody is left

"now" is clock[NOW] for programs that the host steps through (simulator, definitions, no conditional nodes), and else the
GPU's own clock, PTX `%globaltimer`: nanoseconds since the driver started, in steps of about a microsecond. ROCm has no
conditional nodes, so the host sets the time there.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import torch
from torch import Tensor

from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, runs_on, tl, triton

START, DEADLINE, STOPPED, END, NOW = range(5)
"""Elements of `clock`."""
NEVER = (1 << 63) - 1
NONE, HOST, DEVICE = "none", "host", "device"
"""Whose clock a kernel reads."""

# --- definition -----------------------------------------------------------------------------------


def tick(clock: Tensor, element: int) -> None:
    """The definition: the time goes to an element of `clock` `[5]` int64."""
    clock[element].copy_(clock[NOW])
    if element == START:
        clock[STOPPED].fill_(-1)


def overdue(clock: Tensor, predicted: Tensor, alive: Tensor, bucket: Tensor) -> Tensor:
    """The definition: whether a stage that starts now would be late, [] bool.

    Args:
        clock: `[5]` int64.
        predicted: `[K]` int64, how long the next stage takes in each bucket and what follows it in any case.
        alive: `[]`, not 0 where anybody is left.
        bucket: `[]` integer, below K where anybody is left.
    """
    needed = predicted.take(bucket.long().clamp(max=predicted.numel() - 1))
    return (alive != 0) & (clock[NOW] - clock[START] + needed > clock[DEADLINE])


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def time_now(clock, CLOCK: tl.constexpr):
        """Nanoseconds. Every thread reads the GPU's clock for itself: use it in what one thread writes."""
        if CLOCK == "device":
            return tl.extra.cuda.globaltimer()
        else:
            return tl.load(clock + 4)

    @triton.jit
    def stop_if_overdue(clock, predicted, exit, found, bucket, K, CLOCK: tl.constexpr):
        """Survivors and their bucket: those given, or 0 and K where the next stage would be late. No branch, since threads
        may not read the same time: scalars are written by one of them."""
        needed = tl.load(predicted + tl.minimum(bucket, K - 1))
        spent = time_now(clock, CLOCK) - tl.load(clock)
        late = (found > 0) & (spent + needed > tl.load(clock + 1))
        tl.store(clock + 2, tl.where(late, exit, tl.load(clock + 2)).to(tl.int64))
        return tl.where(late, 0, found), tl.where(late, K, bucket)

    @triton.jit(do_not_specialize=["element"])
    def clock_kernel(clock, element, CLOCK: tl.constexpr):
        tl.store(clock + element, time_now(clock, CLOCK))
        tl.store(clock + 2, tl.full((), -1, tl.int64), mask=element == 0)


# --- launch ---------------------------------------------------------------------------------------


def launch_tick(clock: Tensor, element: int, source: str = HOST) -> None:
    """`tick` as one kernel of one warp.

    Args:
        source: HOST or DEVICE, whose clock is read.
    """
    LAUNCHES["clock"] += 1
    clock_kernel[(1,)](clock, element, CLOCK=source, num_warps=1)


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::tick", mutates_args=("clock",))
def tick_op(clock: Tensor, element: int) -> None:
    """`tick` as `torch.ops.eecompile.tick`, on the host's clock: the kernel where it can run, else the definition."""
    (launch_tick if runs_on(clock) else tick)(clock, element)


@tick_op.register_fake
def _fake(clock: Tensor, element: int) -> None:
    return None
