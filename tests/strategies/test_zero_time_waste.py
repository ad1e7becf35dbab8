"""Zero Time Waste: exits answer by a geometric ensemble whose weights and class biases are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eecompile import EecompileError, StrategyError, strategies
from eecompile.passes.insert_exits import EnsembleWeights
from eecompile.training.objectives import Ensemble, cross_entropy
from tests.calibration.test_budget import Chain
from tests.support import compiled as eecompile

CLASSES = 4


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 16, generator=g)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=g)
    return centres[y] + 1.5 * torch.randn(count, 16, generator=g), y


def made(strategy: strategies.Strategy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Chain().eval()
    return eecompile(model, strategy, example_inputs=(rows(8, 1)[0],))


@pytest.fixture(scope="module")
def trained():
    fast = made(strategies.Anytime(exits="every-block", head="linear", combine="weighted"))
    x, y = rows(2000, 2)
    fast.fit(list(zip(x.split(50), y.split(50), strict=True)), epochs=6, lr=1e-2, progress=False)
    return fast


def losses(fast, x, y) -> list[float]:
    outputs = fast.observe(x).outputs
    return [float(cross_entropy(o, y)) for o in outputs[:-1]]


def test_its_loss_moves_the_weights_alone():
    fast = made(strategies.Anytime(exits="every-block", head="linear", combine="weighted"))
    fast.train_trunk = True
    fast.train()
    x, y = rows(32, 3)
    Ensemble()(fast.run(x), y).backward()
    moved = {n for n, p in fast.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"graph_module.eecompile_combination.weights", "graph_module.eecompile_combination.bias"}


def test_trained_weights_answer_better_than_equal_ones(trained):
    own = trained.combination
    fresh = EnsembleWeights(*own.bias.shape)
    assert not torch.equal(own.weights, fresh.weights)
    assert bool(own.bias.any())
    held = {n: p.detach().clone() for n, p in own.named_parameters()}
    x, y = rows(2000, 4)
    after = losses(trained, x, y)
    try:
        own.load_state_dict(fresh.state_dict())
        before = losses(trained, x, y)
    finally:
        own.load_state_dict(held)
    assert all(a < b for a, b in zip(after[1:], before[1:], strict=True)), (after, before)


def test_it_adds_to_every_objective():
    def names(strategy: strategies.Strategy) -> list[str]:
        return [part["name"] for part in strategy.objective["parts"]]

    assert names(strategies.Ann(combine="weighted")) == ["adaloss", "ensemble"]
    assert names(strategies.Anytime(combine="weighted", criterion="learned")) == ["distillation", "exit_score", "ensemble"]
    assert names(strategies.Anytime(combine="weighted") + strategies.SkipNet()) == ["distillation", "ensemble"]
    fast = made(strategies.Branchy(exits=2))
    fast.train()
    x, y = rows(4, 1)
    with pytest.raises(EecompileError, match="no ensemble to train"):
        Ensemble()(fast.run(x), y)


def test_a_model_with_trained_weights_is_not_taken_into_a_cascade(trained):
    small = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(StrategyError, match="trained weights of an ensemble"):
        eecompile([small.eval(), trained], "cascade", example_inputs=(rows(8, 1)[0],))
