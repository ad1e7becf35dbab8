"""Strategies added up: what is inserted, how it is trained and saved, and sums that make no sense."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from eecompile import StrategyError, eecompile, load, strategies
from eecompile.strategies import strategy
from tests.inspect.conftest import images, resnet
from tests.support import equal_bits


def test_parts_objective_and_stages():
    both = strategies.Branchy(exits=2, weights="linear") + strategies.SkipNet(trunk=False)
    assert both.objective == {"name": "weighted_cross_entropy", "weights": "linear"}
    assert [stage.name for stage in both.stages] == ["soft gates", "hard gates", "reinforce"]
    assert not both.joint
    recipe = both.recipe()
    assert recipe.exits is not None
    assert recipe.gates is not None
    assert strategy(both.to_dict()) == both
    assert strategy("branchy+skipnet") == strategies.Branchy() + strategies.SkipNet()
    assert strategy("branchy+skipnet").joint
    ponders = strategies.SkipNet() + strategies.Act(ponder_price=0.2)
    assert ponders.objective == {"name": "sum", "parts": [{"name": "exits"}, {"name": "ponder"}], "factors": [1.0, 0.2]}


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (strategies.SkipNet(), strategies.SkipNet(unit="linear"), "two strategies insert gates"),
        (strategies.Branchy(), strategies.Anytime(), "two strategies insert exits"),
    ],
)
def test_conflicts_are_named(first, second, says):
    with pytest.raises(StrategyError, match=says) as caught:
        first + second
    assert f"{first.name} + {second.name}" in str(caught.value)


def test_exits_and_gates_are_trained_calibrated_and_saved_together(tmp_path):
    x = images(48)
    model = resnet()
    with torch.no_grad():
        y = model(x).argmax(1)
    both = strategies.Branchy(exits=1) + strategies.SkipNet(trunk=False, open_bias=0.5)
    fast = eecompile(model, both, example_inputs=(x[:4],))
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    report = fast.fit(data, epochs=3, progress=False)
    assert [row.stage for row in report.rows] == ["soft gates", "hard gates", "reinforce"]
    assert report.gates
    assert report.exits
    found = fast.calibrate(data, max_drop=0.3, delta=None)
    assert found.gates is not None
    assert found.gates.rows == found.rows == 24  # batches take turns
    assert found.gates.max_drop == 0.15
    judged = fast.evaluate(data)
    assert judged.full_accuracy == 1.0
    assert judged.mean_cost <= 1.05
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    assert back.strategy == both
    equal_bits(back.run(x).output, fast.run(x).output)
