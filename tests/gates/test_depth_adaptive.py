"""Depth-adaptive networks on real models: every row runs its own depth, and the depth is learnt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile import StrategyError, load
from eecompile.result import Result
from eecompile.strategies import DepthAdaptive
from tests.gates.adaptive import Loader, rows, tower
from tests.support import CLOSED, again, both, close, equal_bits, nightly, run_by, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO

RECIPES = {
    "up front": DepthAdaptive(min_depth=0),
    "after one block": DepthAdaptive(targets="correctness"),
    "halting": DepthAdaptive("halting", min_depth=0, unit="linear", open_bias=0.0),
    "gates": DepthAdaptive("gates", unit="linear", open_bias=0.0),
}


def scores(fast, args, kwargs) -> Tensor:
    """[B, G], every gate open."""
    before = fast.gate_thresholds.tolist()
    fast.set_gate_thresholds(0.0)
    found = fast.observe(*args, **kwargs).trace.gate_scores
    fast.set_gate_thresholds(before)
    return found


def activations(fast, args, kwargs) -> list[int]:
    """Rows of every activation that runs: one a block. It may overwrite its operand."""
    shapes = watch(lambda: fast(*args, **kwargs)).shapes
    return [shape[0] for name in ("gelu", "gelu_") for shape in shapes.get(name, ())]


def at_every_depth(fast, args, kwargs) -> Result:
    """What a training run says at each depth is what rows get that run so far; gives that run's result."""
    count = len(fast.gates)
    fast.train_trunk, fast.gate_mode = False, "open"
    fast.set_gate_thresholds(CLOSED)  # not even this closes them while training
    fast.train()
    with torch.no_grad():
        every = fast.run(*args, **kwargs)
    fast.eval()
    assert len(every.outputs) == count + 1
    for depth in range(count + 1):
        fast.set_gate_thresholds([0.0] * depth + [CLOSED] * (count - depth))
        result = fast.run(*args, **kwargs)
        close(fast.prediction_of(result.output), every.outputs[depth])
        assert result.steps.dtype == torch.int64
        assert result.steps.tolist() == [depth] * len(result.steps)
    return every


@pytest.mark.parametrize("recipe", ["up front", "after one block", "halting"])
def test_the_prediction_at_a_depth_is_what_a_row_of_that_depth_gets(zoo, recipe):
    fast = again(zoo("bert").fast, RECIPES[recipe])
    args, kwargs = ZOO["bert"].inputs(3, seed=2)
    count = len(fast.gates)
    assert len(fast.exits) == count
    assert [e.threshold for e in fast.exits] == [CLOSED] * count
    every = at_every_depth(fast, args, kwargs)
    assert every.steps.tolist() == [count] * 3
    scores = every.trace.gate_scores[0].tolist()
    assert sorted(scores, reverse=True) == scores or recipe == "halting"


def test_each_row_runs_its_first_blocks_only(zoo):
    args, kwargs = ZOO["bert"].inputs(6, seed=3)
    fast = again(zoo("bert").fast, DepthAdaptive())
    found = scores(fast, args, kwargs).sort(0).values  # after one block three gates
    fast.set_gate_thresholds([float(found[cut - 1, i] + found[cut, i]) / 2 for i, cut in enumerate((1, 3, 5))])
    ran = activations(fast, args, kwargs)
    result = fast.run(*args, **kwargs)
    wanted = [int((result.steps > i).sum()) for i in range(3)]
    assert ran == [6, *(n for n in wanted if n)]
    assert wanted[0] == 5
    per_block = float(fast.gates[0].saves)
    torch.testing.assert_close(result.cost, result.cost.max() - (result.steps.max() - result.steps) * per_block)
    fast.set_gate_thresholds(CLOSED)
    assert activations(fast, args, kwargs) == [6]


