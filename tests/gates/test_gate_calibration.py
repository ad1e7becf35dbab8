"""Thresholds of gates: the promise by simulation where the truth is known, and what evaluation compares with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eecompile import strategies
from eecompile.cli.digits_net import DigitsNet
from eecompile.errors import CalibrationError, EecompileError
from eecompile.ir import settings
from eecompile.ir.settings import Settings
from eecompile.program import Prediction
from eecompile.result import Choices, Result, Trace
from eecompile.training.evaluate import evaluate
from tests.calibration.synthetic import calibrated
from tests.support import compiled as eecompile
from tests.support import nightly


class OneGate(nn.Module):
    """A row is [u, v]: u the gate's score, v uniform. Open it answers 1; closed it answers wrongly where v < 0.4 u.

    So at threshold t the accuracy drops by 0.2 t^2, and the mean cost is 1 - t / 2.
    """

    exits = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.empty(0))
        self.register_buffer("temperatures", torch.ones(1))
        self.register_buffer("gate_thresholds", torch.tensor([0.5]))
        self.program = SimpleNamespace(prediction=Prediction())

    @property
    def gates(self):
        threshold = float(self.gate_thresholds[0])
        return (SimpleNamespace(name="gate_0", region="block", threshold=threshold, saves=0.5, stage=0),)

    @property
    def settings(self):
        return Settings().add(settings.gates(["gate_0"]), self.gate_thresholds.tolist())

    @settings.setter
    def settings(self, new):
        self.gate_thresholds.copy_(torch.tensor(new[settings.GATES]))

    def observe_at(self, new, args, kwargs):
        before, self.settings = self.settings, new
        result = self.observe(*args, **kwargs)
        self.settings = before
        return result

    def costs(self, open_exits):
        return torch.ones(1)

    def full(self, x):
        return nn.functional.one_hot(torch.ones(len(x), dtype=torch.long), 2).float()

    def prediction_of(self, output):
        return output

    def spoilt(self, x, opened):
        return torch.zeros_like(opened)

    def observe(self, x):
        opened = x[:, 0] >= self.gate_thresholds[0]
        wrong = (~opened & (x[:, 1] < 0.4 * x[:, 0])) | self.spoilt(x, opened)
        logits = nn.functional.one_hot((~wrong).long(), 2).float()
        cost = 1 - 0.5 * (~opened).float()
        ends, sure = torch.zeros(len(x), dtype=torch.long), torch.ones(len(x))
        trace = Trace((logits,), (sure,), gate_scores=x[:, :1], end_cost=cost)
        return Result(logits, ends, sure, cost, Choices(opened.unsqueeze(1)), trace=trace)


class Spoilt(OneGate):
    """Trained to be skipped where u < 0.3: the open gate answers wrongly there."""

    def spoilt(self, x, opened):
        return opened & (x[:, 0] < 0.3)


def rows(n, seed):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))


def loader(x, size=150, labels=True):
    return [(part, torch.ones(len(part), dtype=torch.long)) if labels else part for part in x.split(size)]


@pytest.mark.parametrize(
    ("target", "labels", "trials"),
    [("accuracy", True, 40), nightly("accuracy", True, 120), nightly("agreement", False, 120)],
)
def test_the_drop_is_bounded_as_often_as_promised(target, labels, trials):
    delta, max_drop = 0.1, 0.03
    wrong = qualified = 0
    for seed in range(trials):
        fast = OneGate()
        report = calibrated(fast, loader(rows(450, seed), labels=labels), max_drop=max_drop, delta=delta, target=target)
        t = float(fast.gate_thresholds[0])
        assert t == report.gates[0].threshold
        wrong += 0.2 * t * t > max_drop
        qualified += report.qualified
    assert wrong / trials <= delta + 3 * math.sqrt(delta * (1 - delta) / trials)
    assert qualified / trials > 0.8  # and not by opening all gates


@pytest.mark.nightly
def test_without_a_guarantee_it_breaks_the_bound_often():
    wrong = 0
    for seed in range(40):
        fast = OneGate()
        calibrated(fast, loader(rows(450, seed)), max_drop=0.0315, delta=None)
        wrong += 0.2 * float(fast.gate_thresholds[0]) ** 2 > 0.0315
    assert wrong > 8


def test_the_report_says_what_was_found():
    fast = OneGate()
    report = calibrated(fast, loader(rows(3000, 1)), max_drop=0.03, delta=0.05)
    t = float(fast.gate_thresholds[0])
    assert 0.2 < t < 0.39  # 0.387 loses exactly 0.03
    assert report.expected_cost == pytest.approx(1 - t / 2, abs=0.02)
    assert report.gates[0].open == pytest.approx(1 - t, abs=0.03)
    assert report.p_value <= report.level <= 0.05
    assert "all gates open" in report.guarantee
    assert report.to_dict()["gates"][0]["name"] == "gate_0"
    assert "gate_0" in str(report)
    few = calibrated(fast, loader(rows(60, 1)), max_drop=0.01, delta=0.05)
    assert not few.qualified
    assert fast.gate_thresholds.tolist() == [0.0]
    assert "too few" in few.guarantee
    with pytest.raises(CalibrationError):
        calibrated(fast, [], max_drop=0.01)


@pytest.mark.parametrize(("rows_given", "max_drop"), [(4000, 0.02), (200, 0.002)])
def test_a_model_that_is_worse_with_nothing_skipped_is_no_base(rows_given, max_drop):
    fast = Spoilt()  # right for 70% with all gates open, for 98% at 0.3; at 0.4 for 96.8%
    fast.gate_thresholds.fill_(0.3)
    report = calibrated(fast, loader(rows(rows_given, 1), size=50), max_drop=max_drop, delta=0.05)
    t = float(fast.gate_thresholds[0])
    assert 0.28 < t < 0.46  # against open gates 1.0, which loses 20 points, would be cheapest within the bound
    assert report.qualified == (rows_given == 4000)
    assert (
        "With all gates open the score is 6" in report.notes[-1] or "With all gates open the score is 7" in report.notes[-1]
    )
    assert "all gates open" not in report.guarantee
    assert report.gates[0].open == pytest.approx(1 - t, abs=0.1)
    assert report.to_dict()["notes"] == report.notes


class Better(OneGate):
    """Right for all rows with the gate closed, for a fifth with it open."""

    def spoilt(self, x, opened):
        return opened & (x[:, 1] >= 0.2)

    def observe(self, x):
        return super().observe(x * torch.tensor([1.0, 0.6]) + torch.tensor([0.0, 0.4]))


@pytest.mark.parametrize("delta", [None, 0.05])
def test_the_best_setting_may_be_the_cheapest(delta):
    fast = Better()
    report = calibrated(fast, loader(rows(2000, 1)), max_drop=0.02, delta=delta)
    assert report.qualified and report.expected_cost < 0.7
    assert report.expected_cost == pytest.approx(min(p["cost"] for p in report.curve), abs=0.03)
    assert abs(report.drop) <= 0.02


def test_evaluation_compares_with_all_gates_open():
    fast = OneGate()
    x = rows(2000, 3)
    found = evaluate(fast, loader(x))
    assert found.full_accuracy == 1.0
    assert found.accuracy == pytest.approx(1 - 0.05, abs=0.02)
    assert found.agreement == found.accuracy
    assert found.gates[0].open == pytest.approx(0.5, abs=0.03)
    assert found.gates[0].saved == pytest.approx(0.25, abs=0.02)
    assert "open for" in str(found)
    with pytest.raises(EecompileError, match="no trade-off curve"):
        evaluate(fast, loader(x), curve=True)


def test_on_a_real_network_with_exits_too():
    torch.manual_seed(0)
    model, x = DigitsNet(4).eval(), torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    fast = eecompile(model, strategies.SkipNet(open_bias=0.0), example_inputs=(x[:4],))
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    found = fast.evaluate(data)
    assert found.full_accuracy == 1.0
    report = fast.calibrate(data, max_drop=0.2, delta=None)
    assert fast.evaluate(data).drop <= 0.2
    assert report.expected_cost == pytest.approx(fast.evaluate(data).mean_cost, abs=1e-5)
