"""What an exit answers, given what the exits before it have said.

| combination | answer at an exit |
|---|---|
| last | the exit's own logits; no operator at all |
| ensemble | the mean of the log-probabilities of the open exits so far: their geometric mean as logits |
| confident | the logits and confidence of the open exit that was the surest so far; ties: the later one |
| weighted | at exit m the log of `b[m, i] * product over j <= m of p_j(i) ** w[m, j]`, normalised: trained |

Both ensembles are geometric, as in Zero Time Waste (Wolczyk et al. 2021); the weighted one has that paper's weights w for
every pair of exits and biases b for every class, kept as logarithms.

The state of a row travels with it from exit to exit, as that of patience does: float `[..., C + 1]`, for an ensemble the
sum of log-probabilities and, last, how many there are; for the surest exit its logits and, last, its confidence (-1
before there is any). The weighted ensemble keeps the log-probabilities of all exits, `[..., E, C]`, 0 where there are
none. Arithmetic in float32, or float64 where the logits are.

A closed exit (threshold above 1) changes nothing. The first open exit answers with its own logits, bit for bit. Logits
with NaN or +inf (or nothing but -inf) are handed on as they are, are never sure, and do not enter the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eecompile.errors import StrategyError, check_name
from eecompile.kernels._autograd import differentiable

COMBINATIONS = ("last", "ensemble", "confident", "weighted")
LEAST = -1e4  # of a log-probability: a class that one exit rules out

# --- definition -----------------------------------------------------------------------------------


def ensemble(logits: Tensor, state: Tensor | None, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The geometric ensemble, in plain torch. May return an input as it is; the operator copies.

    Args:
        logits: `[n, C]` or `[n, S, C]`, any float dtype.
        state: `[n, (S,) C + 1]`, None at the first exit.
        threshold: 0-dim; above 1 the exit is closed and does not take part.

    Returns:
        Logits of the ensemble, shape and dtype of `logits`, and the new state.
    """
    log_p, usable = _log_probabilities(logits)
    if state is None:
        state = _blank(logits, log_p.dtype, 0.0)
    added = torch.cat((log_p, torch.ones_like(log_p[..., :1])), -1).masked_fill(~usable, 0.0)
    new = state + added
    mean = (new[..., :-1] / new[..., -1:].clamp(min=1)).to(logits.dtype)
    output = torch.where(usable & (state[..., -1:] > 0), mean, logits)
    return output, new if threshold is None else torch.where(threshold > 1, state, new)


