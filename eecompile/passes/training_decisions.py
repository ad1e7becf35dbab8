"""How gates decide while they are trained: the marked graph with other decisions in place of `gate` and `skip`.

| mode | decision | gradient of the score |
|---|---|---|
| hard | open or shut by the threshold | straight through (Bengio et al. 2013) |
| soft | none: `score * y + (1 - score) * x` | that of the blend; the first phase of SkipNet (Wang et al. 2018) |
| sample | Bernoulli(score) | none: REINFORCE uses the log probability of `Result.gates` under `Result.gate_scores` |
| gumbel | hard, with logistic noise on the score's logit | straight through the noisy score (Jang et al. 2017) |
| open | open, whatever score and threshold | none: for objectives that read the scores beside every depth's prediction |

A gate whose threshold is 0 or above 1 stays open or shut in every mode but "open", and `min_open` forces it open as in
`gate`. A curriculum keeps the first gates open and lets ever more of the last ones decide (BlockDrop, Wu et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import EecompileError, near
from eecompile.kernels.route import per_row
from eecompile.passes import facts

EPSILON = 1e-6
assert eecompile.ops is not None


def with_decisions(gm: fx.GraphModule, mode: str, kept_open: int = 0) -> fx.GraphModule:
    """`gm` with its gates deciding as `mode` says; the graph is its own, modules and parameters are shared.

    Args:
        kept_open: The first so many gates do not decide but stay open.

    Raises:
        EecompileError: Unknown mode.
    """
    if mode not in MODES:
        raise EecompileError("unknown way to train gates", got=repr(mode), wanted=near(mode, MODES))
    if mode == "hard" and not kept_open:
        return gm
    new = facts.copy(gm)
    decide: Callable[..., Tensor] = DECISIONS[mode]
    for n in new.graph.nodes:
        if n.target is torch.ops.eecompile.gate.default:
            n.target = always if n.args[2] < kept_open else decide
        elif mode == "soft" and n.target is torch.ops.eecompile.skip.default:
            n.target = blend
    new.recompile()
    return new


def soft(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """The score itself, float32."""
    return _bounded(score.float(), thresholds[index], opened, least)


def sample(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """1 with probability `score`, else 0."""
    drawn = torch.bernoulli(score.detach().float().nan_to_num(nan=1.0).clamp(0, 1))
    return _bounded(drawn, thresholds[index], opened, least)


def gumbel(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """1 or 0 by the noisy score, with the noisy score's gradient."""
    p = score.float().clamp(EPSILON, 1 - EPSILON)
    u = torch.rand_like(p).clamp(EPSILON, 1 - EPSILON)
    noisy = torch.sigmoid(torch.logit(p) + torch.logit(u))
    hard = (noisy >= 0.5).float()
    through = noisy - noisy.detach()  # zero exactly, with the noisy score's gradient
    return _bounded(hard + through, thresholds[index], opened, least)


def always(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """1 for every row."""
    return torch.ones_like(score, dtype=torch.float32)


DECISIONS: dict[str, Callable[..., Tensor]] = {
    "hard": torch.ops.eecompile.gate.default,
    "soft": soft,
    "sample": sample,
    "gumbel": gumbel,
    "open": always,
}
MODES = tuple(DECISIONS)


def _bounded(decision: Tensor, threshold: Tensor, opened: Tensor | None, least: int) -> Tensor:
    """Always open at threshold 0, always shut above 1, forced open where too few gates were."""
    forced = (threshold <= 0).expand(decision.shape)
    if least > 0:
        few = torch.ones_like(forced) if opened is None else opened < least
        forced = forced | few
    return torch.where(threshold > 1, 0.0, torch.where(forced, 1.0, decision))


def blend(gate: Tensor, y: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    """`gate * y + (1 - gate) * x`, rows along `batch_axis`."""
    weight = per_row(gate, y, batch_axis).to(y.dtype)
    return weight * y + (1 - weight) * x