@pytest.mark.parametrize("mode", ["up_front", nightly("halting")])
def test_hard_rows_learn_to_run_deeper(mode):
    x, y, hard = rows(512, seed=1)
    fast = eecompile(tower(), DepthAdaptive(mode, min_depth=0, price=0.6), example_inputs=(x[:4],))
    report = fast.fit(Loader(), epochs=8, lr=1e-2, trunk_lr=1e-2, progress=False)
    assert [row.stage for row in report.rows] == ["every depth"] * 8
    assert fast.gate_mode == "hard"
    result = fast.run(x)
    right = result.output.argmax(1) == y
    easy_steps, hard_steps = (result.steps[rows].float().mean() for rows in (~hard, hard))
    assert float(right[~hard].float().mean()) > 0.95
    assert float(right[hard].float().mean()) > 0.9
    assert float(easy_steps) < 0.2
    assert float(hard_steps) > 0.9
    calibrated = fast.calibrate(Loader(512, seed=2), max_drop=0.05, delta=None)
    assert calibrated.qualified
    assert [e.threshold for e in fast.exits] == [CLOSED] * 3  # they were there for training
    again = fast.run(x)
    assert float(again.cost.mean()) < 0.7
    assert float((again.output.argmax(1) == y).float().mean()) > 0.9


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Stages(nn.Module):
    """Two stages [B, 3, 8, 8] to logits [B, 2], with a layer between that changes the shape; `joined` ones read both."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined = joined
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, stride=2)
        self.stages = nn.ModuleList(nn.Sequential(Unit(width), Unit(width)) for width in (8, 12))
        self.up, self.head = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Linear(16 if joined else 12, 2)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stages[0](torch.relu_(self.stem(x)))
        low = self.stages[1](torch.relu_(self.down(high)))
        if self.joined:
            low = torch.cat((high, self.up(low).relu_()), 1)
        y: Tensor = self.head(low.mean((2, 3)))
        return y


@pytest.mark.parametrize("name", ["swin", "hf_resnet"])
def test_what_has_no_gate_runs_at_every_depth(zoo, name):
    args, kwargs = ZOO[name].inputs(4)
    at_every_depth(again(zoo(name).fast, DepthAdaptive(min_depth=0)), args, kwargs)


@pytest.mark.parametrize("joined", [True, nightly(False)])
def test_networks_with_stages_learn_their_depth(joined, tmp_path):
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 2, (64,))
    fast = eecompile(Stages(joined).eval(), DepthAdaptive(min_depth=0), example_inputs=(x[:4],))
    assert len(fast.exits) == len(fast.gates) == 4
    at_every_depth(fast, (x[:5],), {})
    before = fast.original.down.weight.clone()
    fast.fit([(x, y)] * 2, epochs=1, trunk_lr=1e-2, progress=False)
    assert not torch.equal(fast.graph_module.get_parameter("down.weight"), before)
    at_every_depth(fast, (x[:5],), {})
    found = scores(fast, (x,), {})
    fast.set_gate_thresholds(found.median(0).values.tolist())
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    compact, reference = both(back, x)
    assert len(set(compact.steps.tolist())) > 1
    assert torch.equal(compact.gates, reference.gates)
    close(compact.output, reference.output)
    equal_bits(reference.output, run_by("reference", fast, x).output)
    at_every_depth(back, (x[:5],), {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "upfront"}, "unknown mode of depth_adaptive"),
        ({"targets": "loss"}, "unknown targets"),
        ({"mode": "gates", "targets": "oracle"}, "no depth to aim at"),
        ({"min_depth": -1}, "min_depth= counts blocks"),
        ({"price": -1.0}, "price= is a loss"),
        ({"target_depth": 0.5, "targets": "correctness"}, "for targets with a price"),
        ({"target_cost": 0.0}, "fraction of the model's cost"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(StrategyError, match=says):
        DepthAdaptive(**options)


def test_models_without_a_block_to_skip_are_refused():
    with pytest.raises(StrategyError, match="one of the first 3, which every row runs"):
        eecompile(tower(), DepthAdaptive(min_depth=3), example_inputs=(rows(4)[0],))
