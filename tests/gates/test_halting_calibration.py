"""Halting thresholds: the promise by simulation where the truth is known, budgets and curves, and a real network."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eecompile import strategies
from eecompile.errors import CalibrationError, EecompileError
from eecompile.ir import settings
from eecompile.ir.settings import Settings
from eecompile.program import Prediction
from eecompile.result import Choices, Result, Trace
from tests.calibration.synthetic import calibrated
from tests.gates.adaptive import rows as tasks
from tests.gates.adaptive import tower
from tests.support import compiled as eecompile
from tests.support import nightly


class OneChain(nn.Module):
    """A row is [u, v]: it halts after the first of two steps where 1 - u is at least the threshold t, and is then wrong
    where v < 0.3: so at threshold t the accuracy drops by 0.3 (1 - t), and the mean cost is 0.5 + t / 2."""

    exits = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.empty(0))
        self.register_buffer("temperatures", torch.ones(1))
        step = SimpleNamespace(region="block")
        self.halts = (SimpleNamespace(name="halt_0", repeated=False, steps=(step, step)),)
        self.program = SimpleNamespace(prediction=Prediction())
        self.halting_threshold = 1.0

    @property
    def settings(self):
        return Settings().add(settings.halting(0.0), [self.halting_threshold])

    @settings.setter
    def settings(self, new):
        (self.halting_threshold,) = new[settings.HALTING]

    def observe_at(self, new, args, kwargs):
        before, self.settings = self.settings, new
        result = self.observe(*args, **kwargs)
        self.settings = before
        return result

    def observe(self, x):
        halted = 1 - x[:, 0] >= self.halting_threshold
        wrong = halted & (x[:, 1] < 0.3)
        logits = nn.functional.one_hot((~wrong).long(), 2).float()
        ends, sure = torch.zeros(len(x), dtype=torch.long), torch.ones(len(x))
        choices, trace = Choices(steps=2 - halted.long()), Trace((logits,), (sure,))
        return Result(logits, ends, sure, 1 - 0.5 * halted.float(), choices, trace=trace)


def loader(n, seed, size=150, labels=True):
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
    return [(part, torch.ones(len(part), dtype=torch.long)) if labels else part for part in x.split(size)]


@pytest.mark.parametrize(
    ("target", "labels", "trials"),
    [("accuracy", True, 40), nightly("accuracy", True, 100), nightly("agreement", False, 100)],
)
def test_the_drop_is_bounded_as_often_as_promised(target, labels, trials):
    delta, max_drop = 0.1, 0.059  # threshold 0.8 loses 0.06: barely too much
    wrong = qualified = 0
    for seed in range(trials):
        fast = OneChain()
        report = calibrated(fast, loader(450, seed, labels=labels), max_drop=max_drop, delta=delta, target=target)
        t = fast.halting_threshold
        assert t == report.halting[0].threshold
        wrong += 0.3 * max(0.0, 1 - t) > max_drop
        qualified += report.qualified
    assert wrong / trials <= delta + 3 * math.sqrt(delta * (1 - delta) / trials)
    assert qualified / trials > 0.8  # and not by never halting


def test_the_report_says_what_was_found():
    fast = OneChain()
    report = calibrated(fast, loader(3000, 1), max_drop=0.08, delta=0.05)
    assert fast.halting_threshold == pytest.approx(0.8)  # 0.7 loses 0.09
    assert report.expected_cost == pytest.approx(0.9, abs=0.02)
    assert report.halting[0].steps == pytest.approx(1.8, abs=0.03)
    assert report.p_value <= report.level <= 0.05
    assert "no row halted" in report.guarantee
    assert report.to_dict()["halting"][0]["most"] == 2
    assert "mean steps" in str(report)
    few = calibrated(fast, loader(60, 1), max_drop=0.01, delta=0.05)
    assert not few.qualified
    assert fast.halting_threshold == 2.0
    assert "no row halts" in few.guarantee


@pytest.fixture(scope="module")
def ponders():
    """Units whose scores differ from row to row; labels are what the model says when no row halts."""
    x, _, _ = tasks(96, seed=3)
    fast = eecompile(tower(4), strategies.Act(halting="pondernet", halting_bias=-1.0), example_inputs=(x[:4],))
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return fast, [(x[i : i + 24], fast.full(x[i : i + 24]).argmax(1)) for i in range(0, 96, 24)]


def test_on_a_real_network(ponders):
    fast, data = ponders
    report = fast.calibrate(data, max_drop=0.2, delta=None)
    evaluated = fast.evaluate(data)
    assert report.qualified and evaluated.drop <= 0.2
    assert evaluated.mean_cost == pytest.approx(report.expected_cost, abs=1e-5) and report.expected_cost < 0.9
    assert evaluated.mean_steps == pytest.approx(report.halting[0].steps) and "steps on average" in str(evaluated)
    within = fast.calibrate(data, budget=0.6)
    evaluated = fast.evaluate(data)
    assert evaluated.mean_cost == pytest.approx(within.expected_cost, abs=1e-5) and within.expected_cost <= 0.6
    best = min(p["drop"] for p in within.curve if p["cost"] <= 0.6)
    assert evaluated.drop == pytest.approx(best) and "at most 60.0%" in within.guarantee
    before = fast.halting_threshold
    with pytest.raises(CalibrationError, match="no setting keeps the budget"):
        fast.calibrate(data, budget=0.1)
    assert fast.halting_threshold == before


def test_the_trade_off_of_halting_thresholds(ponders):
    fast, data = ponders
    before = fast.halting_threshold
    report = fast.evaluate(data, curve=5)
    assert fast.halting_threshold == before
    points = report.curve
    assert [p["threshold"] for p in points] == [0.25, 0.5, 0.75, 1.0]
    assert [p["steps"] for p in points] == sorted(p["steps"] for p in points)
    assert points[0]["steps"] < points[-1]["steps"] <= 4 and "halting threshold" in str(report)


def test_of_a_repeated_block_rows_may_lose_against_as_many_steps_as_trained():
    x, labels, _ = tasks(48, seed=4)
    strategy = strategies.Act(blocks="blocks.1", max_steps=3, halting_bias=-0.5)
    fast = eecompile(tower(3), strategy, example_inputs=(x[:4],))
    most = fast.evaluate([(x, labels)]).mean_cost
    report = fast.calibrate([(x, labels)], max_drop=0.5, delta=None)
    assert report.qualified and report.expected_cost < most and fast.halting_threshold < 1
    assert "as many steps as trained" in report.guarantee
    fast.calibrate([(x, labels)] * 2, max_drop=0.0, delta=0.05)
    assert fast.halting_threshold == 1.0


def test_exits_and_halting_are_calibrated_one_after_the_other():
    x, labels, _ = tasks(64, seed=5)
    both = strategies.Branchy(exits=["blocks.1"], head="linear", max_head_share=9.0) + strategies.Act(halting_bias=0.0)
    fast = eecompile(tower(4), both, example_inputs=(x[:4],))
    data = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    report = fast.calibrate(data, max_drop=0.4, delta=None)
    (halting,) = report.before
    assert halting.rows == report.rows == 32 and halting.max_drop == 0.2
    assert report.to_dict()["halting"]["halting"][0]["name"] == "halt_0"
    with pytest.raises(EecompileError, match="no trade-off curve"):
        fast.evaluate(data, curve=True)
