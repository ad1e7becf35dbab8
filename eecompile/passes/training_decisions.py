"""Decisions of gates and routers in training, in place of `gate` and `choose`.

| mode | decision | gradient of the score |
|---|---|---|
| hard | open or closed by the threshold | straight through (Bengio et al. 2013) |
| soft | none: `score * y + (1 - score) * x` | that of the blend; the first phase of SkipNet (Wang et al. 2018) |
| sample | Bernoulli(score) | none: REINFORCE uses the log probability of `Result.gates` under `Trace.gate_scores` |
| gumbel | hard, with logistic noise on the score's logit | straight through the noisy score (Jang et al. 2017) |
| uniform | each way equally likely | none: so that every branch is trained on all kinds of rows |
| dropped | closed by chance, the later the likelier, the last half the time | none (stochastic depth, Huang et al. 2016) |
| every | gates as hard, ways as uniform | none: the objective reads the loss of every way (`Trace.route_outputs`) |
| open | open, whatever score and threshold | none: for objectives that read the scores with every depth's prediction |

A router's scores are the probabilities of its K ways, and "open" is the model's own; closed ways are never taken.

A gate whose threshold is 0 or above 1 stays open or closed in every mode but "open", and `min_open` forces it open as in
`gate`. A curriculum keeps the first gates open and lets ever more of the last ones decide (BlockDrop, Wu et al. 2018).
The first rows of every batch may run the full model, which else forgets what it could: blocks that are skipped for nearly
every row are trained for no other (the sandwich rule of slimmable networks, Yu and Huang 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.errors import check_name
from eecompile.kernels.choose import per_row
from eecompile.passes import facts
from eecompile.plain import check_switches

EPSILON = 1e-6
assert eecompile.ops is not None


@dataclass(frozen=True)
class TrainMode:
    """What a run in train mode trains, and how gates and routers decide in it.

    Attributes:
        trunk: Whether gradients reach the user's model.
        gates: How gates and routers decide: a mode of the table above.
        kept_open: So many gates, the first ones, do not decide.
        full_share: Share of a batch's rows, the first ones, that every gate lets in.
    """

    trunk: bool = False
    gates: str = "hard"
    kept_open: int = 0
    full_share: float = 0.0

    def __post_init__(self) -> None:
        check_switches(type(self), vars(self))
        check_name("way to train gates", self.gates, MODES)


def with_decisions(
    gm: fx.GraphModule, mode: str, kept_open: int = 0, full_share: float = 0.0, way: int | None = None
) -> fx.GraphModule:
    """`gm` with its gates deciding as `mode` says; the graph is its own, modules and parameters are shared.

    Args:
        kept_open: The first so many gates do not decide but stay open.
        full_share: Share of the rows, the first ones, that every gate lets in.
        way: The way that every row takes, whatever the router says; None lets `mode` say.

    """
    if mode == "hard" and not kept_open and not full_share and way is None:
        return gm
    new = facts.copy(gm)
    decide: Callable[..., Tensor] = DECISIONS[mode]
    for n in list(new.graph.nodes):
        if n.target is torch.ops.eecompile.gate.default:
            n.target = always if n.args[2] < kept_open else decide
            if full_share:
                with new.graph.inserting_after(n):
                    let_in = new.graph.call_function(open_for_first, (n, full_share))
                let_in.meta = dict(n.meta)
                n.replace_all_uses_with(let_in, delete_user_cb=lambda user, own=let_in: user is not own)
        elif n.target is torch.ops.eecompile.choose.default:
            routed = facts.value(n.args[0]).ndim == 2  # a router's weights for each branch, else a gate
            if routed and way is not None:
                n.replace_all_uses_with(n.args[1][way])
                continue
            if routed and mode in WAYS:
                n.args[0].target = WAYS[mode]
            if mode == "soft":
                n.target = mixture if routed else blend
    if way is not None:
        new.graph.eliminate_dead_code()
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


def uniform(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """1 or 0, equally likely."""
    return _bounded(torch.bernoulli(torch.full_like(score, 0.5, dtype=torch.float32)), thresholds[index], opened, least)


def dropped(score: Tensor, thresholds: Tensor, index: int, opened: Tensor | None = None, least: int = 0) -> Tensor:
    """0 with a probability that rises evenly from gate to gate, to a half for the last one, else 1."""
    stays = 1 - 0.5 * (index + 1) / thresholds.shape[0]
    return _bounded(torch.bernoulli(torch.full_like(score, stays, dtype=torch.float32)), thresholds[index], opened, least)


def full_rows(rows: int, share: float, device: torch.device) -> Tensor:
    """[rows] bool: the first `share` of a batch, to the nearest row, that run the full model in training."""
    return torch.arange(rows, device=device) < round(share * rows)


def open_for_first(decision: Tensor, share: float) -> Tensor:
    """`decision` [B], 1 for the rows of `full_rows`, which pass no gradient on to the score."""
    return torch.where(full_rows(decision.shape[0], share, decision.device), 1.0, decision)


DECISIONS: dict[str, Callable[..., Tensor]] = {
    "hard": torch.ops.eecompile.gate.default,
    "soft": soft,
    "sample": sample,
    "gumbel": gumbel,
    "uniform": uniform,
    "dropped": dropped,
    "every": torch.ops.eecompile.gate.default,
    "open": always,
}
MODES = tuple(DECISIONS)


def _bounded(decision: Tensor, threshold: Tensor, opened: Tensor | None, least: int) -> Tensor:
    """Always open at threshold 0, always closed above 1, forced open where too few gates were."""
    forced = (threshold <= 0).expand(decision.shape)
    if least > 0:
        few = torch.ones_like(forced) if opened is None else opened < least
        forced = forced | few
    return torch.where(threshold > 1, 0.0, torch.where(forced, 1.0, decision))


def blend(gate: Tensor, values: Sequence[Tensor], batch_axis: int) -> Tensor:
    """`gate * y + (1 - gate) * x` of the values `[x, y]`, rows along `batch_axis`."""
    x, y = values
    weight = per_row(gate, y, batch_axis).to(y.dtype)
    return weight * y + (1 - weight) * x


# --- routers: [B, K] whose largest entry is a row's way, from the probabilities `weights` [B, K] and `margins` [K]


def soft_ways(weights: Tensor, margins: Tensor) -> Tensor:
    """The probabilities themselves, those of open ways."""
    p = weights.clamp_min(EPSILON) * (margins <= 1)
    return p / p.sum(1, keepdim=True)


def sampled_ways(weights: Tensor, margins: Tensor) -> Tensor:
    """1 for a way drawn with these probabilities, else 0."""
    drawn = torch.multinomial(soft_ways(weights.detach(), margins), 1)
    return torch.zeros_like(weights).scatter(1, drawn, 1.0).detach()


def uniform_ways(weights: Tensor, margins: Tensor) -> Tensor:
    """1 for one of the open ways, each as likely as the others, else 0."""
    return sampled_ways(torch.ones_like(weights), margins)


def gumbel_ways(weights: Tensor, margins: Tensor) -> Tensor:
    """The probabilities with Gumbel noise on their logarithms (Jang et al. 2017)."""
    p = soft_ways(weights, margins)
    noise = -torch.log(-torch.log(torch.rand_like(p).clamp(EPSILON, 1 - EPSILON)))
    closed = torch.where(margins <= 1, 0.0, -torch.inf)
    return torch.softmax(p.clamp_min(EPSILON).log() + noise + closed, 1)


def own_way(weights: Tensor, margins: Tensor) -> Tensor:
    """1 for the last way, the model's own."""
    last = torch.tensor([weights.shape[1] - 1], device=weights.device)
    return torch.zeros_like(weights).index_fill(1, last, 1.0)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": soft_ways,
    "sample": sampled_ways,
    "uniform": uniform_ways,
    "dropped": uniform_ways,
    "every": uniform_ways,
    "gumbel": gumbel_ways,
    "open": own_way,
}


def mixture(weights: Tensor, branches: Sequence[Tensor], batch_axis: int) -> Tensor:
    """`sum_k weights[:, k] * branches[k]`, rows along `batch_axis`."""
    parts = [per_row(weights[:, k], b, batch_axis).to(b.dtype) * b for k, b in enumerate(branches)]
    return torch.stack(parts).sum(0)
