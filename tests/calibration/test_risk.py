"""p-values against sums written out, exact fractions and simulation; the fallback procedure."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eecompile.calibration.risk import (
    exact_binomial,
    fallback,
    hoeffding_bentkus,
    log_binomial_tail,
    p_values,
    rows_needed,
)


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
    assert float(exact_binomial(torch.tensor(0.0), 298, 0.01)) > 0.05
    assert float(exact_binomial(torch.tensor(0.0), 299, 0.01)) == pytest.approx(0.99**299, rel=1e-12)
    assert rows_needed(0.01, 0.05) == 299
    assert rows_needed(0.05, 0.05) == 59
    assert rows_needed(0.0, 0.05) is None
    # P(Bin(100000, 0.01) <= 900), from scipy 1.17: binom.cdf(900, 100000, 0.01)
    assert float(exact_binomial(torch.tensor(900.0), 100_000, 0.01)) == pytest.approx(SCIPY_900, rel=1e-8)


SCIPY_900 = 0.0006608413334501454


def test_hoeffding_bentkus_against_the_formula():
    n, alpha = 200, 0.1
    total = torch.tensor([0.0, 3.5, 10.0, 19.9, 20.0, 50.0])
    for s, found in zip(total.tolist(), hoeffding_bentkus(total, n, alpha).tolist(), strict=True):
        m = min(s / n, alpha)
        h = (m * math.log(m / alpha) if m else 0.0) + (1 - m) * math.log((1 - m) / (1 - alpha))
        wanted = min(math.exp(-n * h), math.e * tail(math.ceil(s), n, Fraction(1, 10)), 1.0)
        assert found == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.floats(0.001, 0.5), st.booleans())
def test_p_values_grow_with_the_loss_and_fall_with_alpha(n, alpha, binary):
    total = torch.arange(0, n + 1, max(1, n // 50)).double()
    p = p_values(total, n, alpha, binary=binary)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p.diff() >= -1e-12).all()
    assert (p_values(total, n, min(0.9, alpha * 1.5), binary=binary) <= p + 1e-12).all()


def test_no_rows_or_no_room_show_nothing():
    assert float(p_values(torch.tensor(0.0), 0, 0.1, binary=True)) == 1
    assert float(p_values(torch.tensor(0.0), 100, 0.0, binary=True)) == 1
    with pytest.raises(ValueError):
        log_binomial_tail(torch.tensor(1), 5, 1.5)
    assert log_binomial_tail(torch.tensor([-1, 0, 5]), 5, 1.0).exp().tolist() == [0, 0, 1]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_p_values_are_super_uniform_at_the_border(binary, level):
    n, alpha, draws = 400, 0.03, 20_000
    g = torch.Generator().manual_seed(1)
    if binary:
        total = (torch.rand(draws, n, generator=g) < alpha).sum(1).double()
    else:  # mean alpha, values in [0, 1]
        total = (torch.rand(draws, n, generator=g).double() ** (1 / alpha - 1)).sum(1)
    wrong = float((p_values(total, n, alpha, binary=binary) <= level).double().mean())
    assert wrong <= level + 4 * math.sqrt(level * (1 - level) / draws)
    if binary:  # and no weaker than a discrete test has to be
        assert wrong >= level / 3


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
