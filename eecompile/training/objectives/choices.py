"""Objectives of what is chosen for a row (gates, branches, the exit that a router sends it to), added to the task's.

| objective | a choice learns from | applies where |
|---|---|---|
| regret | the loss and the cost of every arm | training computes every arm of a router: exits, branches with "every" |
| choice_cost | the gradient of the task's loss and of the cost | decisions have a gradient: "soft", "hard", "gumbel" |
| reinforce | the reward of what was drawn | decisions are drawn: "sample" |

(in quotes: `fast.gate_mode`). Where arms can be enumerated the first is the one to take: it has neither the second's bias
nor the third's noise. Which block of a chain is the last one can be enumerated too, see `depth.py`; which of many gates are
closed cannot.

Costs are fractions of the full model's FLOPs, so a gate counts by what its region costs. Gates and branches are priced by
`Trace.end_cost`, the cost with every exit closed, so that exits in the same graph do not pay for them.

With L_k = loss_k + price * cost_k, choosing an arm is cost-sensitive classification (Zadrozny et al. 2003): the cross
entropy of arm k is weighted by what it saves against the worst, max_j L_j - L_k. The likeliest arm is then the one with the
least expected L_k, as it would be if sum_k P_k L_k itself were the loss; but that is flat where a choice is sure, so that a
price which ran ahead of it for a while leaves all rows on one arm for good.

The load-balancing loss of a router is that of the Switch Transformer (Fedus et al. 2021), `K * sum_k f_k * P_k` with the
share f_k of rows that take route k and its mean probability P_k: 1 where both are even, more where one route has most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError, check_name
from eecompile.result import Result
from eecompile.training.objectives.base import Objective, losses_of, outputs_of
from eecompile.training.objectives.price import Price, Steering
from eecompile.training.scores import check_labels, right

REWARDS = ("log_likelihood", "correctness")
EPSILON = 1e-6


@dataclass(frozen=True)
class Priced(Objective):
    """Base of objectives with a price per computed FLOP that is steered towards a target cost.

    The price moves with every loss that gradients are recorded for, is part of a checkpoint, and goes from one stage of
    training to the next.

    Args:
        target, price, rate, gain, ceiling: See `Steering`.
    """

    target: float | None = 0.6
    price: float = 0.0
    rate: float = 0.05
    gain: float = 2.0
    ceiling: float = 20.0
    controller: Price = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steering = Steering(self.target, self.price, self.rate, self.gain, self.ceiling)
        object.__setattr__(self, "controller", Price(steering))

    def priced(self, cost: Tensor, free: Tensor | None = None) -> float:
        """The price for this batch, which then moves on with its mean cost.

        Args:
            free: [B, G] bool, where gates decided by their own score: rows without any have no part in the mean.
        """
        now = self.controller.now
        if torch.is_grad_enabled():
            deciding = cost.detach() if free is None or not bool(free.any()) else cost.detach()[free.any(1)]
            self.controller.follow(float(deciding.mean()))
        return now

    def final(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        return outputs_of(result)[-1].sum() * 0

    def options(self) -> tuple[str, ...]:
        return ("target", "price", "rate", "gain", "ceiling")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **{name: getattr(self, name) for name in self.options()}}

    def state(self) -> dict[str, Any]:
        return {"price": self.controller.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.controller.load_state(state.get("price", {}))

    def passed_on(self) -> dict[str, Any]:
        return {"price": self.controller.state()}

    def take(self, passed: dict[str, Any]) -> None:
        if "price" in passed:
            self.controller.load_state(passed["price"])


@dataclass(frozen=True)
class Balanced(Priced):
    """Base of those that a router may be trained by.

    Args:
        balance: Weight of the load-balancing loss, where there is a router.
        target, price, rate, gain, ceiling: See `Steering`.
    """

    balance: float = 0.0

    def options(self) -> tuple[str, ...]:
        return (*super().options(), "balance")

    def unevenness(self, result: Result) -> Tensor | float:
        """The load-balancing loss with its weight, 0-dim; 0 without a router."""
        weights, route = result.trace.route_weights, result.route
        return 0.0 if weights is None or route is None else self.balance * uneven(weights, route)


@dataclass(frozen=True)
class Regret(Balanced):
    """Cost-sensitive cross entropy of the route that a row takes, by the loss and the cost of every one.

    Losses are those of exits or branches as they are, without a gradient: the task's objective trains these, branches on
    rows that are sent to them at random, so that each goes on learning from all kinds of rows. On a result of eval mode,
    where branches have been taken, it is the price of that.
    """

    name: ClassVar[str] = "regret"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        weights, costs = routes_of(result, where)
        outputs = result.trace.route_outputs
        if outputs is None:
            if torch.is_grad_enabled():
                raise EecompileError(
                    "a route's regret needs the loss of every branch",
                    where=where,
                    got="a result without route_outputs",
                    wanted="a result of train mode, with every branch computed",
                    hint='fast.gate_mode = "every"',
                )
            return self.controller.now * cost_of(result, where).mean()
        labels = check_labels(outputs[-1], labels, where)
        losses = torch.stack([losses_of(output.detach(), labels) for output in outputs], 1)  # [B, K]
        now = self.priced((weights.detach() * costs).sum(1))
        return regret(weights, losses + now * costs) + self.unevenness(result)


@dataclass(frozen=True)
class ChoiceCost(Balanced):
    """`price * mean(cost)`: for decisions that have a gradient (soft, hard, Gumbel)."""

    name: ClassVar[str] = "choice_cost"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        cost = cost_of(result, where)
        if torch.is_grad_enabled() and not cost.requires_grad:
            raise EecompileError(
                "sampled decisions have no gradient",
                where=where,
                got="the objective choice_cost",
                hint='the objective reinforce, or fast.gate_mode = "hard", "soft" or "gumbel"',
            )
        return self.priced(cost, result.trace.gates_free) * cost.mean() + self.unevenness(result)


@dataclass(frozen=True)
class Reinforce(Balanced):
    """Policy gradient for sampled decisions (Williams 1992), as in the last phase of SkipNet (Wang et al. 2018).

        reward    = task reward - price * cost                        per row
        advantage = reward - baseline
        loss      = -mean(advantage * log pi(decisions)) - entropy * mean(H(pi))

    Rows without a label have advantage 0. pi is over the decisions that scores made: gates kept open or closed, or forced
    open by `min_open`, have no part in it, nor have routes of rows that left before them. The baseline is a moving mean of
    the reward before this batch; in the first batch, that batch's mean without the row itself. Neither biases the gradient.

    Args:
        reward: "log_likelihood" of the labels, or "correctness" (1 or 0; the share of right positions).
        entropy: Bonus on the entropy of every free decision, in nats per gate and route.
        memory: Share of the old baseline in a new one.
        balance, target, price, rate, gain, ceiling: As in `Balanced`.
    """

    name: ClassVar[str] = "reinforce"

    reward: str = "log_likelihood"
    entropy: float = 0.01
    memory: float = 0.95
    baseline: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("reward", self.reward, REWARDS)
        if not self.entropy >= 0:
            raise EecompileError("entropy is the weight of a bonus", got=self.entropy, wanted="0 or more")
        if not 0 <= self.memory < 1:
            raise EecompileError("memory of the baseline is out of range", got=self.memory, wanted="0 to below 1")

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        cost = cost_of(result, where).detach()
        price = self.priced(cost, result.trace.gates_free)
        if not torch.is_grad_enabled():
            return price * cost.mean()
        likelihood, entropy = self.likelihood(result, where)
        last = outputs_of(result)[-1].detach()
        labels = check_labels(last, labels, where)
        reward = self.task_reward(last, labels) - price * cost
        labelled = right(last, labels)[1]
        advantage = torch.where(labelled, reward - self._baseline(reward[labelled], reward), 0.0)
        return -(advantage * likelihood).mean() - self.entropy * entropy.mean() + self.unevenness(result)

    def likelihood(self, result: Result, where: str) -> tuple[Tensor, Tensor]:
        """[B] log probability of the decisions as they were drawn, and [B] their entropy."""
        trace = result.trace
        if any(value is not None and value.requires_grad for value in (result.gates, trace.end_cost)):
            raise EecompileError(
                "REINFORCE needs sampled decisions",
                where=where,
                got="decisions with a gradient",
                hint='fast.gate_mode = "sample", or the objective choice_cost',
            )
        found = []
        if result.gates is not None and trace.gate_scores is not None:
            found.append(_of_gates(result.gates, trace.gate_scores, trace.gates_free))
        if result.route is not None:
            found.append(_of_route(result.route, routes_of(result, where)[0]))
        likelihoods, entropies = zip(*found, strict=True)
        return torch.stack(likelihoods).sum(0), torch.stack(entropies).sum(0)

    def task_reward(self, last: Tensor, labels: Tensor) -> Tensor:
        """`[B]`, of the model's own output with the gates as they were drawn; `labels` are checked."""
        if self.reward == "correctness":
            share: Tensor = right(last, labels)[0].float()
            return share
        return -losses_of(last, labels)

    def _baseline(self, labelled: Tensor, reward: Tensor) -> Tensor:
        """`[B]`; the moving mean follows the rewards `labelled` afterwards, those of rows with a label."""
        n = labelled.shape[0]
        if n == 0:
            return torch.zeros_like(reward)
        if self.baseline:
            used = torch.full_like(reward, self.baseline[0])
        else:
            used = (labelled.sum() - reward) / (n - 1) if n > 1 else torch.zeros_like(reward)
        mean = float(labelled.mean())
        self.baseline[:] = [self.memory * self.baseline[0] + (1 - self.memory) * mean if self.baseline else mean]
        return used

    def options(self) -> tuple[str, ...]:
        return (*super().options(), "reward", "entropy", "memory")

    def state(self) -> dict[str, Any]:
        return {**super().state(), "baseline": list(self.baseline)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.baseline[:] = state.get("baseline", [])


def _of_gates(gates: Tensor, scores: Tensor, free: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B] log probability of gates [B, G] and [B] their entropy, of those that their scores decided."""
    counted = torch.ones_like(gates) if free is None else free.float()
    score = scores.float().clamp(EPSILON, 1 - EPSILON)
    log_p, log_q = score.log(), (1 - score).log()
    chosen = torch.where(gates > 0.5, log_p, log_q)
    return (chosen * counted).sum(1), -((score * log_p + (1 - score) * log_q) * counted).sum(1)


def _of_route(route: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[B] log probability of the route [B] and [B] its entropy, from the probabilities [B, K]."""
    p = weights.clamp(EPSILON, 1)
    chosen = p.log().gather(1, route.clamp_min(0).unsqueeze(1)).squeeze(1)
    return chosen * (route >= 0), -(p * p.log()).sum(1)


def regret(weights: Tensor, spent: Tensor) -> Tensor:
    """`mean_b sum_k (max_j L_j - L_k) * -log P_k`, 0-dim.

    Args:
        weights: [B, K], probabilities P of the arms.
        spent: [B, K], L: the loss of each arm and the price of its cost, without a gradient.
    """
    saved = spent.max(1, keepdim=True).values - spent
    return (saved * -weights.clamp_min(EPSILON).log()).sum(1).mean()


def cost_of(result: Result, where: str) -> Tensor:
    """`[B]`: cost of every row with gates and branches as they were decided and all exits closed."""
    if result.trace.end_cost is None:
        raise EecompileError(
            "there are no gates or branches whose cost could be priced",
            where=where,
            got="a result without gates and branches",
            wanted="a strategy that chooses, and a result of train mode",
            hint='strategy="skipnet" or Branchy(router=Router(to={"light": 0.5})), fast.train()',
        )
    return result.trace.end_cost


def routes_of(result: Result, where: str) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K] and costs [K] of the routes."""
    if result.trace.route_weights is None or result.trace.route_costs is None:
        raise EecompileError(
            "there is no router to train",
            where=where,
            got="a result without routes",
            wanted="a strategy with a router, and a result of train mode",
            hint="Branchy(router=Router()), fast.train()",
        )
    return result.trace.route_weights, result.trace.route_costs


def uneven(weights: Tensor, route: Tensor) -> Tensor:
    """The load-balancing loss, 0-dim; rows that had left before the branches count for nothing."""
    there = route >= 0
    count = there.sum().clamp_min(1)
    share = torch.nn.functional.one_hot(route[there], weights.shape[1]).sum(0) / count
    mean = (weights * there.unsqueeze(1)).sum(0) / count
    return weights.shape[1] * (share * mean).sum()
