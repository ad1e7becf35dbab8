"""How sure an exit is, in [0, 1], from the logits of its head.

Logits `[n, C]`, or `[n, S, C]` with one value per position, any float dtype; arithmetic in float32. With
`z = logits / temperature` and `p = softmax(z)`:

| criterion | confidence of a position |
|---|---|
| max_probability | `max p` |
| entropy | `1 - H(p) / log C`, `p = 0` adding nothing, 1 if `C == 1` (Teerapittayanon et al. 2016) |
| margin | `p1 - p2`, the two largest, and `p1` if `C == 1` |
| energy | `0.5 + 0.5 u / (1 + abs(u))` with `u = logsumexp(z) - log C` (Liu et al. 2020) |
| patience | `min(count / patience, 1)`: open exits in a row that predict the same class (Zhou et al. 2020) |
| learned | `sigmoid(z)` of one score logit, `C == 1` (Xin et al. 2021) |

Ties: the predicted class is the lowest index among the largest logits. NaN: a position with a NaN or a +inf
among its logits, or with nothing but -inf, gives NaN, which is never sure; a single -inf is a masked class.
Positions are then reduced over S by "min", "mean" or "last", leaving out those that `mask` marks as
padding; a row without a real position gives NaN. Patience reads the logits as they are: temperature does
not move a prediction.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eecompile.errors import StrategyError, near
from eecompile.kernels._autograd import differentiable
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, either, tiles, tl, triton

CRITERIA = ("max_probability", "entropy", "margin", "energy", "patience", "learned")
REDUCTIONS = ("min", "mean", "last")


def yes_or_no(logits: Tensor, multi_label: bool = False) -> Tensor:
    """What a criterion compares: the logits `[..., C]` as they are, or those of no, which is 0, and of yes.

    The latter, `[..., 2]` of one logit `[..., 1]`, and with `multi_label` `[n, C, 2]` of `[n, C]`.
    """
    each = logits.unsqueeze(-1) if multi_label else logits
    return torch.cat((torch.zeros_like(each), each), -1) if each.shape[-1] == 1 else each


# --- definition -----------------------------------------------------------------------------------


def confidence(
    logits: Tensor,
    state: Tensor | None,
    criterion: str,
    temperature: Tensor,
    *,
    patience: int = 1,
    reduce: str = "min",
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch. May return an input as it is; the operator copies.

    Args:
        logits: `[n, C]` or `[n, S, C]`, any float dtype; for "learned" the score logit, C = 1.
        state: For "patience" `logits.shape[:-1] + (2,)` int64, (last predicted class, exits in agreement),
            or None at the first exit. Other criteria ignore it.
        criterion: One of `CRITERIA`.
        temperature: 0-dim float32, above 0.
        patience: Exits that must agree.
        reduce: "min", "mean" or "last" over the positions.
        mask: `[n, S]` bool or int, nonzero at real positions. Only with logits `[n, S, C]`.
        threshold: 0-dim float32. Above 1 the exit is closed and does not take part in patience.
        dtype: Arithmetic and result; float32 everywhere but in tests.

    Returns:
        Confidence `[n]` in [0, 1] or NaN, and the new state (an empty int64 tensor `[0]` for stateless
        criteria).

    Raises:
        StrategyError: Unknown criterion or reduction, or a shape that does not fit.
    """
    check(logits, criterion, reduce, mask)

    def measured(logits: Tensor) -> tuple[Tensor, Tensor]:
        if criterion == "patience":
            return _agreement(logits, state, patience, threshold, dtype)
        return _STATELESS[criterion](_scaled(logits, temperature, dtype)), logits.new_empty((0,), dtype=torch.int64)

    return _over_positions(measured, logits, criterion, reduce, mask)


