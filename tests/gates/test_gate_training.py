"""Training of gates on handwritten digits: stages, the target cost, collapse, resuming bit for bit."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from eecompile import EecompileError, StrategyError, strategies
from eecompile.cli.digits_net import DigitsNet, train
from eecompile.passes.training_decisions import TrainMode
from eecompile.result import gates_free
from eecompile.strategies import TrainingStage, strategy
from eecompile.training.decisions import GateRow
from eecompile.training.stages import shared
from tests.support import compiled as eecompile
from tests.support import nightly

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
Y = torch.tensor(DIGITS.target)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = DigitsNet(8)
    train(model, X[:900], Y[:900], epochs=5)
    return {k: v.clone() for k, v in model.state_dict().items()}


def compiled(state, **options):
    model = DigitsNet(8)
    model.load_state_dict(state)
    return eecompile(model.eval(), strategies.SkipNet(**options), example_inputs=(X[:4],))


def loader(rows=900, batch=30):
    return DataLoader(TensorDataset(X[:rows], Y[:rows]), batch_size=batch, shuffle=True)


def test_training_has_three_stages(trained):
    fast = compiled(trained)
    report = fast.fit(loader(30, 15), epochs=3, progress=False)
    assert [row.stage for row in report.rows] == ["soft gates", "hard gates", "reinforce"]
    assert fast.gate_mode == "hard"
    data = report.to_dict()
    assert [point["epoch"] for point in data["curve"]] == [1, 2, 3]
    assert set(data["rows"][0]["gates"]) == {"cost", "open", "decided"}
    assert "open gates" in str(report)


@pytest.mark.nightly
def test_training_reaches_the_target_cost(trained):
    fast = compiled(trained, target_cost=0.6)
    report = fast.fit(loader(600, 15), epochs=9, lr=1e-2, progress=False)
    assert abs(report.rows[-1].gates.cost - 0.6) < 0.1, str(report)
    assert report.collapse is None, str(report)
    found = fast.evaluate(DataLoader(TensorDataset(X[900:], Y[900:]), batch_size=300))
    assert found.mean_cost < 0.75
    assert found.accuracy > 0.7


def test_no_price_leaves_all_gates_open_and_says_so(trained):
    fast = compiled(trained, target_cost=1.0)
    before = [p.clone() for p in fast.trunk_parameters()]
    report = fast.fit(loader(300), epochs=1, lr=1e-5, trunk=False, progress=False, val_loader=loader(60))
    assert all(torch.equal(p, q) for p, q in zip(before, fast.trunk_parameters(), strict=True))
    assert report.collapse == "all gates are open whatever the input is"
    assert "Warning: the gates collapsed: all gates are open" in str(report)
    assert report.to_dict()["stuck"] == {g.name: "open" for g in fast.gates}


def test_collapse_is_told_from_gates_that_depend_on_the_input():
    assert GateRow(0.4, [0.0, 0.0], [0.0, 0.005]).collapse([]) == "all gates are closed whatever the input is"
    assert (
        GateRow(0.4, [1.0, 0.0], [1.0, 0.0]).collapse([]) == "no gate depends on the input: 1 always open, 1 always closed"
    )
    half = GateRow(0.4, [1.0, 0.5], [1.0, 0.5])
    assert half.collapse(["gate_0", "gate_1"]) is None
    assert half.stuck == {0: "open"}


def test_a_loop_of_ones_own_pays_for_open_gates(trained):
    fast = compiled(trained, target_cost=0.3)
    fast.train()
    fast.gate_mode = "soft"
    for _ in range(2):
        result = fast.run(X[:8])
        loss = fast.loss(result, Y[:8])
    plain = torch.nn.functional.cross_entropy(result.outputs[-1], Y[:8])
    assert float(loss - plain) == pytest.approx(float(price_of(fast) * result.trace.end_cost.mean()), rel=1e-4)
    held = fast.objectives["soft"].passed_on()
    fast.gate_mode = "sample"
    fast.loss(fast.run(X[:8]), Y[:8]).backward()
    assert fast.objectives["sample"].parts[1].controller.cost != held["price"]["cost"]  # went on from there
    assert all(p.grad is not None for p in fast.gate_units.parameters())


def price_of(fast):
    """The price that the second call paid: that of the first batch."""
    controller = type(fast.objectives["soft"].parts[1].controller)(fast.objectives["soft"].parts[1].controller.steering)
    controller.follow(first_cost(fast))
    return controller.now


def first_cost(fast):
    return float(fast.run(X[:8]).trace.end_cost.mean().detach())


def test_free_decisions(trained):
    fast = compiled(trained, min_open=2)
    count = len(fast.gates)
    fast.set_gate_thresholds({"gate_0": 0.0, "gate_1": 2.0})
    closed = torch.zeros(1, count)
    closed[0, 0] = 1  # always open; with that and one more of the last two, min_open is kept
    closed[0, count - 1] = 1
    free = gates_free(fast.cost_model, fast.settings, closed)[0].tolist()
    assert free == [False, False, *[True] * (count - 3), False]


@pytest.mark.parametrize("mode", [nightly("soft"), "hard", nightly("gumbel"), "sample"])
def test_the_first_rows_of_a_batch_run_the_full_model(trained, mode):
    fast = compiled(trained, open_bias=-2.0, estimator="gumbel" if mode == "gumbel" else "straight_through")
    fast.train_mode = TrainMode(gates=mode, full_share=0.25)  # frozen: norms do not mix the rows
    fast.train()
    torch.manual_seed(0)
    result = fast.run(X[:8])
    assert bool((result.gates[:2] == 1).all())
    assert bool((result.gates[2:] < 0.9).any(1).all())
    assert result.trace.gates_free.tolist() == [[False] * len(fast.gates)] * 2 + [[True] * len(fast.gates)] * 6
    torch.testing.assert_close(result.outputs[-1][:2], fast.full(X[:2]), atol=1e-5, rtol=1e-5)
    before = fast.loss(result, Y[:8])
    kept = fast.objectives[mode].parts[1].controller.cost
    assert kept == pytest.approx(float(result.trace.end_cost[2:].mean().detach()))  # rows that decide nothing set no price
    before.backward()


@pytest.mark.nightly
def test_full_rows_keep_the_full_model_good(trained):
    accuracy = {}
    for share in (0.0, 0.5):
        fast = compiled(trained, target_cost=0.4, shares=(0, 1, 0), full_share=share)
        fast.fit(loader(600, 15), epochs=6, lr=1e-2, progress=False)
        assert fast.train_mode.full_share == 0
        test = DataLoader(TensorDataset(X[900:], Y[900:]), batch_size=300)
        assert fast.evaluate(test).mean_cost < 0.75
        fast.settings = fast.settings.neutral()  # the trained model with every gate open
        accuracy[share] = fast.evaluate(test).accuracy
    assert accuracy[0.5] > accuracy[0.0] + 0.2


def test_blocks_are_dropped_before_gates_are_trained(trained):
    fast = compiled(trained, warm_up=0.5, shares=(0, 1, 0), full_share=0.25)
    report = fast.fit(loader(60), epochs=2, progress=False)
    assert [row.stage for row in report.rows] == ["blocks dropped", "hard gates"]
    fast.train_mode = TrainMode(gates="dropped", full_share=0.25)
    fast.set_gate_thresholds({"gate_0": 0.0, "gate_1": 2.0})
    fast.train()
    torch.manual_seed(0)
    gates = fast.run(X[:800]).gates
    assert bool((gates[:200] == 1).all())
    count = gates.shape[1]
    assert gates[200:, :2].mean(0).tolist() == [1.0, 0.0]  # always open and always closed, as they are set
    for k in range(2, count):
        assert float(gates[200:, k].mean()) == pytest.approx(1 - 0.5 * (k + 1) / count, abs=0.05)
    report = fast.fit(loader(60), epochs=1, objective="exits+choice_cost", progress=False)
    assert [row.stage for row in report.rows] == ["hard gates"]  # where nothing is chosen there is no price to learn from
    with pytest.raises(EecompileError, match="learns to do without blocks, but is not trained"):
        fast.fit(loader(60), epochs=2, trunk=False, progress=False)


def test_epochs_are_shared_by_largest_remainders():
    assert shared(1, [0.3, 0.4, 0.3]) == [0, 1, 0]
    assert shared(2, [0.3, 0.4, 0.3]) == [1, 1, 0]
    assert shared(3, [0.3, 0.4, 0.3]) == [1, 1, 1]
    assert shared(10, [0.3, 0.4, 0.3]) == [3, 4, 3]


def test_objectives_of_ones_own_and_mistakes(trained):
    fast = compiled(trained)
    run = {"epochs": 3, "trunk": False, "progress": False}
    report = fast.fit(loader(60), objective="exits+choice_cost", **run)
    assert {row.stage for row in report.rows} == {"soft gates", "hard gates"}
    report = fast.fit(loader(60), objective="exits+reinforce", **run)
    assert {row.stage for row in report.rows} == {"reinforce"}
    mean_loss = torch.nn.functional.cross_entropy
    with pytest.raises(EecompileError, match="weighs the likelihood of class labels"):
        fast.fit(loader(60), loss=mean_loss, **run)
    poisoned = [(X[:4], Y[:4]), (X[4:8] * float("nan"), Y[4:8])]
    with pytest.raises(EecompileError, match="not finite") as caught:
        fast.fit(poisoned, objective="exits+reinforce", epochs=1, trunk=False, progress=False)
    assert "batch 1" in str(caught.value)


def test_options():
    given = strategies.SkipNet(estimator="gumbel", shares=(0, 1, 0), target_cost=0.4)
    assert given.stages == (TrainingStage("hard gates", 1, "gumbel", {"name": "choice_cost", "target": 0.4}),)
    assert strategy(given.to_dict()) == given
    for wrong in (
        {"full_share": 1},
        {"full_share": -0.1},
        {"warm_up": 1},
        {"warm_up": "half"},
        {"shares": (0, 0, 0)},
        {"shares": (1, 1)},
        {"estimator": "st"},
        {"reward": "speed"},
        {"entropy": -1},
    ):
        with pytest.raises(StrategyError):
            strategies.SkipNet(**wrong)
