"""Sequential tests: false alarms over all time, delays, the bound, the mix of exits."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from eecompile.calibration.sequences import BETS, LowerBound, MeanAbove, mix_evidence, sparkline
from tests.support import nightly


def alarmed(limit, means, alpha=0.05, low=0.0, seed=0):
    """After how many losses the alarm comes; None where it does not."""
    test = MeanAbove(limit, low)
    for i, loss in enumerate((torch.rand(len(means), generator=torch.Generator().manual_seed(seed)) < means).tolist()):
        test.add([float(loss)])
        if test.alarm(alpha):
            return i + 1
    return None


def test_wealth_written_out():
    test = MeanAbove(0.1)
    losses = [0.0, 1.0, 0.5, 1.0]
    test.add(losses)
    by_bet = [math.prod(1 + b / 0.1 * (x - 0.1) for x in losses) for b in BETS]
    assert math.exp(test.now) == pytest.approx(statistics.mean(by_bet))
    assert test.mean == pytest.approx(0.625) and test.rows == 4


@pytest.mark.parametrize(("streams", "rows"), [(60, 400), nightly(10_000, 3000)])
def test_false_alarms_over_all_time_are_at_most_alpha(streams, rows):
    """At the limit itself, many streams at once: the recursion of `MeanAbove` for a matrix."""
    g, limit, alpha = torch.Generator().manual_seed(0), 0.04, 0.05
    wealth = torch.zeros(max(streams, 2000), len(BETS), dtype=torch.float64)
    ever = torch.zeros(len(wealth), dtype=torch.bool)
    bets = torch.tensor(BETS, dtype=torch.float64) / limit
    for _ in range(rows):
        loss = (torch.rand(len(wealth), 1, generator=g) < limit).double()
        wealth += torch.log1p(bets * (loss - limit))
        ever |= torch.logsumexp(wealth, 1) - math.log(len(BETS)) >= -math.log(alpha)
    share = float(ever.double().mean())
    assert share <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(wealth))


def test_a_rise_of_two_points_is_found():
    delays = [alarmed(0.03, torch.full((20_000,), 0.05), seed=s) for s in range(9)]
    assert None not in delays
    assert statistics.median(delays) < 4000


def test_signed_drops():
    test = MeanAbove(0.01, -1.0)
    test.add([1.0, -1.0, 0.0] * 50)
    assert not test.alarm(0.05)
    test.add([1.0, 0.0, 0.0] * 200)
    assert test.alarm(0.05)


def test_the_lower_bound_rises_to_the_mean_and_stays_below():
    bound, g = LowerBound(), torch.Generator().manual_seed(1)
    losses = (torch.rand(1500, generator=g) < 0.2).double().tolist()
    found = [bound.add(losses[i : i + 100], 0.05) for i in range(0, 1500, 100)]
    assert found == sorted(found)
    assert 0.12 < found[-1] <= 0.2


def test_the_mix_of_exits():
    assert mix_evidence([700, 200, 100], [70, 20, 10]) < 0
    assert mix_evidence([700, 200, 100], [0, 0, 40]) > math.log(20)
    assert mix_evidence([700, 200, 100], [0, 0, 0]) == pytest.approx(0)


def test_history_is_thinned_and_drawn():
    test = MeanAbove(0.1)
    test.add([0.0] * 2000)
    assert len(test.history) <= 2001
    for _ in range(1000):
        test.add([0.0])
    assert len(test.history) <= 600 and test.history[-1][0] == 3000
    assert len(sparkline(test.history)) <= 61
