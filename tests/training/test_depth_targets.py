"""The objective of depth-adaptive networks against values written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eecompile.errors import EecompileError
from eecompile.result import Result
from eecompile.training.objectives import DepthTargets, objective
from eecompile.training.objectives.depth import log_probabilities

LABELS = torch.tensor([0, 1, 0])


def logits_for(losses: list[list[float]]) -> tuple[Tensor, ...]:
    """Predictions [3, 2] at every depth whose cross entropy is as given, row by row."""
    found = []
    for depth in zip(*losses, strict=True):
        wrong = torch.tensor([math.log(math.expm1(v)) for v in depth])
        rows = torch.zeros(3, 2)
        rows[torch.arange(3), 1 - LABELS] = wrong
        found.append(rows)
    return tuple(found)


# Row 0 is right from depth 1 on, row 1 at once, row 2 never.
LOSSES = [[0.9, 0.3, 0.29], [0.4, 0.2, 0.1], [2.0, 1.9, 0.8]]
SCORES = torch.tensor([[0.9, 0.6], [0.5, 0.1], [0.7, 0.7]])


def result(scores: Tensor = SCORES, gates: Tensor | None = None) -> Result:
    outputs = tuple(o.requires_grad_() for o in logits_for(LOSSES))
    made = Result(outputs[-1], torch.full((3,), 2), torch.ones(3), torch.ones(3))
    made.choices.gates = torch.ones(3, 2) if gates is None else gates
    made.trace.outputs, made.trace.gate_scores = outputs, scores
    return made


def test_probabilities_of_depths():
    up_front = log_probabilities(SCORES, "multinomial").exp()
    torch.testing.assert_close(up_front[0], torch.tensor([0.1, 0.3, 0.6]))
    torch.testing.assert_close(up_front[2], torch.tensor([0.3, 1e-6, 0.7]))  # a depth of probability 0 keeps a finite loss
    one_by_one = log_probabilities(SCORES, "geometric").exp()
    torch.testing.assert_close(one_by_one[0], torch.tensor([0.1, 0.9 * 0.4, 0.9 * 0.6]))
    torch.testing.assert_close(one_by_one.sum(1), torch.ones(3))


@pytest.mark.parametrize(("price", "depths"), [(0.0, [2, 2, 2]), (0.1, [1, 2, 2]), (0.5, [1, 0, 2]), (4.0, [0, 0, 0])])
def test_oracle_targets_weigh_loss_against_price(price, depths):
    loss = DepthTargets(price=price)(result(), LABELS)
    task = torch.tensor(LOSSES).mean()
    p = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.3, 1e-6, 0.7]])
    choice = -p[torch.arange(3), torch.tensor(depths)].log().mean()
    torch.testing.assert_close(loss, task + choice)


def test_correctness_takes_the_first_right_depth_and_0_where_none_is():
    loss = DepthTargets(targets="correctness", distribution="geometric", depth_weight=2.0)(result(), LABELS)
    # Row 0 is right from 1 on, row 1 at 0; row 2 never, its depth is 0. Losses below ln 2 are right.
    p = torch.tensor([0.9 * 0.4, 0.5, 0.3])
    torch.testing.assert_close(loss, torch.tensor(LOSSES).mean() - 2 * p.log().mean())


def test_expected_loss_has_the_gradient_of_the_enumerated_expectation():
    scores = SCORES.clone().requires_grad_()
    DepthTargets(targets="expected", price=0.4, depth_weight=1.0)(result(scores), LABELS).backward()
    other = SCORES.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        s0, s1 = other[row]
        for p, loss, share in zip((1 - s0, s0 - s1, s1), LOSSES[row], (0, 0.5, 1), strict=True):
            total = total + p.clamp_min(1e-6) * (loss + 0.4 * share) / 3
    total.backward()
    torch.testing.assert_close(scores.grad[:2].double(), other.grad[:2], atol=1e-5, rtol=1e-4)


def test_regret_weighs_every_depth_by_what_it_saves():
    loss = DepthTargets(targets="regret", price=0.4)(result(), LABELS)
    spent = torch.tensor(LOSSES) + 0.4 * torch.tensor([0.0, 0.5, 1.0])
    p = log_probabilities(SCORES, "multinomial")
    wanted = ((spent.max(1, keepdim=True).values - spent) * -p).sum(1).mean()
    torch.testing.assert_close(loss, torch.tensor(LOSSES).mean() + wanted)


def test_the_task_learns_at_every_depth_and_the_targets_do_not_teach_it():
    made = result()
    DepthTargets(targets="expected", depth_weight=7.0, weights=[1, 1, 2])(made, LABELS).backward()
    alone = [o.detach().clone().requires_grad_() for o in made.outputs]
    sum(w * F.cross_entropy(o, LABELS) for o, w in zip(alone, (0.25, 0.25, 0.5), strict=True)).backward()
    for got, want in zip(made.outputs, alone, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_the_price_is_steered_towards_a_mean_depth():
    aim = DepthTargets(target=0.5, price=0.0, rate=0.02, gain=0.0)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        first = torch.rand(64, generator=generator) * 2  # loss at depth 0; the end's is 0.1
        losses = torch.stack((first, first / 2 + 0.05, torch.full((64,), 0.1)), 1)
        now = aim.controller.now
        share = torch.tensor([0, 0.5, 1.0])
        shares.append(float(share[(losses + now * share).argmin(1)].mean()))
        aim.choice(tuple(torch.zeros(64, 2) for _ in range(3)), losses, torch.full((64, 2), 0.5).requires_grad_(), LABELS)
    assert shares[0] > 0.9
    assert abs(sum(shares[-100:]) / 100 - 0.5) < 0.05
    again = objective(aim.to_dict())
    again.load_state(aim.state())
    assert again.controller.now == aim.controller.now > 0.3


def test_after_gates_have_decided_it_is_the_loss_of_what_was_given_plus_the_price():
    given = result(gates=torch.tensor([[True, False], [False, False], [True, True]]))
    loss = DepthTargets(price=0.6)(given, LABELS)
    torch.testing.assert_close(loss, torch.tensor([0.29, 0.1, 0.8]).mean() + 0.6 * 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": "best"}, "unknown kind of depth targets"),
        ({"distribution": "uniform"}, "unknown distribution over depths"),
        ({"targets": "correctness", "target": 0.5}, "no price that could be steered"),
        ({"target": 1.5}, "out of range"),
        ({"depth_weight": -1.0}, "is a weight"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(EecompileError, match=says):
        DepthTargets(**options)


def test_results_that_do_not_show_every_depth_are_refused():
    with pytest.raises(EecompileError, match="hides what the deeper blocks"):
        DepthTargets()(result(gates=torch.tensor([[1.0, 0.0]] * 3)), LABELS)
    with pytest.raises(EecompileError, match="a prediction for every depth"):
        DepthTargets()(result(SCORES[:, :1]), LABELS)
