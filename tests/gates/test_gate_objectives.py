"""Objectives of gates: values by hand, REINFORCE against an enumerated expectation, the price against its rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from eecompile.errors import EecompileError
from eecompile.result import Choices, Result, Trace
from eecompile.training.objectives import ChoiceCost, Price, Reinforce, Steering, Sum, WeightedCrossEntropy, objective


def result(logits, gates, scores, cost, free=None) -> Result:
    empty = torch.empty(0)
    trace = Trace(outputs=(logits,), gate_scores=scores, gates_free=free, end_cost=cost)
    return Result(empty, empty, empty, cost, Choices(gates), trace=trace)


def test_the_price_follows_the_cost_as_written():
    price = Price(Steering(target=0.5, price=1.0, rate=0.1, gain=2.0, ceiling=1.5, memory=0.5))
    price.follow(0.9)  # mean 0.9, error 0.4, integral 1.04, price 1.84 capped
    assert (price.cost, price.now) == (pytest.approx(0.9), 1.5)
    assert price.integral == pytest.approx(1.04)
    price.follow(0.1)  # mean 0.5, error 0
    assert price.now == pytest.approx(1.04)
    price.follow(0.1)  # mean 0.3, error -0.2
    assert price.now == pytest.approx(1.02 - 0.4)
    again = Price(price.steering)
    again.load_state(price.state())
    assert again.state() == price.state()
    price.follow(float("nan"))
    assert again.state() == price.state()
    fixed = Price(Steering(target=None, price=0.3))
    fixed.follow(1.0)
    assert fixed.now == 0.3


def test_choice_cost_is_price_times_mean_cost_and_only_training_moves_the_price():
    cost = torch.tensor([0.4, 1.0], requires_grad=True)
    gates = torch.ones(2, 1)
    given = ChoiceCost(target=0.5, price=2.0, rate=0.1, gain=1.0)
    loss = given(result(torch.zeros(2, 3), gates, gates, cost), None)
    assert float(loss.detach()) == pytest.approx(2.0 * 0.7)
    loss.backward()
    assert cost.grad.tolist() == [1.0, 1.0]
    moved = given.controller.now
    assert moved == pytest.approx(2.0 + 0.1 * 0.2 + 1.0 * 0.2)
    with torch.no_grad():
        assert float(given(result(torch.zeros(2, 3), gates, gates, cost), None)) == pytest.approx(moved * 0.7)
    assert given.controller.now == moved
    with pytest.raises(EecompileError, match="sampled decisions have no gradient"):
        given(result(torch.zeros(2, 3), gates, gates, cost.detach()), None)


def test_reinforce_value_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0])
    gates = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    scores = torch.tensor([[0.8, 0.3], [0.6, 0.5]], requires_grad=True)
    free = torch.tensor([[True, True], [True, False]])
    cost = torch.tensor([0.7, 0.2])
    given = Reinforce(reward="correctness", entropy=0.1, target=None, price=0.5)
    rewards = [1 - 0.5 * 0.7, 0 - 0.5 * 0.2]  # right, wrong
    advantages = [rewards[0] - rewards[1], rewards[1] - rewards[0]]  # the other row is the first baseline

    def log(p):
        return torch.tensor(p).log()

    def entropy(p):
        return -(p * log(p) + (1 - p) * log(1 - p))

    likelihood = [log(0.8) + log(0.7), log(0.4)]
    wanted = -(advantages[0] * likelihood[0] + advantages[1] * likelihood[1]) / 2
    wanted = wanted - 0.1 * (entropy(0.8) + entropy(0.3) + entropy(0.6)) / 2
    r = result(logits, gates, scores, cost, free)
    torch.testing.assert_close(given(r, labels).detach(), wanted, atol=1e-6, rtol=0)
    assert given.baseline == [pytest.approx(sum(rewards) / 2)]
    given(r, labels).backward()  # now against the moving mean
    assert float(scores.grad[1, 1]) == 0.0
    with pytest.raises(EecompileError, match="sampled decisions"):
        given(result(logits, scores * 1.0, scores, cost), labels)


def test_reinforce_counts_gates_and_a_route_alike():
    """Row 1 left before the branches: its route has no part."""
    gates, scores = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.8], [0.6]])
    weights, route = torch.tensor([[0.3, 0.7], [0.9, 0.1]]), torch.tensor([1, -1])
    made = result(torch.zeros(2, 2), gates, scores, torch.tensor([0.5, 0.9]))
    made.choices.route, made.trace.route_weights, made.trace.route_costs = route, weights, torch.tensor([0.5, 1.0])
    likelihood, _ = Reinforce().likelihood(made, "")
    torch.testing.assert_close(likelihood, torch.tensor([0.8 * 0.7, 0.4]).log())
    even, loaded = (Reinforce(target=None, balance=b)(made, torch.tensor([0, 1])) for b in (0.0, 2.0))
    torch.testing.assert_close(loaded - even, torch.tensor(2.0 * 2 * 0.7))


def test_reinforce_is_unbiased_on_an_enumerated_expectation():
    """Three gates, one row: the gradient of E[reward], exactly, against the mean over draws with some baseline."""
    theta = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    saves, labels, price = torch.tensor([0.2, 0.3, 0.1]), torch.tensor([1]), 0.8
    weight = torch.tensor([[0.5, -1.0, 0.3], [-0.2, 0.7, 1.5]])

    def run(gates):
        return (gates.float() @ weight.T), 1 - ((1 - gates.float()) * saves).sum(1)

    expected = torch.zeros((), dtype=torch.float64)
    for combination in itertools.product([0.0, 1.0], repeat=3):
        gates = torch.tensor([combination])
        logits, cost = run(gates)
        reward = torch.log_softmax(logits, 1)[0, 1] - price * cost[0]
        p = torch.sigmoid(theta)
        expected = expected + torch.where(gates[0] > 0, p, 1 - p).prod() * reward
    (exact,) = torch.autograd.grad(-expected, theta)

    n = 40_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.sigmoid(theta).expand(n, 3).float()
    gates = torch.bernoulli(scores.detach(), generator=generator)
    logits, cost = run(gates)
    given = Reinforce(entropy=0.0, target=None, price=price)
    given.load_state({"baseline": [-1.2]})
    loss = given(result(logits, gates, scores, cost), labels.expand(n))
    (estimate,) = torch.autograd.grad(loss, theta)
    assert float((estimate - exact).abs().max()) < 4 * 0.5 / n**0.5, (estimate, exact)
    assert float(exact.abs().max()) > 0.05


def test_saved_as_dicts_and_passed_on_from_stage_to_stage():
    for given in (ChoiceCost(target=0.7), Reinforce(reward="correctness", entropy=0.2)):
        assert objective(given.to_dict()) == given
    first, then = Sum((WeightedCrossEntropy(), ChoiceCost())), Sum((WeightedCrossEntropy(), Reinforce()))
    first.parts[1].controller.follow(0.9)
    then.take(first.passed_on())
    assert then.parts[1].controller.state() == first.parts[1].controller.state() != ChoiceCost().controller.state()
    back = objective(then.to_dict())
    back.load_state(then.state())
    assert back.state() == then.state()


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "choice_cost", "target": 0.0},
        {"name": "choice_cost", "rate": -1.0},
        {"name": "reinforce", "reward": "speed"},
        {"name": "reinforce", "entropy": -0.1},
        {"name": "reinforce", "memory": 1.0},
    ],
)
def test_mistakes(wrong):
    with pytest.raises(EecompileError):
        objective(wrong)
