"""Budgets: never exceeded, against exhaustive enumeration, MSDNet's quota, exits that stay open, combined exits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eecompile import strategies
from eecompile.calibration.budget import budget_curve, calibrate_budget
from eecompile.calibration.evidence import Evidence
from eecompile.calibration.search import Search
from eecompile.calibration.solver import Solver
from eecompile.errors import CalibrationError, EecompileError
from eecompile.ir.settings import CLOSED
from tests.calibration.synthetic import Drawn, draw, loader
from tests.calibration.test_search import costs
from tests.support import compiled as eecompile


def made(n, e, seed, levels=None, keep_open=False):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, e, generator=g)
    if levels:
        c = (c * levels).round() / levels  # ties, and confidences of exactly 0 and 1
    right = torch.rand(n, e + 1, generator=g) < torch.cat([0.3 + 0.6 * c, torch.full((n, 1), 0.8)], 1)
    return Evidence(c, torch.zeros(n, e + 1, dtype=torch.float64), costs(e), None, keep_open), right.double()


def exhaustive(evidence, score, budget):
    """The most rows that can be right within the budget."""
    found = Evidence(evidence.confidences, -score, evidence.costs, None, evidence.keep_open)
    options = [[*evidence.confidences[:, k].unique().tolist(), evidence.never] for k in range(evidence.exits)]
    measured = [found.measure(torch.tensor(t)) for t in itertools.product(*options)]
    fits = [-loss for loss, cost in measured if cost <= budget + 1e-9]
    return max(fits) if fits else None


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.floats(0.35, 1.05),
)
def test_the_search_keeps_the_budget_and_nothing_is_better(n, e, seed, levels, keep_open, budget):
    evidence, score = made(n, e, seed, levels, keep_open)
    best = exhaustive(evidence, score, budget)
    solver = Solver(evidence, score)
    if best is None:
        with pytest.raises(CalibrationError, match="does not pay for the cheapest answers"):
            solver.solve(budget, "search")
        return
    thresholds, _ = solver.solve(budget, "search", boxes=10**5)
    index = evidence.leave(thresholds)
    _, cost = solver.evidence.measure(thresholds)
    got = float(score.gather(1, index[:, None]).sum())
    assert cost <= budget + 1e-9
    assert not keep_open or float(thresholds.max()) <= 1
    assert solver.gap == 0
    assert got == best, "all exits are solved exactly at once"


@pytest.mark.parametrize("budget", [0.45, 0.6])
def test_what_is_proved_within_few_boxes_is_a_bound(budget):
    """The gap never falls below what a longer search finds, and closes."""
    evidence, score = made(150, 3, 11)
    gaps, right = [], []
    for boxes in (1, 300, 10**5):
        solver = Solver(evidence, score)
        thresholds, _ = solver.solve(budget, "search", boxes)
        index = evidence.leave(thresholds)
        right.append(float(score.gather(1, index[:, None]).mean()))
        gaps.append(solver.gap)
        assert solver.evidence.measure(thresholds)[1] <= budget + 1e-9
    assert gaps[0] >= gaps[1] >= gaps[2] == 0
    assert right == sorted(right)
    assert right[-1] <= right[0] + gaps[0] + 1e-9


@settings(max_examples=20, deadline=None)
@given(
    st.integers(5, 60),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.floats(0.3, 1),
)
def test_the_quota_keeps_the_budget(n, e, seed, levels, keep_open, budget):
    evidence, score = made(n, e, seed, levels, keep_open)
    solver = Solver(evidence, score)
    try:
        thresholds, ratio = solver.quota(budget)
    except CalibrationError:
        assert solver.evidence.measure(solver.by_ratio(-12.0))[1] > budget
        return
    assert solver.evidence.measure(thresholds)[1] <= budget + 1e-9
    assert ratio > 0


def test_the_quota_is_a_geometric_series():
    evidence, score = made(4000, 3, 1)
    thresholds, ratio = Solver(evidence, score).quota(0.6)
    index = evidence.leave(thresholds)
    share = [float((index == k).double().mean()) for k in range(4)]
    for a, b in itertools.pairwise(share):
        assert b / a == pytest.approx(ratio, rel=0.02)
    _, cost = Solver(evidence, score).evidence.measure(thresholds)
    assert cost == pytest.approx(0.6, abs=1e-3), "the budget is used up"


def test_the_search_beats_the_quota():
    evidence, score = made(3000, 4, 2)
    solver = Solver(evidence, score)
    for budget in (0.4, 0.6, 0.8):
        right = {}
        for method in ("search", "quota"):
            thresholds, _ = solver.solve(budget, method)
            right[method] = float(score.gather(1, evidence.leave(thresholds)[:, None]).sum())
        assert right["search"] >= right["quota"]


def test_exits_that_stay_open_lose_the_rows_that_are_as_sure_as_can_be():
    evidence, _ = made(40, 2, 3, levels=3, keep_open=True)
    search = Search(evidence)
    assert search.forced == [(evidence.confidences[:, k] == 1).sum() for k in range(2)]
    for price in (0.1, 10.0):
        thresholds = search.descend(search.closed, price)
        assert float(thresholds.max()) <= 1


def held(fast, x, y):
    correct = total = cost = 0.0
    for inputs, labels in loader(x, y):
        r = fast.observe(inputs)
        correct += float((r.output.argmax(1) == labels).sum())
        cost += float(r.cost.double().sum())
        total += len(labels)
    return correct / total, cost / total


def test_thresholds_are_set_and_the_report_tells_what_they_do():
    x, y = draw(1500)
    fast = Drawn()
    report = calibrate_budget(fast, loader(x, y), 0.6)
    fast.settings = report.settings
    accuracy, cost = held(fast, x, y)
    assert cost <= 0.6
    assert report.mean_cost == pytest.approx(cost, abs=1e-6)
    assert report.accuracy == pytest.approx(accuracy)
    assert sum(e.share for e in report.exits) == pytest.approx(1)
    assert report.to_dict()["budget"] == 0.6
    generous = calibrate_budget(fast, loader(x, y), 1.2)
    assert generous.accuracy >= generous.full_accuracy


def test_a_curve_rises_with_the_budget_and_is_judged_on_other_rows():
    fast = Drawn()
    before = fast.thresholds.tolist()
    curve = budget_curve(fast, loader(*draw(1500)), loader(*draw(1500, seed=5)), budgets=(0.9, 0.4, 0.05, 0.6))
    assert [p["budget"] for p in curve.points] == [0.4, 0.6, 0.9]
    seen = [p["calibration"]["accuracy"] for p in curve.points]
    assert seen == sorted(seen)
    for p in curve.points:
        assert p["calibration"]["cost"] <= p["budget"]
        assert p["test"]["cost"] <= p["budget"] + 0.03
    assert fast.thresholds.tolist() == before
    assert set(curve.to_dict()["full_accuracy"]) == {"calibration", "test"}


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (0, {}, "budget, .* is out of range"),
        (-1.0, {}, "budget, .* is out of range"),
        (float("nan"), {}, "budget, .* is not a number"),
        (float("inf"), {}, "budget, .* is out of range"),
        (50, {}, "a fraction of the full model's cost, is out of range"),
        (0.01, {}, "does not pay for the cheapest answers"),
        (0.5, {"method": "greedy"}, "unknown method"),
        (0.01, {"method": "quota"}, "does not pay for the cheapest"),
    ],
)
def test_budgets_that_cannot_be(budget, options, message):
    fast = Drawn()
    before = fast.thresholds.tolist(), fast.temperatures.tolist()
    with pytest.raises(CalibrationError, match=message):
        calibrate_budget(fast, loader(*draw(300)), budget, **options)
    assert (fast.thresholds.tolist(), fast.temperatures.tolist()) == before


# ------------------------------------------------------------------------------------------------ compiled models


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(5))
        self.end = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)


@pytest.fixture(scope="module")
def trained():
    """A trained chain for each combination, and rows to calibrate on."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=g)
    y = torch.arange(1200) % 4
    x = centres[y] + 1.5 * torch.randn(1200, 16, generator=g)
    found = {}
    for combine in ("last", "ensemble", "confident"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Chain().eval()
        strategy = strategies.Ann(exits="every-block", head="linear", combine=combine)
        fast = eecompile(model, strategy, example_inputs=(x[:8],))
        fast.fit(loader(x[:400], y[:400], 50), epochs=4, lr=1e-2, trunk_lr=1e-2, progress=False)
        found[combine] = fast
    return found, loader(x[400:], y[400:], 200)


@pytest.mark.parametrize("combine", ["last", "ensemble", "confident"])
@pytest.mark.parametrize("how", [{"budget": 0.5}, {"max_drop": 0.03, "delta": None}, {"max_drop": 0.1}])
def test_what_calibration_says_is_what_the_program_does(trained, combine, how):
    fast, rows = trained[0][combine], trained[1]
    report = fast.calibrate(rows, **how)
    thresholds = fast.thresholds.tolist()
    assert all(t <= 1 for t in thresholds), "an anytime program keeps its exits open"
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        r = fast.run(x)
    said = report.mean_cost if "budget" in how else report.expected_cost
    assert float(r.cost.double().mean()) == pytest.approx(said, abs=2e-3)
    share = [float((r.exit_index == k).float().mean()) for k in range(len(thresholds) + 1)]
    assert share == pytest.approx([e.share for e in report.exits], abs=3 / len(y))
    if "budget" in how:
        assert said <= 0.5
        assert float((r.output.argmax(1) == y).float().mean()) == pytest.approx(report.accuracy, abs=3 / len(y))


def test_combined_exits_must_stay_open(trained):
    with pytest.raises(CalibrationError, match="exits that answer together stay open"):
        trained[0]["ensemble"].calibrate(trained[1], keep_open=False)
    report = trained[0]["last"].calibrate(trained[1], budget=0.35, keep_open=False)
    assert any(not e.is_open for e in report.exits)
    with pytest.raises(EecompileError, match="two ways to calibrate"):
        trained[0]["last"].calibrate(trained[1], budget=0.35, max_drop=0.01)


def test_degradation_is_what_a_budget_gives(trained):
    fast, rows = trained[0]["ensemble"], trained[1]
    fast.set_thresholds([0.95, 0.9, CLOSED, 0.9][: len(fast.exits)] + [0.9] * (len(fast.exits) - 4))
    points = fast.evaluate(rows, budgets=True).degradation
    assert len(points) == sum(e.is_open for e in fast.exits) + 1
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    for p in [*points, *fast.evaluate(rows, budgets=[0.1, 0.55]).degradation]:
        with torch.no_grad():
            r = fast.run(x, budget=p["budget"])
        assert float((r.output.argmax(1) == y).float().mean()) == pytest.approx(p["accuracy"], abs=2 / len(y))
        assert float(r.cost.double().mean()) == pytest.approx(p["cost"], abs=2e-3)
        assert float((~r.final).float().mean()) == pytest.approx(p["stopped"], abs=2 / len(y))
    assert points[-1]["stopped"] == 0
    assert "Degradation" in str(fast.evaluate(rows, budgets=True))