def _over_positions(
    measured: Callable[[Tensor], tuple[Tensor, Tensor]], logits: Tensor, criterion: str, reduce: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `measured` gives for logits `[..., C]`: confidence `[...]`, reduced to `[n]`, and the new state."""
    if reduce == "last" and logits.ndim == 3 and criterion != "patience":  # the others would be computed for nothing
        real, found = _last(logits, mask)
        value, state = measured(real)
        return (value if found is None else value.masked_fill(~found, math.nan)), state
    value, state = measured(logits)
    return (value if logits.ndim == 2 else _reduce(value, reduce, mask)), state


def check(logits: Tensor, criterion: str, reduce: str, mask: Tensor | None) -> None:
    """Raises `StrategyError` where the arguments do not fit together."""
    if criterion not in CRITERIA:
        raise StrategyError("unknown criterion", got=repr(criterion), wanted=near(criterion, CRITERIA))
    if reduce not in REDUCTIONS:
        raise StrategyError("unknown reduction over positions", got=repr(reduce), wanted=near(reduce, REDUCTIONS))
    if logits.ndim not in (2, 3):
        raise StrategyError("logits have the wrong rank", got=list(logits.shape), wanted="[n, C] or [n, S, C]")
    if criterion == "learned" and logits.shape[-1] != 1:
        raise StrategyError(
            "a learned score is one logit",
            got=list(logits.shape),
            wanted="[n, 1] or [n, S, 1]",
            hint="pass the score, not the class logits",
        )
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise StrategyError("the mask does not fit the logits", got=list(mask.shape), wanted=list(logits.shape[:-1]))


def _scaled(logits: Tensor, temperature: Tensor, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype)
    if not temperature.requires_grad:
        return z / temperature
    masked = z == -math.inf  # kept out of the quotient, whose gradient in the temperature would be 0 * inf
    return (z.masked_fill(masked, 0) / temperature).masked_fill(masked, -math.inf)


def _max_probability(z: Tensor) -> Tensor:
    return torch.softmax(z, -1).amax(-1)  # one largest logit of +inf, NaN or all -inf makes the whole softmax NaN


def _entropy(z: Tensor) -> Tensor:
    log_p = torch.log_softmax(z, -1)
    # 0 * -inf would be NaN; a finite floor makes a masked class add exactly 0, in the gradient too
    h = (log_p.exp() * log_p.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    return (1 + h / (math.log(z.shape[-1]) if z.shape[-1] > 1 else 1.0)).clamp(0, 1)


def _margin(z: Tensor) -> Tensor:
    p = torch.softmax(z, -1)
    if z.shape[-1] == 1:
        return p[..., 0]
    top = p.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def _energy(z: Tensor) -> Tensor:
    u = torch.logsumexp(z, -1) - math.log(z.shape[-1])
    return 0.5 + 0.5 * (u / (1 + u.abs()))  # u = +-inf gives NaN, as it should


def _learned(z: Tensor) -> Tensor:
    score = z[..., 0]
    return torch.sigmoid(score) + score * 0  # NaN also for a score of +-inf


_STATELESS = {
    "max_probability": _max_probability,
    "entropy": _entropy,
    "margin": _margin,
    "energy": _energy,
    "learned": _learned,
}


def _agreement(
    logits: Tensor, state: Tensor | None, patience: int, threshold: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    largest, predicted = logits.max(-1)
    usable = largest.isfinite()
    if state is None:
        state = torch.stack((torch.full_like(predicted, -1), torch.zeros_like(predicted)), -1)
    count = torch.where(predicted == state[..., 0], state[..., 1] + 1, 1)
    value = (count.to(dtype) / patience).clamp(max=1).masked_fill(~usable, math.nan)
    # a row that cannot be read agrees with no exit, before or after it
    new = torch.stack((predicted.masked_fill(~usable, -1), count.masked_fill(~usable, 0)), -1)
    return value, (new if threshold is None else torch.where(threshold > 1, state, new))


def _last(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`values` `[n, S, ...]` at the last real position `[n, ...]`, and where there is one `[n]` (None:
    everywhere)."""
    if mask is None:
        return values[:, -1], None
    at = torch.where(mask != 0, torch.arange(mask.shape[1], device=mask.device), -1).amax(-1)
    rows = torch.arange(mask.shape[0], device=mask.device)
    return values[rows, at.clamp_min(0)], at >= 0


def _reduce(value: Tensor, reduce: str, mask: Tensor | None) -> Tensor:
    """[n, S] -> [n]"""
    if reduce == "last":
        last, found = _last(value, mask)
        return last if found is None else last.masked_fill(~found, math.nan)
    if mask is None:
        return value.amin(-1) if reduce == "min" else value.mean(-1)
    real = mask != 0
    if reduce == "min":
        return value.masked_fill(~real, 1).amin(-1).masked_fill(~real.any(-1), math.nan)
    return (value.masked_fill(~real, 0).sum(-1) / real.sum(-1)).clamp(max=1)


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:
    from eecompile.kernels._online import agreement, criterion_value, row_statistics

    @triton.jit(do_not_specialize=["n", "C", "patience"])
    def confidence_kernel(
        logits,
        state,
        temperature,
        threshold,
        value,
        new_state,
        stride_row,
        stride_column,
        n,
        C,
        patience,
        CRITERION: tl.constexpr,
        FIRST: tl.constexpr,
        OPEN: tl.constexpr,
        R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        live = i < n
        if CRITERION == "patience":
            top, second, total, moment, arg, bad = row_statistics(
                logits, i, live, stride_row, stride_column, C, 1.0, R, BLOCK_C
            )
            held = tl.full((R,), -1, tl.int64)
            agreed = tl.zeros((R,), tl.int64)
            if not FIRST:
                held = tl.load(state + i * 2, mask=live, other=-1)
                agreed = tl.load(state + i * 2 + 1, mask=live, other=0)
            result, klass, count = agreement(held, agreed, arg, top, bad, patience)
            if not OPEN:
                closed = tl.zeros((R,), tl.float32) + tl.load(threshold) > 1.0
                klass = tl.where(closed, held, klass)
                count = tl.where(closed, agreed, count)
            tl.store(new_state + i * 2, klass, mask=live)
            tl.store(new_state + i * 2 + 1, count, mask=live)
        else:
            top, second, total, moment, arg, bad = row_statistics(
                logits, i, live, stride_row, stride_column, C, tl.load(temperature), R, BLOCK_C
            )
            result = criterion_value(top, second, total, moment, bad, C, CRITERION)
        tl.store(value + i, result, mask=live)


# --- launch ---------------------------------------------------------------------------------------


def launch_confidence(
    logits: Tensor,
    state: Tensor | None,
    criterion: str,
    temperature: Tensor,
    *,
    patience: int = 1,
    reduce: str = "min",
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`confidence` with the kernel; positions are reduced by the definition."""
    check(logits, criterion, reduce, mask)

    def measured(logits: Tensor) -> tuple[Tensor, Tensor]:
        flat = logits.flatten(0, -2)
        n, C = flat.shape
        value = torch.empty((n,), dtype=torch.float32, device=logits.device)
        shape = (*logits.shape[:-1], 2) if criterion == "patience" else (0,)
        new = torch.empty(shape, dtype=torch.int64, device=logits.device)
        options = tiles(C, n)
        LAUNCHES["confidence"] += 1
        confidence_kernel[(triton.cdiv(n, options["R"]),)](
            flat,
            new if state is None else state.contiguous(),
            temperature,
            temperature if threshold is None else threshold,
            value,
            new,
            flat.stride(0),
            flat.stride(1),
            n,
            C,
            patience,
            CRITERION=criterion,
            FIRST=state is None,
            OPEN=threshold is None,
            enable_fp_fusion=True,
            **options,
        )
        return value.view(logits.shape[:-1]), new

    return _over_positions(measured, logits, criterion, reduce, mask)


run_confidence = either(confidence, launch_confidence)

# --- operator -------------------------------------------------------------------------------------


def _positional(
    logits: Tensor,
    state: Tensor | None,
    criterion: str,
    temperature: Tensor,
    patience: int,
    reduce: str,
    mask: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return run_confidence(
        logits, state, criterion, temperature, patience=patience, reduce=reduce, mask=mask, threshold=threshold
    )


@torch.library.custom_op("eecompile::confidence", mutates_args=())
def confidence_op(
    logits: Tensor,
    state: Tensor | None,
    criterion: str,
    temperature: Tensor,
    patience: int = 1,
    reduce: str = "min",
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`confidence` as `torch.ops.eecompile.confidence`: the kernel where it can run, else the definition.

    No argument is keyword-only: autograd needs it so.
    """
    value, new = _positional(logits, state, criterion, temperature, patience, reduce, mask, threshold)
    value = value.clone() if value.storage_offset() or not value.is_contiguous() else value
    return value, new.clone() if new is state else new


@confidence_op.register_fake
def _fake(
    logits: Tensor,
    state: Tensor | None,
    criterion: str,
    temperature: Tensor,
    patience: int = 1,
    reduce: str = "min",
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(logits, criterion, reduce, mask)
    shape = (*logits.shape[:-1], 2) if criterion == "patience" else (0,)
    return logits.new_empty(logits.shape[:1], dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


differentiable(confidence_op, _positional)
