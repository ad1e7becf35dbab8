"""Gates on real models: compact agrees with the reference, a skipped region is not computed, nothing is lost by saving."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eecompile import StrategyError, strategies
from eecompile.gates import ConvGate
from eecompile.heads import Site
from tests.support import CLOSED, again, equal_bits, gelu_of, nightly, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO


def scores(fast, args, kwargs) -> Tensor:
    """[B, G] scores with every gate open, so that thresholds between them split the batch."""
    before = fast.gate_thresholds.tolist()
    fast.set_gate_thresholds(0.0)
    found = fast.observe(*args, **kwargs).trace.gate_scores
    fast.set_gate_thresholds(before)
    return found


def test_a_shut_gate_runs_nothing_and_an_open_one_copies_nothing(zoo):
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    fast = again(zoo("bert").fast, strategies.SkipNet())
    blocks = len(fast.gates)
    fast.set_gate_thresholds(0.0)
    whole = watch(lambda: fast(*args, **kwargs)).ops
    fast.set_gate_thresholds(CLOSED)
    none = watch(lambda: fast(*args, **kwargs)).ops
    assert whole["addmm"] - none["addmm"] == 6 * blocks  # q, k, v, output and two of the MLP
    fast.set_gate_thresholds(1e-9)  # decided row by row, and all are open
    decided = watch(lambda: fast(*args, **kwargs)).ops
    assert decided["index_select"] == 0
    assert decided["index_copy"] == 0
    assert decided["addmm"] - whole["addmm"] == blocks  # one score each


def test_rows_that_skip_are_not_computed(zoo):
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6, seed=3)
    fast = again(zoo("bert").fast, strategies.SkipNet(unit="linear"))
    found = scores(fast, args, kwargs)
    cut = found[:, 0].sort().values
    fast.set_gate_thresholds([float(cut[3] + cut[2]) / 2, *[0.0] * (len(fast.gates) - 1)])
    seen = watch(lambda: fast(*args, **kwargs))
    rows = [shape[0] for shape in gelu_of(seen)]
    assert rows[0] == 3
    assert rows[1:] == [6] * (len(fast.gates) - 1)
    result = fast.run(*args, **kwargs)
    assert result.gates[:, 0].sum() == 3
    assert float(result.cost.min()) < float(result.cost.max()) <= 1.01


@pytest.fixture(scope="module")
def resnet():
    args, kwargs = ZOO["hf_resnet"].inputs(4)
    gates = strategies.SkipNet(open_bias=0.0)
    return eecompile(ZOO["hf_resnet"].model(), gates, example_inputs=args, example_kwargs=kwargs)


@pytest.mark.parametrize(
    ("trunk", "mode"),
    [(False, "hard"), (True, "soft"), (False, "sample"), (True, "gumbel")]
    + [nightly(trunk, mode) for trunk, mode in ((True, "hard"), (False, "soft"), (True, "sample"), (False, "gumbel"))],
)
def test_gates_are_trained_in_every_mode(resnet, trunk, mode):
    fast = resnet.eval()
    args, kwargs = ZOO["hf_resnet"].inputs(4)
    fast.zero_grad()
    fast.train_trunk, fast.gate_mode = trunk, mode
    fast.train()
    torch.manual_seed(0)
    result = fast.run(*args, **kwargs)
    assert result.gates.shape == result.trace.gate_scores.shape == (4, len(fast.gates))
    (result.outputs[-1].square().mean() + result.cost.mean() + result.trace.gate_scores.log().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fast.gate_units.parameters())
    assert all((p.grad is not None) == trunk for p in fast.trunk_parameters() if p.ndim > 1)
    if mode == "soft":
        torch.testing.assert_close(result.gates, result.trace.gate_scores.float())
    else:
        assert set(result.gates.detach().unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gates": "layer.9"}, "no region has this name"),
        ({"unit": "conv"}, "does not fit the value"),
        ({"unit": "lstm"}, "unknown gate unit"),
        ({"always_on": ("nothing*",)}, "always_on= names no gated region"),
        ({"threshold": (0.5, 0.5)}, "wrong number of gate thresholds"),
    ],
)
def test_mistakes_are_named(zoo, options, says):
    with pytest.raises(StrategyError, match=says):
        again(zoo("bert").fast, strategies.SkipNet(**options))


def test_a_model_without_residual_blocks_is_refused_with_the_reason(zoo):
    with pytest.raises(StrategyError, match="no region for a gate") as caught:
        again(zoo("lstmcell").fast, strategies.SkipNet())
    assert "serves more than one value" in str(caught.value)


def test_thresholds_by_name_and_what_is_wrong_with_them(zoo):
    fast = again(zoo("bert").fast, strategies.SkipNet())
    fast.set_thresholds({"gate_1": 0.25})
    assert [g.threshold for g in fast.gates] == [0.5, 0.25, 0.5, 0.5]
    for wrong in ({"gate_9": 0.5}, [0.5], -1.0, float("nan")):
        with pytest.raises(StrategyError):
            fast.set_gate_thresholds(wrong)


@pytest.mark.parametrize("sizes", [(3, 6, 8, 8), (2, 4, 7, 9), (1, 2, 6, 5)])
def test_a_conv_gate_pools_alike_with_and_without_gradients(sizes):
    torch.manual_seed(0)
    unit = ConvGate(Site(("batch", *sizes[1:]), 0, 1, False, "float32", False)).eval()
    x = torch.randn(sizes)
    x[0, 0, 1, 1] = torch.nan
    want = torch.nn.functional.max_pool2d(x, 2, ceil_mode=True)
    with torch.no_grad():
        equal_bits(unit.shrink(x), want)
    equal_bits(unit.shrink(x), want)
