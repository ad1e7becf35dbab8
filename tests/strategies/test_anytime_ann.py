"""`anytime` and `ann`: where heads go, how they are trained, and what a resumed run remembers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eecompile import load, strategies
from eecompile.errors import EecompileError, StrategyError
from eecompile.kernels.scale_gradient import scale_gradient
from eecompile.result import Result, Trace
from eecompile.strategies import strategy
from eecompile.training.objectives import AdaLoss, cross_entropy, objective
from tests.support import again
from tests.support import compiled as eecompile
from tests.training.fake import Fake, batched, blobs

EMPTY = torch.empty(0)


# ------------------------------------------------------------------------------------------------ placing


@pytest.mark.parametrize("name", ["resnet110", "vgg", "bert"])
def test_heads_are_where_they_pay(zoo, name):
    fast = again(zoo(name).fast, strategies.Anytime())
    depths = [0.0, *(e.depth for e in fast.exits), 1.0]
    assert len(fast.exits) >= 2
    for e, gap, rest in zip(fast.exits, [b - a for a, b in zip(depths, depths[1:], strict=False)], depths[1:], strict=False):
        assert gap >= max(0.03, 4 * e.head_cost) - 1e-9
        assert 1 - rest >= max(0.03, 4 * e.head_cost) - 1e-9
    assert fast.thresholds.tolist() == [1.0] * len(fast.exits)
    refused = [r for r in fast.program.refusals if r.rule == "place_exits"]
    assert all("%" in r.reason for r in refused)


@pytest.mark.nightly  # 54 blocks
def test_a_place_is_refused_with_its_figures(zoo):
    fast = again(zoo("resnet110").fast, strategies.Anytime())
    reasons = [r.reason for r in fast.program.refusals]
    assert any("of work since the exit before, there is" in r for r in reasons)


def test_names_and_options():
    assert strategy("anytime") == strategies.Anytime()
    ann = strategies.Ann(gradient_equilibrium=True, distillation=0.25)
    assert strategy(ann.to_dict()) == ann
    assert ann.recipe().equilibrium
    assert not strategies.Anytime().recipe().equilibrium
    assert ann.objective == {"name": "adaloss", "weights": "uniform", "alpha": 0.25, "memory": 0.95}
    assert strategies.Ann(balance="fixed").objective["name"] == "weighted_cross_entropy"
    assert [p["name"] for p in strategies.Ann(criterion="learned").objective["parts"]] == ["adaloss", "exit_score"]
    with pytest.raises(StrategyError, match="unknown balance of the losses"):
        strategies.Ann(balance="adalos")
    with pytest.raises(StrategyError, match="memory= of the running means"):
        strategies.Ann(memory=1.0)
    with pytest.raises(StrategyError, match="unknown combination of exits"):
        strategies.Anytime(combine="vote")


# ------------------------------------------------------------------------------------------------ AdaLoss


def made(seed=0, exits=2, scale=(1.0, 1.0, 1.0)) -> Result:
    g = torch.Generator().manual_seed(seed)
    outputs = tuple((s * torch.randn(6, 4, generator=g)).requires_grad_() for s in scale[: exits + 1])
    return Result(EMPTY, EMPTY, EMPTY, EMPTY, trace=Trace(outputs=outputs))


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_weights_are_inverse_to_the_running_means():
    ada = AdaLoss(memory=0.5, weights=[1, 1, 2])
    means = None
    for seed in range(3):
        r = made(seed)
        each = [cross_entropy(o, LABELS).item() for o in r.outputs]
        means = each if means is None else [0.5 * m + 0.5 * e for m, e in zip(means, each, strict=True)]
        raw = [b / m for b, m in zip([1, 1, 2], means, strict=True)]
        want = sum(w / sum(raw) * e for w, e in zip(raw, each, strict=True))
        loss = ada(r, LABELS)
        assert loss.item() == pytest.approx(want, rel=1e-5)
    assert ada.running == pytest.approx(means, rel=1e-5)
    assert sum(ada.weights_now(3)) == pytest.approx(1.0)


def test_the_gradient_is_that_of_the_geometric_mean():
    """With no memory the weights are b / l: the gradient of sum b log l, up to the normalisation."""
    r = made(1)
    AdaLoss(memory=0.0)(r, LABELS).backward()
    got = [o.grad.clone() for o in r.outputs]
    r = made(1)
    losses = [cross_entropy(o, LABELS) for o in r.outputs]
    torch.stack([loss.log() for loss in losses]).sum().backward()
    norm = sum(1 / loss.item() for loss in losses)
    for a, o in zip(got, r.outputs, strict=True):
        torch.testing.assert_close(a * norm, o.grad)


def test_means_move_only_where_gradients_are_recorded():
    ada = AdaLoss()
    with torch.no_grad():
        assert ada(made(0), LABELS).item() == pytest.approx(
            sum(cross_entropy(o, LABELS) for o in made(0).outputs).item() / 3
        )
    assert ada.running == []
    ada(made(0), LABELS)
    before = list(ada.running)
    with torch.no_grad():
        ada(made(1), LABELS)
    assert ada.running == before


def test_a_loss_of_nothing_does_not_take_everything():
    ada = AdaLoss()
    ada.load_state({"running": [0.0, 1.0]})
    assert ada.weights_now(2)[1] == pytest.approx(1 / 1001)
    assert all(math.isfinite(w) for w in ada.weights_now(2))


def test_its_options_are_saved_and_its_means_are_not():
    ada = AdaLoss(alpha=0.5, memory=0.9)
    ada(made(0), LABELS)
    same = objective(ada.to_dict())
    assert same == ada
    assert same.running == []
    with pytest.raises(EecompileError, match="unknown option of the objective 'adaloss'"):
        objective({"name": "adaloss", "running": [1.0]})
    with pytest.raises(EecompileError, match="memory of the running means"):
        AdaLoss(memory=1.5)


def test_each_fit_starts_anew():
    from eecompile.training.fit import fit

    ada = AdaLoss(memory=0.9)
    results = []
    for _ in range(2):
        fast = Fake()
        fit(fast, batched(*blobs()), objective=ada, progress=False)
        results.append(fast.heads[0][1].weight.detach().clone())
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------ equilibrium


class Chain(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))
        self.end = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)


def compiled(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Chain().eval()
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    head = strategies.Ann(exits="every-block", head="linear", balance="fixed", **options)
    return eecompile(model, head, example_inputs=(x,)), model, x


def test_scale_gradient_is_the_identity():
    x = torch.randn(3, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad.tolist() == [0.25] * 3


def test_gradients_are_scaled_at_the_exits(tmp_path):
    """The gradient of each loss reaches the first block times 1/(N-i) and the product of (N-j-1)/(N-j) before it."""
    plain, model, x = compiled()
    scaled, other, _ = compiled(gradient_equilibrium=True)
    scaled.save(tmp_path / "ann")
    loaded = load(tmp_path / "ann")
    n = len(plain.exits) + 1
    assert n == 4
    for k in range(n):
        grads = []
        for fast, first in ((plain, model.blocks[0][0]), (scaled, other.blocks[0][0]), (loaded, None)):
            fast.train()
            if first is None:
                first = next(m for p, m in loaded.graph_module.named_modules() if p.endswith("blocks.0.0"))
            r = fast.run(x)
            fast.zero_grad()
            cross_entropy(r.outputs[k], torch.arange(8) % 3).backward()
            grads.append(first.weight.grad.clone())
            fast.eval()
        factor = 1.0
        for j in range(k):
            factor *= (n - j - 1) / (n - j)
        factor *= 1 / (n - k) if k < n - 1 else 1.0
        assert factor == pytest.approx(1 / n), "every classifier has the same share in the first layer"
        for found in grads[1:]:
            torch.testing.assert_close(found, grads[0] * factor)


def test_heads_keep_their_own_gradient():
    plain, _, x = compiled()
    scaled, _, _ = compiled(gradient_equilibrium=True)
    grads = []
    for fast in (plain, scaled):
        fast.train()
        fast.loss(fast.run(x), torch.arange(8) % 3).backward()
        grads.append([p.grad.clone() for p in fast.head_parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ training for real


def test_combined_exits_train_each_head_for_itself():
    fast, _, x = compiled(combine="ensemble")
    fast.train()
    r = fast.run(x)
    y = torch.arange(8) % 3
    assert len(r.trace.separate) == len(r.outputs) == 4
    each = torch.stack([cross_entropy(o, y) for o in r.trace.separate]).mean()
    torch.testing.assert_close(fast.loss(r, y), each)
    assert not torch.equal(r.outputs[2], r.trace.separate[2])


def test_the_loss_of_one_module_keeps_its_means():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Chain().eval()
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    fast = eecompile(model, strategies.Ann(exits="every-block", head="linear", memory=0.5), example_inputs=(x,))
    fast.train()
    y = torch.arange(8) % 3
    fast.loss(fast.run(x), y)
    kept = fast.objectives["hard"]
    first = list(kept.running)
    fast.loss(fast.run(x * 2), y)
    assert kept.running != first
    report = fast.fit([(x, y)] * 4, epochs=3, lr=1e-2, progress=False)
    assert report.objective["name"] == "adaloss"
    assert report.rows[-1].loss < report.rows[0].loss
