"""The promises by simulation, and their cost against the exact binomial test alone; `simulate.py` prints the whole table."""

from __future__ import annotations

import math

import pytest

from tests.calibration.simulate import DELTA, OPTIONS, SHAPES, simulated
from tests.support import nightly

LONG = [pytest.mark.nightly, pytest.mark.last]


@pytest.mark.parametrize(
    ("shape", "promise", "draws"),
    [
        ("plain, 300 rows", "marginal", 12),
        nightly("gains nearly equal to losses", "conditional", 6),
        *(pytest.param(shape, promise, 200, marks=LONG) for shape in SHAPES for promise in OPTIONS),
    ],
)
def test_promises_hold_and_cost_no_more(shape, promise, draws):
    found = simulated(shape, draws, promise)
    assert found["new"]["violations"] <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws), found
    if promise == "marginal":
        assert found["cost_ratio"] <= 1.03, found
