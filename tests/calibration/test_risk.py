"""p-values against sums written out, exact fractions and simulation; the fallback procedure."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eecompile.binomial import log_binomial_tail
from eecompile.calibration import paired
from eecompile.calibration.risk import PlannedTest, betting, fallback, planned, rows_needed
from tests.support import nightly


def tail(k: int, n: int, p: Fraction) -> float:
    return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(k, n) + 1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 99))
def test_binomial_tail_against_fractions(n, percent):
    p = Fraction(percent, 100)
    k = torch.arange(-1, n + 2)
    found = log_binomial_tail(k, n, float(p)).exp().tolist()
    assert found == pytest.approx([tail(int(i), n, p) for i in k], rel=1e-10, abs=1e-300)


def test_known_values():
    # 298 rows without a loss do not show 1% at 5%, 299 do
    assert rows_needed(0.01, 0.05) == 299
    assert rows_needed(0.05, 0.05) == 59
    assert rows_needed(0.0, 0.05) is None
    # from scipy 1.17: binom.cdf(900, 100000, 0.01)
    assert float(log_binomial_tail(torch.tensor(900), 100_000, 0.01).exp()) == pytest.approx(0.0006608413334501454, rel=1e-8)


def extreme(losses: int, gains: int, n: int, alpha: float, p: float) -> float:
    """Probability of the tables at least as extreme, where gains have probability p, by summing them all."""
    seen = paired.score(*torch.tensor([[losses], [gains]]).double(), n, alpha)
    total = 0.0
    for lost in range(n + 1):
        for won in range(n - lost + 1):
            if paired.score(*torch.tensor([[lost], [won]]).double(), n, alpha) <= seen + 1e-9:
                ways = math.comb(n, lost) * math.comb(n - lost, won)
                total += ways * (p + alpha) ** lost * p**won * (1 - alpha - 2 * p) ** (n - lost - won)
    return total


@pytest.mark.parametrize(
    ("losses", "gains", "n", "alpha"), [(0, 0, 12, 0.1), (1, 2, 15, 0.2), (3, 6, 14, 0.05), (0, 9, 9, 0.3)]
)
def test_the_paired_test_against_all_tables(losses, gains, n, alpha):
    slack = 0.002
    found = paired.p_value(losses, gains, n, alpha, slack)
    low, high = interval(gains, n, alpha, slack)
    worst = max(extreme(losses, gains, n, alpha, low + (high - low) * i / 40) for i in range(41))
    assert found == pytest.approx(worst + slack, rel=0.01)


def interval(gains: int, n: int, alpha: float, slack: float) -> tuple[float, float]:
    """Of the probability of a gain: each side misses it with probability slack / 2 at most."""
    low, high = 1 - paired._upper(n - gains, n, slack / 2), min(paired._upper(gains, n, slack / 2), (1 - alpha) / 2)
    assert low == 0 or float(log_binomial_tail(torch.tensor(n - gains), n, 1 - low).exp()) <= slack / 2 * 1.001
    assert high == (1 - alpha) / 2 or float(log_binomial_tail(torch.tensor(gains), n, high).exp()) <= slack / 2 * 1.001
    return min(low, high), high


@pytest.mark.parametrize(
    ("n", "alpha", "losses", "gains"), [(200, 0.002, 36, 49), (100, 0.02, 13, 32), (500, 0.005, 76, 90)]
)
def test_the_largest_probability_is_found(n, alpha, losses, gains):
    seen = float(paired.score(torch.tensor(losses).double(), torch.tensor(gains).double(), n, alpha))
    low, high = interval(gains, n, alpha, 1e-4)
    reach = paired._reach(torch.arange(n + 1).double(), n, alpha, seen)
    every = [paired._probability(reach, n, alpha, (low**0.5 + (high**0.5 - low**0.5) * i / 200) ** 2) for i in range(201)]
    assert paired.p_value(losses, gains, n, alpha, 1e-4) >= (max(every) + 1e-4) * 0.999


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.floats(0.001, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_more_losses_never_lower_the_p_value(n, alpha, share, rest):
    gains = int(share * n)
    losses = int(rest * (n - gains))
    found = [paired.p_value(lost, gains, n, alpha, 1e-3) for lost in (losses, min(losses + 1, n - gains))]
    assert 0 < found[0] <= found[1] + 1e-9 <= 1 + 1e-9
    assert found[0] == 1 or losses - gains < n * alpha


def test_the_wealth_written_out():
    drops, alpha, bet = [1, 0, -1, 0, 0, -1, 1], 0.1, 0.7
    wealth, most = 1.0, 1.0
    for d in drops:
        wealth *= 1 + bet * (alpha - d)
        most = max(most, wealth)
    assert betting(torch.tensor(drops), alpha, bet) == pytest.approx(1 / most)
    assert betting(torch.tensor([1.0]), alpha, bet) == 1.0


def test_no_rows_or_no_room_show_nothing():
    for test in (PlannedTest(None, 0.0), PlannedTest(0.5, 0.0)):
        assert test.p_value(torch.zeros(0), 0.1) == 1
        assert test.p_value(torch.zeros(100), 0.0) == 1
    with pytest.raises(ValueError):
        log_binomial_tail(torch.tensor(1), 5, 1.5)
    assert log_binomial_tail(torch.tensor([-1, 0, 5]), 5, 1.0).exp().tolist() == [0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.floats(0.001, 0.5), st.floats(0, 0.2), st.floats(0, 0.2), st.booleans())
def test_no_bet_can_lose_more_than_there_is(n, alpha, worse, better, binary):
    g = torch.Generator().manual_seed(n)
    test = planned(ternary(200, worse, better, g), n, alpha, 0.05, binary=binary)
    assert (test.bet is None) == binary
    assert binary or 0 <= test.bet * (1 - alpha) <= 1
    assert test.expected <= 0
    for d in (torch.ones(5), -torch.ones(5), torch.zeros(5)):
        assert 0 < test.p_value(d.double(), alpha) <= 1


def ternary(n, worse, better, g, draws=None):
    u = torch.rand(*(() if draws is None else (draws,)), n, generator=g)
    return (u < worse).double() - (u > 1 - better).double()


@pytest.mark.parametrize(("worse", "better"), [(0.03, 0.0), (0.05, 0.02), (0.3, 0.27), (None, None)])
@pytest.mark.parametrize("level", [0.05, nightly(0.2)])
def test_p_values_are_valid_at_the_border(worse, better, level):
    """The mean drop is alpha: at most `level` of the p-values are that small, whatever the other rows plan."""
    n, alpha, draws = 300, 0.03, 500
    g = torch.Generator().manual_seed(1)
    if worse is None:  # losses in [0, 1] of mean alpha
        sample = lambda *size: torch.rand(*size, generator=g).double() ** (1 / alpha - 1)  # noqa: E731
        tested, others = sample(draws, n), sample(draws, 100)
    else:
        tested, others = ternary(n, worse, better, g, draws), ternary(100, worse, better, g, draws)
    wrong = 0
    for d, o in zip(tested, others, strict=True):
        wrong += planned(o, n, alpha, level, binary=worse is not None).p_value(d, alpha) <= level
    assert wrong / draws <= level + 3 * math.sqrt(level * (1 - level) / draws)


def test_gains_count():
    """Share of draws that show a drop of at most 2%, at level 5%, where 2% are worse and 1.5% better."""
    g = torch.Generator().manual_seed(0)
    shown = [0, 0]
    for _ in range(100):
        other, rows = ternary(1000, 0.02, 0.015, g), ternary(2000, 0.02, 0.015, g)
        for k, binary in enumerate((True, False)):
            shown[k] += planned(other, 2000, 0.02, 0.05, binary=binary).p_value(rows, 0.02) <= 0.05
    assert shown[0] > 92  # with the normal distribution, 97% are expected
    assert shown[0] > shown[1] > 80  # betting, which may stop at any row, shows fewer


def run(p, levels):
    asked = []

    def value(i):
        asked.append(i)
        return p[i]

    return fallback(value, len(p), levels), asked


def test_one_start_is_fixed_sequence_testing():
    assert run([0.01, 0.04, 0.2, 0.001], {0: 0.05}) == ([(0, 0.05), (1, 0.05)], [0, 1, 2])


def test_later_starts_have_their_own_level_and_inherit():
    rejected, asked = run([0.01, 0.9, 0.01, 0.019, 0.05], {0: 0.04, 2: 0.02})
    assert rejected == [(0, 0.04), (2, 0.02), (3, 0.02)]
    assert asked == [0, 1, 2, 3, 4]
    rejected, _ = run([0.01, 0.01, 0.055], {0: 0.04, 2: 0.02})
    assert rejected == [(0, 0.04), (1, 0.04), (2, pytest.approx(0.06))]


@pytest.mark.parametrize("dependence", ["equal", "independent", "opposite"])
def test_family_wise_error_of_the_fallback(dependence):
    """True nulls between false ones: the chance of any false rejection stays below the sum of the levels."""
    g = torch.Generator().manual_seed(0)
    draws, m, levels = 4000, 8, {0: 0.06, 2: 0.02, 4: 0.02}
    u = torch.rand(draws, m, generator=g)
    if dependence == "equal":
        u = u[:, :1].expand(draws, m)
    if dependence == "opposite":
        u = torch.stack([u[:, 0] if i % 2 else 1 - u[:, 0] for i in range(m)], 1)
    null = [False, True, False, True, True, False, True, True]
    p = torch.where(torch.tensor(null), u, u * 0.01).tolist()
    errors = sum(any(null[i] for i, _ in run(row, levels)[0]) for row in p)
    assert errors / draws <= 0.1 + 4 * math.sqrt(0.09 / draws)
