"""Widths: each row runs the first so many hidden channels of a part; narrower parts are computed, not masked."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eecompile import StrategyError, load
from eecompile.gates import norms_at
from eecompile.inspect.why import where
from eecompile.strategies import SelfAdaptive
from tests.gates.adaptive import Loader, Residual, rows, tower
from tests.support import again, both, close, equal_bits, gelu_of, nightly, separating, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def adaptive(**options) -> SelfAdaptive:
    return SelfAdaptive(**{"exits": None, "widths": WIDTHS, "open_bias": 0.0, **options})


def scores(fast, args, kwargs):
    before = fast.gate_thresholds.tolist()
    fast.set_gate_thresholds(0.0)
    found = fast.observe(*args, **kwargs).trace.gate_scores
    fast.set_gate_thresholds(before)
    return found


def test_a_narrow_mlp_computes_its_channels_only(zoo):
    args, kwargs = ZOO["bert"].inputs(6, seed=3)
    fast = again(zoo("bert").fast, adaptive(parts="mlp", always_on=("*layer.[123]*",)))
    assert [w.region for w in fast.widths] == ["bert.encoder.layer.0:mlp"]
    assert fast.widths[0].channels == ((9, 18, 28, 37),)
    found = scores(fast, args, kwargs)
    ranked = found[:, 1].sort().values
    fast.set_gate_thresholds([0.0, float(ranked[2] + ranked[3]) / 2, 2.0, 2.0])
    wide = 3
    shapes = gelu_of(watch(lambda: fast(*args, **kwargs)))
    length = shapes[0][1]
    assert sorted(shapes[:2]) == sorted([(6 - wide, length, 9), (wide, length, 18)])
    assert [s[2] for s in shapes[2:]] == [37] * 3
    fast.set_gate_thresholds([0.0, 0.0, 2.0, 2.0])  # one width for all rows: nothing is chosen and nothing copied
    seen = watch(lambda: fast(*args, **kwargs))
    assert gelu_of(seen)[0] == (6, length, 18)
    assert seen.ops["index_select"] == seen.ops["index_copy"] == seen.ops["sigmoid"] == 0


def test_widths_are_the_first_rows_and_columns_of_the_weights():
    x, _, _ = rows(5)
    net = tower(2)
    fast = eecompile(net, adaptive(parts="every-block"), example_inputs=(x,))
    fast.set_gate_thresholds([0.0, 0.0, 2.0, 2.0, 0.0, 2.0, 2.0, 2.0])
    with torch.no_grad():
        h = net.embed(x)
        for block, k in zip(net.blocks, (32, 16), strict=True):
            assert isinstance(block, Residual)
            inner = torch.relu(F.linear(block.norm(h), block.up.weight[:k], block.up.bias[:k]))
            h = h + F.linear(inner, block.down.weight[:, :k], block.down.bias)
        want = net.classifier(net.norm(h))
    result = fast.run(x)
    torch.testing.assert_close(result.output, want)
    assert result.widths.tolist() == [[0.5, 0.25]] * 5
    total = fast.program.total_flops
    assert result.cost[0].item() == pytest.approx(1 - (0.5 + 0.75) * 2 * 2 * 32 * 64 / total)
    assert fast.run(x).steps.tolist() == [2] * 5


class Pair(nn.Module):
    """Two convolutions in a row with norms, and no way past them: [B, 3, 8, 8] to [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.last = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.last(self.b(torch.relu(self.norm(self.a(x))))))
        return self.fc(h.mean((2, 3)))


def pair(**options):
    torch.manual_seed(0)
    net = Pair()
    x = torch.randn(16, 3, 8, 8)
    net(x)  # statistics that are not those of fresh norms
    net.eval()
    return net, x, eecompile(net, adaptive(parts=(), **options), example_inputs=(x[:4],))


def test_layers_that_always_run_have_widths_too(tmp_path):
    net, x, fast = pair(widths=(0.5, 1.0))
    (width,) = fast.widths
    assert (width.skips, width.channels, width.gates) == (False, ((4, 8),), ("gate_0",))
    assert [g.kind for g in fast.gates] == ["width"]
    found = scores(fast, (x,), {})
    fast.set_gate_thresholds(separating(found[:, 0], random.Random(1)))
    fast.train_trunk = True
    fast.train()
    fast.run(x)  # the narrow norms see other numbers than the model's own
    fast.eval()
    norms = norms_at(fast.gate_units.width_0_norms, 0)
    own, narrow = net.last.running_mean, norms[1].running_mean
    assert not torch.allclose(own, narrow, atol=1e-3)
    compact, reference = both(fast, x)
    close(compact.output, reference.output)
    assert set(compact.widths.flatten().tolist()) == {0.5, 1.0}
    with torch.no_grad():
        first = F.batch_norm(F.conv2d(x, net.a.weight[:4], padding=1), norms[0].running_mean, norms[0].running_var,
                             norms[0].weight, norms[0].bias)  # fmt: skip
        h = F.conv2d(torch.relu(first), net.b.weight[:, :4], net.b.bias, 2, 1)
        h = F.batch_norm(h, norms[1].running_mean, norms[1].running_var, norms[1].weight, norms[1].bias)
        want = net.fc(torch.relu(h).mean((2, 3)))
    at = compact.widths[:, 0] == 0.5
    torch.testing.assert_close(compact.output[at], want[at])
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    again_ = back.run(x)
    equal_bits(again_.output, compact.output)
    assert torch.equal(again_.widths, compact.widths)
    assert back.widths == fast.widths
    back.train()
    back.run(x).trace.gate_scores.sum().backward()


