"""Predicted stage times: quantiles, numbers of rows never seen, pieces never measured, and forgetting."""

from __future__ import annotations

import pytest

from eecompile.runtime.timing import FORGET_AFTER, MARGIN_FEW, MARGIN_RATE, RECENT, SLOWEST, WINDOW, StageTimes


def times() -> StageTimes:
    return StageTimes(lambda piece: 10.0 * (piece[1] - piece[0]))


def test_a_prediction_is_exceeded_by_few():
    t = times()
    for i in range(WINDOW):
        t.add((-1, 0), 8, 1.0 + (i * 97 % WINDOW) / WINDOW)  # in no order: nothing drifts
    high = t.predict((-1, 0), 8)
    assert 1.0 + (WINDOW - 4) / WINDOW <= high / t.drift < 1.0 + (WINDOW - 1) / WINDOW  # two of 256 may be anything
    t.add((-1, 0), 8, 50.0)
    assert t.predict((-1, 0), 8) / t.drift < 2.0


def test_a_machine_that_has_just_become_slow_is_believed_at_once():
    """The quantile of 256 measurements knows nothing yet: the last ones, of whatever piece, count."""
    t = times()
    for _ in range(60):
        for piece in ((-1, 0), (0, 1), (1, 2)):
            t.add(piece, 8, 1.0)
    assert t.predict((1, 2), 8) == 1.0
    for _ in range(RECENT):
        t.add((-1, 0), 8, 2.5)
    assert t.drift == 2.5
    assert t.predict((1, 2), 8) == 2.5
    for _ in range(2 * WINDOW):  # it has become usual: the quantile knows
        for piece in ((-1, 0), (0, 1), (1, 2)):
            t.add(piece, 8, 2.5)
    assert t.drift == 1.0
    assert t.predict((1, 2), 8) == 2.5
    for _ in range(RECENT):
        t.add((0, 1), 8, 1e3)
    assert t.drift == SLOWEST
    for _ in range(RECENT):
        t.add((0, 1), 8, 0.1)
    assert t.drift == 1.0, "a quick spell shortens nothing"


def test_few_measurements_get_a_margin():
    t = times()
    t.add((-1, 0), 8, 1.0)
    assert t.predict((-1, 0), 8) == pytest.approx(MARGIN_FEW)


def test_other_numbers_of_rows():
    t = times()
    for _ in range(5):
        t.add((0, 1), 4, 1.0)
        t.add((0, 1), 16, 3.0)
    assert t.predict((0, 1), 4) == 1.0
    assert t.predict((0, 1), 8) == pytest.approx(1.0 + 2.0 * 4 / 12)
    assert t.predict((0, 1), 1) == 1.0  # never less than measured
    assert t.predict((0, 1), 64) == pytest.approx(12.0)  # at worst in proportion


def test_a_piece_that_was_never_run_is_judged_by_its_work():
    t = times()
    assert t.predict((0, 1), 4) == 0.0
    t.add((-1, 0), 4, 1.0)
    assert t.predict((0, 2), 4) == pytest.approx(2 * MARGIN_RATE)
    assert t.predict((0, 2), 8) == pytest.approx(4 * MARGIN_RATE)


def test_refused_long_enough_a_piece_is_judged_anew():
    t = times()
    for _ in range(5):
        t.add((-1, 0), 4, 1.0)
        t.add((0, 1), 4, 100.0)
    for _ in range(FORGET_AFTER - 1):
        t.refused((0, 1))
    assert t.predict((0, 1), 4) == 100.0
    t.refused((0, 1))
    assert t.predict((0, 1), 4) == pytest.approx(MARGIN_RATE)


def test_what_was_measured_is_listed():
    t = times()
    for seconds in (1.0, 2.0, 3.0):
        t.add((-1, 0), 8, seconds)
    assert t.to_dict() == [{"from": -1, "to": 0, "rows": 8, "count": 3, "median_ms": 2e3, "predicted_ms": 3e3}]
    t.forget()
    assert t.to_dict() == []
