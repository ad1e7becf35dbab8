"""Objectives of a router, added to the task's: the price of the routes, and an even load.

Costs are fractions of the full model's FLOPs. Where it is known what every route does to a row (`route_exits`, since
training computes every exit; `route_regret`, for which the model runs once more for every branch), choosing one is
cost-sensitive classification (Zadrozny et al. 2003): with L_k = loss_k + price * cost_k, the cross entropy of route k is
weighted by what it saves against the worst, max_j L_j - L_k. The likeliest route is then the one with the least expected
L_k, as it would be if sum_k P_k L_k itself were the loss; but that is flat where a router is sure, so that a price which ran
ahead of it for a while leaves all rows on one route for good. Otherwise the gradient of a branch's decision is straight
through, of noisy or mixed probabilities (`gate_cost` does the same for gates), or by REINFORCE.

The load-balancing loss is that of the Switch Transformer (Fedus et al. 2021), `K * sum_k f_k * P_k` with the share f_k of
rows that take route k and its mean probability P_k: 1 where both are even, more where one route has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives.base import losses_of, outputs_of
from eecompile.training.objectives.gates import GateCost, Priced, Reinforce, cost_of
from eecompile.training.scores import check_labels

EPSILON = 1e-6


@dataclass(frozen=True)
class Balanced(Priced):
    """The options of every objective of a router.

    Args:
        balance: Weight of the load-balancing loss.
        target, price, rate, gain, ceiling: See `Steering`.
    """

    target: float | None = None
    price: float = 0.1
    gain: float = 1.0  # what a row loses on another route is a few tenths: less than with gates
    balance: float = 0.0

    def options(self) -> tuple[str, ...]:
        return (*super().options(), "balance")

    def regret(self, weights: Tensor, costs: Tensor, outputs: Sequence[Tensor], labels: Any, where: str) -> Tensor:
        """`mean_b sum_k (max_j L_j - L_k) * -log P_k`, 0-dim, of the outputs of K routes, taken as they are."""
        labels = check_labels(outputs[-1], labels, where)
        losses = torch.stack([losses_of(output.detach(), labels) for output in outputs], 1)  # [B, K]
        now = self.priced((weights.detach() * costs).sum(1))
        spent = losses + now * costs
        saved = spent.max(1, keepdim=True).values - spent
        return (saved * -weights.clamp_min(EPSILON).log()).sum(1).mean()

    def unevenness(self, result: Result, where: str) -> Tensor:
        """The load-balancing loss with its weight, 0-dim."""
        weights, _ = routes_of(result, where)
        return self.balance * uneven(weights, result.route)


@dataclass(frozen=True)
class RouteExits(Balanced):
    """Cost-sensitive cross entropy of the exit that a row is sent to.

    The losses are those of the exits as they are, without a gradient: heads are trained by the task's objective.
    """

    name: ClassVar[str] = "route_exits"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        outputs, weights, costs = outputs_of(result), *routes_of(result, where)
        if weights.shape[1] != len(outputs):
            raise EecompileError(
                "the router does not send rows to exits", where=where, got=f"{weights.shape[1]} branches",
                hint="the objective route_cost",
            )  # fmt: skip
        return self.regret(weights, costs, outputs, labels, where) + self.unevenness(result, where)


@dataclass(frozen=True)
class RouteRegret(Balanced):
    """Cost-sensitive cross entropy of the branch that a row is sent to.

    The branches themselves are trained by the task's objective on rows that are sent to them at random, so that each goes on
    learning from all kinds of rows. On a result of eval mode, where rows have been sent, it is the price of that.
    """

    name: ClassVar[str] = "route_regret"
    weighs_rows: ClassVar[bool] = True

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        weights, costs = routes_of(result, where)
        if result.trace.branch_outputs is None:
            if torch.is_grad_enabled():
                raise EecompileError(
                    "a route's regret needs the loss of every branch",
                    where=where,
                    got="a result without way_outputs",
                    wanted="a result of train mode, and a router to branches",
                    hint='fast.gate_mode = "every"; for a router to exits the objective route_exits',
                )
            return self.controller.now * cost_of(result, where).mean()
        return self.regret(weights, costs, result.trace.branch_outputs, labels, where) + self.unevenness(result, where)


@dataclass(frozen=True)
class RouteCost(Balanced, GateCost):
    """`price * mean(cost)` and the load-balancing loss: for decisions between branches that have a gradient."""

    name: ClassVar[str] = "route_cost"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        # the router is asked for first: without one there is nothing to price
        balance = self.unevenness(result, where)
        return GateCost.__call__(self, result, labels, where=where) + balance


@dataclass(frozen=True)
class RouteReinforce(Balanced, Reinforce):
    """Policy gradient of sampled branches, as `Reinforce` has it for gates, and the load-balancing loss.

    Args:
        reward, entropy, memory: As in `Reinforce`; the entropy is that of the K routes of a row, in nats.
    """

    name: ClassVar[str] = "route_reinforce"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        balance = self.unevenness(result, where)
        return Reinforce.__call__(self, result, labels, where=where) + balance

    def likelihood(self, result: Result, where: str) -> tuple[Tensor, Tensor]:
        if cost_of(result, where).requires_grad:
            raise EecompileError(
                "REINFORCE needs sampled decisions",
                where=where,
                got="decisions with a gradient",
                hint='fast.gate_mode = "sample", or the objective route_cost',
            )
        weights, _ = routes_of(result, where)
        assert result.route is not None
        p = weights.clamp(EPSILON, 1)
        chosen = p.log().gather(1, result.route.clamp_min(0).unsqueeze(1)).squeeze(1)
        return chosen * (result.route >= 0), -(p * p.log()).sum(1)


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


def uneven(weights: Tensor, route: Tensor | None) -> Tensor:
    """The load-balancing loss, 0-dim; rows that had left before the branches count for nothing."""
    assert route is not None
    there = route >= 0
    count = there.sum().clamp_min(1)
    share = torch.nn.functional.one_hot(route[there], weights.shape[1]).sum(0) / count
    mean = (weights * there.unsqueeze(1)).sum(0) / count
    return weights.shape[1] * (share * mean).sum()
