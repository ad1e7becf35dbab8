"""One step of adaptive computation time (Graves 2016; per position: Dehghani et al. 2019).

At step t a unit says with probability `h` that it is done, and `state` is what it computed. With `a` the
weight given out so far,

    halts  = a + h >= 1 - epsilon, or this is the last step
    weight = 1 - a (the remainder R) if it halts, else h; 0 if it had halted before
    weighted += weight * state;   a += weight (exactly 1 after halting);   steps += 1
    ponder += 1 + R if it halts, else 1; so it ends as N + R, the ponder cost

Rows `[n]` or positions `[n, S]` on their own; arithmetic in float32. `h` is clamped to [0, 1], and a NaN
counts as 0: never done. What has halted is left alone, bit for bit: a NaN in its state goes nowhere.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._autograd import differentiable
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, either, power_of_2, tl, triton

ACCUMULATED = 0
"""Where in the ledger `a` lies."""

# --- definition -----------------------------------------------------------------------------------


def halt(
    score: Tensor,
    state: Tensor,
    weighted: Tensor | None,
    ledger: Tensor | None,
    epsilon: float = 0.01,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch.

    Args:
        score: `h`, `[n]` or `[n, S]`, floating.
        state: `score.shape + (...)`, floating.
        weighted: Like `state`, float32 (or float64, which makes the arithmetic float64); None at the first
            step.
        ledger: `score.shape + (3,)` of that dtype: `a`, steps, ponder cost; None at the first step.
        epsilon: Slack that lets one step be enough.
        last: Whether what still runs has to halt now.

    Returns:
        New weighted state, new ledger, and what still runs, `score.shape` bool.

    Raises:
        StrategyError: Shapes that do not fit.
    """
    _check(score, state, weighted, ledger)
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    if ledger is None:
        ledger = torch.zeros((*score.shape, 3), dtype=dtype, device=score.device)
    if weighted is None:
        weighted = torch.zeros(state.shape, dtype=dtype, device=state.device)
    a, steps, ponder = ledger.unbind(-1)
    h = score.to(dtype).masked_fill(score.isnan(), 0).clamp(0, 1)
    ran = a < 1
    halts = ran & (torch.ones_like(ran) if last else a + h >= 1 - epsilon)
    weight = torch.where(halts, 1 - a, h)
    wide = (*score.shape, *(1,) * (state.ndim - score.ndim))
    new = torch.where(ran.view(wide), weighted + weight.view(wide) * state.to(dtype), weighted)
    done = torch.where(halts, 1.0, torch.where(ran, a + h, a))
    cost = torch.where(ran, torch.where(halts, 1 + weight, 1.0), 0.0)
    return new, torch.stack((done, steps + ran.to(dtype), ponder + cost), -1), ran & ~halts


def _check(score: Tensor, state: Tensor, weighted: Tensor | None, ledger: Tensor | None) -> None:
    if score.ndim not in (1, 2) or state.shape[: score.ndim] != score.shape:
        raise StrategyError(
            "the halting score does not fit the state",
            got=f"score {list(score.shape)}, state {list(state.shape)}",
            wanted="[n] with [n, ...] or [n, S] with [n, S, ...]",
        )
    if weighted is not None and weighted.shape != state.shape:
        raise StrategyError(
            "the weighted state has another shape than the state",
            got=list(weighted.shape),
            wanted=list(state.shape),
        )
    if ledger is not None and ledger.shape != (*score.shape, 3):
        raise StrategyError("the halting ledger does not fit", got=list(ledger.shape), wanted=[*score.shape, 3])


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit(do_not_specialize=["limit"])
    def halt_kernel(
        score,
        state,
        weighted,
        ledger,
        new_weighted,
        new_ledger,
        running,
        limit,
        D,
        FIRST: tl.constexpr,
        LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row or position per block."""
        i = tl.program_id(0).to(tl.int64)
        h = tl.load(score + i).to(tl.float32)
        h = tl.where(h == h, tl.minimum(tl.maximum(h, 0.0), 1.0), 0.0)
        a = h * 0.0
        steps = a
        ponder = a
        if not FIRST:
            a = tl.load(ledger + i * 3)
            steps = tl.load(ledger + i * 3 + 1)
            ponder = tl.load(ledger + i * 3 + 2)
        ran = (a < 1.0).to(tl.int32)
        halts = ran
        if not LAST:
            halts = ran * (a + h >= limit).to(tl.int32)
        weight = tl.where(halts > 0, 1.0 - a, h)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            mask = d < D
            at = i * D + d
            old = tl.zeros((BLOCK,), tl.float32)
            if not FIRST:
                old = tl.load(weighted + at, mask=mask, other=0.0)
            x = tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(new_weighted + at, tl.where(ran > 0, old + weight * x, old), mask=mask)
        tl.store(new_ledger + i * 3, tl.where(halts > 0, 1.0, tl.where(ran > 0, a + h, a)))
        tl.store(new_ledger + i * 3 + 1, steps + ran.to(tl.float32))
        tl.store(new_ledger + i * 3 + 2, ponder + ran.to(tl.float32) + tl.where(halts > 0, weight, 0.0))
        tl.store(running + i, ran - halts)


# --- launch ---------------------------------------------------------------------------------------


def launch_halt(
    score: Tensor,
    state: Tensor,
    weighted: Tensor | None,
    ledger: Tensor | None,
    epsilon: float = 0.01,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`halt` as one kernel, one pass over the state; not in float64."""
    _check(score, state, weighted, ledger)
    first = weighted is None or ledger is None
    if first != (weighted is None and ledger is None):
        raise StrategyError("the weighted state and the ledger start together", wanted="both or neither")
    score, state = score.contiguous(), state.contiguous()
    old, book = (weighted, ledger) if weighted is not None and ledger is not None else (state, state)
    old, book = old.contiguous(), book.contiguous()
    new = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    new_book = torch.empty((*score.shape, 3), dtype=torch.float32, device=state.device)
    running = torch.empty(score.shape, dtype=torch.bool, device=state.device)
    positions = score.numel()
    D = state.numel() // max(positions, 1)
    LAUNCHES["halt"] += 1
    halt_kernel[(positions,)](
        score,
        state,
        old,
        book,
        new,
        new_book,
        running,
        1 - epsilon,
        D,
        FIRST=first,
        LAST=last,
        BLOCK=min(power_of_2(D), 1024),
        enable_fp_fusion=True,
    )
    return new, new_book, running


run_halt = either(halt, launch_halt)

# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::halt", mutates_args=())
def halt_op(
    score: Tensor,
    state: Tensor,
    weighted: Tensor | None,
    ledger: Tensor | None,
    epsilon: float = 0.01,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`halt` as `torch.ops.eecompile.halt`: the kernel where it can run, else the definition."""
    return run_halt(score, state, weighted, ledger, epsilon, last)


@halt_op.register_fake
def _fake(
    score: Tensor,
    state: Tensor,
    weighted: Tensor | None,
    ledger: Tensor | None,
    epsilon: float = 0.01,
    last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(score, state, weighted, ledger)
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    return (
        torch.empty(state.shape, dtype=dtype, device=state.device),
        torch.empty((*score.shape, 3), dtype=dtype, device=score.device),
        torch.empty(score.shape, dtype=torch.bool, device=score.device),
    )


differentiable(halt_op, halt)