def test_the_models_own_norms_move_as_without_widths():
    torch.manual_seed(0)
    plain = Pair()
    net, x, fast = pair()
    plain.load_state_dict(net.state_dict())
    plain.train()(x)
    fast.train_trunk = True
    fast.train()
    fast.run(x)
    for name, value in net.named_buffers():
        torch.testing.assert_close(value, plain.get_buffer(name), msg=name)


@pytest.mark.parametrize("mode", [nightly("hard"), "gumbel", "soft"])
def test_gradients_reach_the_channels_that_ran(mode):
    x, y, _ = rows(16, seed=1)
    net = tower(2)
    fast = eecompile(net, adaptive(widths=(0.25, 0.5, 1.0), parts="every-block"), example_inputs=(x[:4],))
    fast.train_trunk, fast.gate_mode = True, mode
    fast.set_gate_thresholds([0.5, 0.5, 2.0] * 2)  # never the full width
    fast.train()
    torch.manual_seed(0)
    result = fast.run(x)
    F.cross_entropy(result.outputs[-1], y).backward()
    up = net.blocks[0].up.weight.grad
    assert bool((up[:16].abs().sum(1) > 0).any())
    assert float(up[32:].abs().sum()) == 0
    assert float(fast.gate_units.policy.score.weight.grad[:2].abs().sum()) > 0
    assert not bool(result.trace.gates_free[:, [2, 5]].any())
    if mode == "hard":
        closed = result.gates[:, 0] == 0
        assert not bool(result.trace.gates_free[closed, 1].any())


@pytest.mark.parametrize("estimator", ["gumbel", nightly("reinforce")])
def test_the_policy_meets_its_target_by_width(estimator):
    x, y, _ = rows(512, seed=1)
    recipe = adaptive(parts=(), curriculum=1, target_cost=0.6, estimator=estimator, open_bias=2.0)
    fast = eecompile(tower(4), recipe, example_inputs=(x[:4],))
    assert {w.skips for w in fast.widths} == {False}
    fast.fit(Loader(), epochs=8, lr=1e-2, trunk_lr=1e-2, progress=False)
    result = fast.run(x)
    assert float((result.output.argmax(1) == y).float().mean()) > 0.93
    assert 0.3 < float(result.cost.mean()) < 0.75  # as drawn in training it is 0.6
    assert float(result.widths.mean()) < 0.9


def test_at_least_so_many_parts_run_at_some_width():
    x, _, _ = rows(8)
    fast = eecompile(tower(3), adaptive(parts="every-block", min_open=2), example_inputs=(x,))
    fast.set_gate_thresholds([1.0] * len(fast.gates))  # scores are lower: only what is forced opens
    compact, reference = both(fast, x)
    assert torch.equal(compact.gates, reference.gates)
    assert compact.widths.tolist() == [[0.0, 0.25, 0.25]] * 8
    free = fast.observe(x).trace.gates_free
    assert free[0].tolist() == [True, False, False, False, False, True, False, False, False, True, False, False]


def test_widths_are_shown():
    x, _, _ = rows(4)
    fast = eecompile(tower(2), adaptive(parts="every-block", always_on=("blocks.0",)), example_inputs=(x,))
    assert [g.region for g in fast.gates] == [f"blocks.1 at {w}%" for w in (25, 50, 75, 100)]
    shown = fast.explain().to_dict()
    assert shown["widths"][0]["channels"] == [[16, 32, 48, 64]]
    assert "blocks.1: skip/25/50/75/100% of 64 channels" in str(fast)
    fast.set_gate_thresholds([0.0, 0.0, 2.0, 2.0])
    seen = where(fast, x)
    assert seen.rows[0].widths == {"blocks.1": 0.5}
    assert "widths blocks.1 50.0%" in seen.rows[0].why


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"widths": (0.5, 1.5)}, "above 0 and at most 1"),
        ({"widths": (0.0, 1.0)}, "above 0 and at most 1"),
        ({"widths": (float("nan"), 1.0)}, "above 0 and at most 1"),
        ({"widths": (0.5, 0.5, 1.0)}, "no two are equal"),
        ({"widths": (0.75, 0.5, 1.0)}, "ascend"),
        ({"widths": (0.25, 0.5)}, "end with 1"),
        ({"widths": (1.0,)}, "end with 1"),
        ({"widths": 0.5}, "sequence of shares"),
        ({"parts": ()}, "nothing to choose"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(StrategyError, match=says):
        SelfAdaptive(**options)


def test_a_model_without_such_layers_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    with pytest.raises(StrategyError, match="no part of the model has a width") as caught:
        eecompile(net, adaptive(parts=()), example_inputs=(torch.randn(3, 4),))
    assert "another one" in str(caught.value)


def test_parts_that_cannot_be_narrowed_say_why(zoo):
    base = zoo("bert").fast
    refused = [r for r in again(base, adaptive()).program.refusals if r.rule == "place_widths"]
    attention = next(r.reason for r in refused if r.node.endswith("attention"))
    assert "a view that divides them" in attention
    with pytest.raises(StrategyError, match="two of the widths equal"):
        again(base, adaptive(widths=(0.26, 0.27, 1.0), parts="mlp"))
