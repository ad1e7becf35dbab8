"""Strategies added up: what is inserted, how it is trained and saved, and sums that make no sense."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from eecompile import StrategyError, load, strategies
from eecompile.strategies import conflicts, strategy
from eecompile.training.objectives import OBJECTIVES
from tests.inspect.conftest import images, resnet
from tests.support import compiled as eecompile
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
    ponders = strategies.Act(ponder_price=0.2) + strategies.Branchy(criterion="learned")
    names = [part["name"] for part in ponders.objective["parts"]]
    assert (names, ponders.objective["factors"]) == (["weighted_cross_entropy", "ponder", "exit_score"], [1.0, 0.2, 1.0])
    assert (strategies.MeBert(two_stage=True) + strategies.Act()).two_stage
    assert (strategies.Anytime() + strategies.SkipNet()).keep_open
    assert not (strategies.Branchy() + strategies.DepthAdaptive(targets="cost")).training_exits


CONFLICTS = [
    (strategies.SkipNet(), strategies.SkipNet("halves"), "two strategies insert gates",
     "skipnet(gates='every-block') + skipnet(gates='halves')"),
    (strategies.Branchy(), strategies.Anytime(), "two strategies insert exits",
     "branchy(exits=3) + anytime(exits='everywhere')"),
    (strategies.Ann(), strategies.SelfAdaptive(), "two strategies insert exits", "self_adaptive(exits=2)"),
    (strategies.Branchy(), strategies.DepthAdaptive(), "two strategies insert exits", "depth_adaptive(targets='oracle')"),
    (strategies.Act(), strategies.Act(blocks="layer1*"), "two strategies insert halting", "act(blocks='layer1*')"),
    (strategies.SkipNet(), strategies.Act(), "gates and halting",
     "skipnet(gates='every-block') + act(blocks='every-block')"),
    (strategies.MeBert(two_stage=True), strategies.SkipNet(), "two strategies have stages", "mebert(two_stage=True)"),
    (strategies.Branchy(mask="a"), strategies.SkipNet(mask="b"), "two names of the padding mask", "branchy(mask='a')"),
    (strategies.Cascade(criterion="margin"), strategies.Branchy(criterion="energy"), "two criteria",
     "cascade(criterion='margin') + branchy(criterion='energy')"),
    (strategies.Cascade(combine="ensemble"), strategies.Anytime(combine="confident"), "two ways to combine exits",
     "cascade(combine='ensemble') + anytime(combine='confident')"),
    (strategies.Cascade(weights="linear"), strategies.Anytime(weights=[1, 2]), "two weights=", "cascade(weights='linear')"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "says", "clauses"), CONFLICTS, ids=[f"{a.name}-{b.name}" for a, b, *_ in CONFLICTS]
)
def test_conflicts_are_named(first, second, says, clauses):
    for sum_ in (lambda: first + second, lambda: strategies.Combined((second, first))):
        with pytest.raises(StrategyError, match=says) as caught:
            sum_()
        for clause in clauses.split(" + "):
            assert clause in str(caught.value)


def test_every_objective_that_holds_the_tasks_loss_exists():
    assert set(conflicts.TASKS) <= set(OBJECTIVES)


def test_conflicts_that_the_number_of_models_decides():
    both = strategies.Cascade() + strategies.Anytime()
    assert both.within == strategies.Anytime()
    assert both.over(2).recipe().exits.where == "predictions"
    with pytest.raises(StrategyError, match="two strategies insert exits"):
        both.over(1)
    with pytest.raises(StrategyError, match="takes one model"):
        (strategies.Branchy() + strategies.SkipNet()).over(2)
    over_layers = strategies.Cascade(exits=2) + strategies.SkipNet()
    assert over_layers.over(1).recipe().gates is not None


def test_an_option_with_its_default_value_gives_way():
    both = strategies.Cascade() + strategies.MeBert(combine="ensemble", distillation=0.3)
    assert {part.criterion.name for part in both.parts} == {"entropy"}
    assert {part.combine for part in both.parts} == {"ensemble"}
    assert both.objective["name"] == "distillation"
    other = strategies.Cascade(criterion="margin", threshold=0.3) + strategies.Anytime()
    assert {part.criterion.name for part in other.parts} == {"margin"}
    assert other.recipe().exits.threshold == 0.3


def test_gates_that_shut_all_later_ones_have_no_least_number():
    with pytest.raises(StrategyError, match="min_open= and monotone contradict each other"):
        strategies.GateRecipe(min_open=2, monotone=True)


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
    (gates,) = found.before
    assert gates.rows == found.rows == 24  # batches take turns
    assert gates.max_drop == 0.15
    evaluated = fast.evaluate(data)
    assert evaluated.full_accuracy == 1.0
    assert evaluated.mean_cost <= 1.05
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    assert back.strategy == both
    equal_bits(back.run(x).output, fast.run(x).output)