def keep_best(
    logits: Tensor, confidence: Tensor, state: Tensor | None, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The surest exit so far, in plain torch.

    Args:
        logits: `[n, C]` or `[n, S, C]`, any float dtype.
        confidence: `[n]` float32; NaN is never the surest.
        state: `[n, (S,) C + 1]`, None at the first exit.
        threshold: 0-dim; above 1 the exit is closed and does not take part.

    Returns:
        Logits of the surest exit so far, its confidence `[n]` (NaN where there is none), and the new state.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if state is None:
        state = _blank(logits, dtype, -1.0)
    best = state[..., -1].flatten(1)[:, 0] if logits.ndim > 2 else state[..., -1]
    better = confidence >= best
    rows = (-1, *(1,) * (logits.ndim - 1))
    own = (better | (best < 0)).view(rows)
    output = torch.where(own, logits, state[..., :-1].to(logits.dtype))
    known = best.masked_fill(best < 0, math.nan).to(confidence.dtype)
    surest = torch.where(better, confidence, known)
    held = torch.where(better, confidence.to(dtype), best)
    new = torch.cat((output.to(dtype), held.view(rows).expand(*logits.shape[:-1], 1)), -1)
    new = torch.where((better | (best >= 0)).view(rows), new, state)  # what cannot be read does not enter
    return output, surest, new if threshold is None else torch.where(threshold > 1, state, new)


def weighted_ensemble(
    logits: Tensor,
    state: Tensor | None,
    log_weights: Tensor,
    log_bias: Tensor,
    index: int,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The trained geometric ensemble, in plain torch. May return an input as it is; the operator copies.

    Args:
        logits: `[n, C]` or `[n, S, C]`, any float dtype.
        state: `[n, (S,) E, C]`, None at the first exit.
        log_weights: `[E, E]`; row m holds the weights of exits 0 to m at exit m.
        log_bias: `[E, C]`.
        index: Which exit, 0 to E - 1.
        threshold: 0-dim; above 1 the exit is closed and does not take part.

    Returns:
        Log-probabilities of the ensemble, shape and dtype of `logits`, and the new state.
    """
    log_p, usable = _log_probabilities(logits)
    if state is None:
        state = logits.new_zeros((*logits.shape[:-1], log_weights.shape[0], logits.shape[-1]), dtype=log_p.dtype)
    mine = log_p.clamp(min=LEAST).masked_fill(~usable, 0.0).unsqueeze(-2)
    new = torch.cat((state[..., :index, :], mine, state[..., index + 1 :, :]), -2)
    weights = log_weights[index, : index + 1].exp().to(log_p.dtype).unsqueeze(-1)
    together = (weights * new[..., : index + 1, :]).sum(-2) + log_bias[index].to(log_p.dtype)
    output = torch.where(usable, torch.log_softmax(together, -1).to(logits.dtype), logits)
    return output, new if threshold is None else torch.where(threshold > 1, state, new)


def _log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., C]` in the precision of the arithmetic, and `[..., 1]` bool: which of them can be read."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return log_p, ~log_p.isnan().any(-1, keepdim=True)


def _blank(logits: Tensor, dtype: torch.dtype, last: float) -> Tensor:
    zeros = torch.zeros_like(logits, dtype=dtype)
    return torch.cat((zeros, torch.full_like(zeros[..., :1], last)), -1)


def check_combination(name: str) -> str:
    """The name itself.

    Raises:
        StrategyError: It is unknown; the message lists the valid ones.
    """
    check_name("combination of exits", name, COMBINATIONS, StrategyError)
    return name


# --- operators ------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::ensemble", mutates_args=())
def ensemble_op(logits: Tensor, state: Tensor | None, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ensemble` as `torch.ops.eecompile.ensemble`."""
    output, new = ensemble(logits, state, threshold)
    return output.clone() if output is logits else output, new.clone() if new is state else new


@ensemble_op.register_fake
def _fake_ensemble(logits: Tensor, state: Tensor | None, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), _empty_state(logits)


@torch.library.custom_op("eecompile::weighted_ensemble", mutates_args=())
def weighted_ensemble_op(
    logits: Tensor,
    state: Tensor | None,
    log_weights: Tensor,
    log_bias: Tensor,
    index: int,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`weighted_ensemble` as `torch.ops.eecompile.weighted_ensemble`."""
    output, new = weighted_ensemble(logits, state, log_weights, log_bias, index, threshold)
    return output, new.clone() if new is state else new


@weighted_ensemble_op.register_fake
def _fake_weighted(
    logits: Tensor,
    state: Tensor | None,
    log_weights: Tensor,
    log_bias: Tensor,
    index: int,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = (*logits.shape[:-1], log_weights.shape[0], logits.shape[-1])
    return torch.empty_like(logits), logits.new_empty(shape, dtype=dtype)


@torch.library.custom_op("eecompile::keep_best", mutates_args=())
def keep_best_op(
    logits: Tensor, confidence: Tensor, state: Tensor | None, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`keep_best` as `torch.ops.eecompile.keep_best`."""
    return keep_best(logits, confidence, state, threshold)


@keep_best_op.register_fake
def _fake_keep_best(
    logits: Tensor, confidence: Tensor, state: Tensor | None, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(confidence), _empty_state(logits)


def _empty_state(logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((*logits.shape[:-1], logits.shape[-1] + 1), dtype=dtype)


differentiable(ensemble_op, ensemble)
differentiable(keep_best_op, keep_best)
differentiable(weighted_ensemble_op, weighted_ensemble)
