"""Temperatures: the optimum of the likelihood, bounds on separable and useless data, masked classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eecompile.calibration.temperature import HIGHEST, LOWEST, fit_temperature, negative_log_likelihood


def drawn(n, c, seed=0):
    """Logits and labels drawn from their own softmax: the honest temperature is 1."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, c, generator=g)
    return z, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_recovers_the_temperature_that_made_the_labels(true):
    z, y = drawn(20_000, 4)
    assert fit_temperature(z * true, y) == pytest.approx(true, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 10**6), st.floats(0.1, 30))
def test_no_temperature_on_a_grid_is_better(n, c, seed, scale):
    g = torch.Generator().manual_seed(seed)
    z, y = scale * torch.randn(n, c, generator=g), torch.randint(0, c, (n,), generator=g)
    t = fit_temperature(z, y)
    assert LOWEST <= t <= HIGHEST
    grid = [LOWEST * (HIGHEST / LOWEST) ** (i / 60) for i in range(61)]
    best = min(negative_log_likelihood(z, y, x) for x in grid)
    assert negative_log_likelihood(z, y, t) <= best + 1e-9


def test_bounds_on_separable_and_on_useless_scores():
    y = torch.arange(30) % 3
    right = torch.nn.functional.one_hot(y, 3).float() * 5
    assert fit_temperature(right, y) == LOWEST
    assert fit_temperature(right, (y + 1) % 3) == HIGHEST
    assert fit_temperature(torch.zeros(30, 3), y) == 1.0
    assert fit_temperature(torch.zeros(0, 3), y[:0]) == 1.0
    assert fit_temperature(right * 1e30, y) == 1.0  # saturated: no temperature within the bounds changes anything


def test_masked_classes_and_labels_that_are_left_out():
    z, y = drawn(4000, 4)
    wanted = fit_temperature(z * 2, y)
    wide = torch.cat([z * 2, torch.full((4000, 1), -math.inf)], 1)
    assert fit_temperature(wide, y) == pytest.approx(wanted, rel=1e-8)
    more = torch.cat([wide, torch.randn(50, 5)])
    assert fit_temperature(more, torch.cat([y, torch.full((50,), -100)])) == pytest.approx(wanted, rel=1e-8)
    masked = torch.cat([y, torch.full((50,), 4)])
    assert fit_temperature(torch.cat([wide, wide[:50]]), masked) == pytest.approx(wanted, rel=1e-8)
    assert negative_log_likelihood(z, torch.full((4000,), -100)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    z, y = drawn(2000, 4)
    assert fit_temperature((z * 2).to(dtype), y) == pytest.approx(fit_temperature(z * 2, y), rel=0.01)
