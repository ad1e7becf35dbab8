"""Interleaved timing: order, repeats, ratios round by round, and rounds that other processes disturbed."""

from __future__ import annotations

import os
import time

import pytest

from eecompile import measuring
from eecompile.measuring import Bystanders, Rounds, rounds_of, summary


class Clock:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float):
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", made.perf_counter)
    return made


def test_in_turns_and_as_often_as_it_takes(clock):
    calls = {"a": clock.takes("a", 0.25), "b": clock.takes("b", 1.0)}
    found = rounds_of(calls, 3, min_seconds=1.0, warm_up=0)
    assert found.times == {"a": [0.25] * 3, "b": [1.0] * 3}
    # once each to see how long it takes, then a quarter of a second four times against a second once, to and fro
    assert "".join(clock.calls) == "ab" + "aaaab" + "baaaa" + "aaaab"
    assert found.ratio("b", "a") == (4.0, 0.0)


def test_the_wait_is_inside_the_clock(clock):
    late = clock.takes("wait", 0.5)
    found = rounds_of({"a": clock.takes("a", 1.0)}, 1, warm_up=0, wait=late)
    assert found.times == {"a": [1.5]}


def test_ratios_pair_the_rounds():
    """A machine that slows down threefold half way changes no ratio."""
    found = Rounds({"a": [1.0, 1.0, 3.0, 3.0, 3.0], "b": [2.0, 2.0, 6.0, 6.0, 6.0]})
    assert found.ratio("a", "b") == (0.5, 0.0)
    assert found.median("a") == 3.0
    median, spread = summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert (median, spread) == (4.0, 2.0)


def test_disturbed_rounds_are_measured_again(clock, monkeypatch):
    shares = iter([0.0, 0.5, 0.01, 0.5, 0.02])
    monkeypatch.setattr(
        measuring, "Bystanders", lambda: type("B", (), {"start": lambda s: None, "share": lambda s: next(shares)})()
    )
    found = rounds_of({"a": clock.takes("a", 1.0)}, 3, quiet_below=0.05)
    assert found.others == [0.0, 0.01, 0.02]
    assert found.redone == 2
    assert found.times == {"a": [1.0] * 3}


def test_rounds_end_with_the_time_but_not_before_there_are_quartiles(clock):
    assert len(rounds_of({"a": clock.takes("a", 1.0)}, 9, warm_up=1, seconds=8.5).others) == 7
    assert len(rounds_of({"a": clock.takes("a", 1.0)}, 9, warm_up=1, seconds=0.5).others) == measuring.LEAST


def test_a_machine_that_is_never_quiet_ends_too(clock, monkeypatch):
    monkeypatch.setattr(measuring, "Bystanders", lambda: type("B", (), {"start": lambda s: None, "share": lambda s: 0.9})())
    found = rounds_of({"a": clock.takes("a", 1.0)}, 2, quiet_below=0.05)
    assert (found.others, found.redone) == ([0.9, 0.9], 2 * measuring.REDO)
    found = rounds_of({"a": clock.takes("a", 1.0)}, 2, quiet_below=0.05, seconds=7.5)
    assert (found.others, found.redone) == ([0.9, 0.9], 2), "the two that are missing still fit"
    assert clock.now < 20


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux")
def test_own_work_is_not_counted_as_others():
    seen = Bystanders()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    mine = 0.3 / (os.cpu_count() or 1)
    share = seen.share()
    assert share is not None
    assert share <= 1.0 - 0.5 * mine
