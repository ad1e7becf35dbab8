"""Gates on real models: compact agrees with the reference, a skipped region is not computed, nothing is lost by saving."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from eecompile import StrategyError, load, strategies
from eecompile.gates import ConvGate
from eecompile.heads import Site
from eecompile.strategies import GateRecipe, Recipe
from tests.support import CLOSED, again, both, close, equal_bits, gelu_of, random_thresholds, separating, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO


class Given(strategies.Strategy):
    """A strategy for tests: any recipe."""

    name = "given"

    def __init__(self, recipe: Recipe) -> None:
        object.__setattr__(self, "given", recipe)

    def recipe(self) -> Recipe:
        return self.given  # type: ignore[attr-defined]

    @property
    def objective(self) -> dict[str, object]:
        return {"name": "exits"}


def gated(where: object = "every-block", unit: str = "auto", **more: object) -> GateRecipe:
    return GateRecipe(where, unit, open_bias=0.0, max_unit_share=1e9, **more)  # type: ignore[arg-type]


RECIPES = {
    "blocks": Recipe(gates=gated()),
    "recurrent halves and exits": Recipe(
        strategies.Branchy(exits=2).recipe().exits, gated("halves", "recurrent", min_open=2)
    ),
    "policy and exits": Recipe(strategies.Branchy(exits=2).recipe().exits, gated("halves", "policy")),
    "depth up front": Recipe(gates=gated(unit="depth", monotone=True)),
}
MODELS = ["gpt2_lm", "hf_resnet", "nn_encoder_sf"]


def random_gates(scores: Tensor, rng: random.Random) -> list[float]:
    """One threshold per gate in a gap between its scores `[B, G]`; some gates stay open or shut."""
    return [rng.choice([0.0, CLOSED, *[separating(s, rng)] * 4]) for s in scores.T]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    entry = ZOO[request.param]
    args, kwargs = entry.inputs(4)
    options = dict(entry.options)
    return entry, eecompile(entry.model(), example_inputs=args, example_kwargs=kwargs, **options)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_compact_agrees_with_the_reference(model, recipe):
    entry, base = model
    fast = again(base, Given(RECIPES[recipe]))
    rng = random.Random(1)
    seen: set[float] = set()
    for batch in (1, 3, 6):
        args, kwargs = entry.inputs(batch, seed=2)
        for _ in range(3):
            fast.set_thresholds(CLOSED)
            fast.set_gate_thresholds(random_gates(scores(fast, args, kwargs), rng))
            if fast.exits:
                fast.set_thresholds(random_thresholds(fast.observe(*args, **kwargs).confidences[:-1], rng))
            compact, reference = both(fast, *args, **kwargs)
            assert torch.equal(compact.exit_index, reference.exit_index)
            assert compact.gates.dtype == torch.bool
            assert torch.equal(compact.gates, reference.gates)
            torch.testing.assert_close(compact.cost, reference.cost, atol=1e-6, rtol=0)
            close(compact.output, reference.output)
            with torch.no_grad():
                close(fast(*args, **kwargs), reference.output)
            seen |= set(compact.gates.float().mean(0).tolist())
    assert any(0 < share < 1 for share in seen), "no gate ever split a batch"


def scores(fast, args, kwargs) -> Tensor:
    """[B, G] scores with every gate open, so that thresholds between them split the batch."""
    before = fast.gate_thresholds.tolist()
    fast.set_gate_thresholds(0.0)
    found = fast.observe(*args, **kwargs).gate_scores
    fast.set_gate_thresholds(before)
    return found


def test_a_shut_gate_runs_nothing_and_an_open_one_copies_nothing():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    fast = eecompile(entry.model(), strategies.SkipNet(), example_inputs=args, example_kwargs=kwargs)
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


def test_rows_that_skip_are_not_computed():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6, seed=3)
    fast = eecompile(entry.model(), strategies.SkipNet(unit="linear"), example_inputs=args, example_kwargs=kwargs)
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


def test_a_saved_program_has_its_gates(tmp_path):
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    recipe = strategies.SkipNet(gates="halves", unit="recurrent", open_bias=0.0)
    fast = eecompile(entry.model(), recipe, example_inputs=args, example_kwargs=kwargs)
    fast.set_gate_thresholds(random_gates(scores(fast, args, kwargs), random.Random(3)))
    want = fast.run(*args, **kwargs)
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    got = back.run(*args, **kwargs)
    equal_bits(got.output, want.output)
    assert torch.equal(got.gates, want.gates)
    assert [g.region for g in back.gates] == [g.region for g in fast.gates]
    back.train()  # gates train after loading too
    back.run(*args, **kwargs).gate_scores.sum().backward()
    assert any(p.grad is not None for p in back.gate_units.parameters())


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("mode", ["hard", "soft", "sample", "gumbel"])
def test_gates_are_trained_in_every_mode(trunk, mode):
    entry = ZOO["hf_resnet"]
    args, kwargs = entry.inputs(4)
    fast = eecompile(entry.model(), strategies.SkipNet(open_bias=0.0), example_inputs=args, example_kwargs=kwargs)
    fast.train_trunk, fast.gate_mode = trunk, mode
    fast.train()
    torch.manual_seed(0)
    result = fast.run(*args, **kwargs)
    assert result.gates.shape == result.gate_scores.shape == (4, len(fast.gates))
    (result.outputs[-1].square().mean() + result.cost.mean() + result.gate_scores.log().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fast.gate_units.parameters())
    assert all((p.grad is not None) == trunk for p in fast.trunk_parameters() if p.ndim > 1)
    if mode == "soft":
        torch.testing.assert_close(result.gates, result.gate_scores.float())
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
def test_mistakes_are_named(options, says):
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    with pytest.raises(StrategyError, match=says):
        eecompile(entry.model(), strategies.SkipNet(**options), example_inputs=args, example_kwargs=kwargs)


def test_a_model_without_residual_blocks_is_refused_with_the_reason():
    entry = ZOO["lstmcell"]
    args, kwargs = entry.inputs(4)
    with pytest.raises(StrategyError, match="no region for a gate") as caught:
        eecompile(entry.model(), strategies.SkipNet(), example_inputs=args, example_kwargs=kwargs)
    assert "serves more than one value" in str(caught.value)


def test_thresholds_by_name_and_what_is_wrong_with_them():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    fast = eecompile(entry.model(), strategies.SkipNet(), example_inputs=args, example_kwargs=kwargs)
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
