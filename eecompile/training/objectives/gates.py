"""Objectives of gates, added to the task's: a price on what they compute, and REINFORCE.

Costs are fractions of the full model's FLOPs, so a gate counts by what its region costs. Both objectives read
`Trace.end_cost`, the cost with every exit closed, so that exits in the same graph do not pay for the gates; they are
parts of a sum whose other parts are the task's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from eecompile.errors import EecompileError, near
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
class GateCost(Priced):
    """`price * mean(cost)`: for gates whose decisions have a gradient (soft, hard, Gumbel).

    Args:
        target, price, rate, gain, ceiling: See `Steering`.
    """

    name: ClassVar[str] = "gate_cost"

    def __call__(self, result: Result, labels: Any, *, where: str = "this batch") -> Tensor:
        cost = cost_of(result, where)
        if torch.is_grad_enabled() and not cost.requires_grad:
            raise EecompileError(
                "sampled decisions have no gradient",
                where=where,
                got="the objective gate_cost",
                hint='the objective reinforce, or fast.gate_mode = "hard", "soft" or "gumbel"',
            )
        return self.priced(cost, result.trace.gates_free) * cost.mean()


@dataclass(frozen=True)
class Reinforce(Priced):
    """Policy gradient for sampled decisions (Williams 1992), as in the last phase of SkipNet (Wang et al. 2018).

        reward    = task reward - price * cost                        per row
        advantage = reward - baseline
        loss      = -mean(advantage * log pi(gates)) - entropy * mean(H(scores))

    Rows without a label have advantage 0. The sum is over the decisions that the score made: gates kept open or closed, or
    forced open by `min_open`, have no part in it. The baseline is a moving mean of the reward before this batch; in the
    first batch, that batch's mean without the row itself. Neither biases the gradient.

    Args:
        reward: "log_likelihood" of the labels, or "correctness" (1 or 0; the share of right positions).
        entropy: Bonus on the entropy of every free decision, in nats per gate.
        memory: Share of the old baseline in a new one.
        target, price, rate, gain, ceiling: See `Steering`.
    """

    name: ClassVar[str] = "reinforce"
    weighs_rows: ClassVar[bool] = True

    reward: str = "log_likelihood"
    entropy: float = 0.01
    memory: float = 0.95
    baseline: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward not in REWARDS:
            raise EecompileError("unknown reward", got=repr(self.reward), wanted=near(self.reward, REWARDS))
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
        return -(advantage * likelihood).mean() - self.entropy * entropy.mean()

    def likelihood(self, result: Result, where: str) -> tuple[Tensor, Tensor]:
        """[B] log probability of the decisions as they were drawn, and [B] their entropy."""
        if result.gates is None or result.trace.gate_scores is None or result.gates.requires_grad:
            raise EecompileError(
                "REINFORCE needs sampled decisions",
                where=where,
                got="decisions with a gradient",
                hint='fast.gate_mode = "sample", or the objective gate_cost',
            )
        free = torch.ones_like(result.gates) if result.trace.gates_free is None else result.trace.gates_free.float()
        score = result.trace.gate_scores.float().clamp(EPSILON, 1 - EPSILON)
        log_p, log_q = score.log(), (1 - score).log()
        chosen = torch.where(result.gates > 0.5, log_p, log_q)
        entropy = -((score * log_p + (1 - score) * log_q) * free).sum(1)
        return (chosen * free).sum(1), entropy

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


def cost_of(result: Result, where: str) -> Tensor:
    """`[B]`: cost of every row with its gates as they decided and all exits closed."""
    if result.trace.end_cost is None:
        raise EecompileError(
            "there are no gates whose cost could be priced",
            where=where,
            got="a result without gates",
            wanted="a strategy with gates, and a result of train mode",
            hint='strategy="skipnet", fast.train()',
        )
    return result.trace.end_cost
