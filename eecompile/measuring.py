"""Timing of calls against one another: interleaved, in one run, with rounds that other processes disturbed repeated."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST = 4  # rounds, for quartiles
REDO = 3  # a round that was disturbed is measured again, up to this many times the rounds asked for


class Bystanders:
    """Share of the machine's processor time that went to other processes between `start` and `share` (Linux only)."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._before = (_busy(), _own(), time.perf_counter())

    def share(self) -> float | None:
        """In [0, 1], all processors together; None where it is unknown."""
        busy, own, then = self._before
        now = _busy()
        if busy is None or now is None:
            return None
        seconds = max(time.perf_counter() - then, 1e-9) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (now - busy - (_own() - own)) / seconds))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another process keeps one core busy meanwhile."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.kill()
        other.wait()


def _own() -> float:
    t = os.times()
    return t.user + t.system


def _busy() -> float | None:
    """Seconds that all processors together were not idle since the machine started; a hypervisor's share included."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(field) for field in stat.readline().split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@dataclass
class Rounds:
    """What was measured.

    Attributes:
        times: Seconds per call, one for each round, by name.
        others: Share of the machine that other processes took, one for each round; None where it is unknown.
        redone: Rounds that were thrown away because of others.
    """

    times: dict[str, list[float]]
    others: list[float | None] = field(default_factory=list)
    redone: int = 0

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, name: str, against: str) -> tuple[float, float]:
        """Median and spread of one's time over the other's, round by round, so that slow drift cancels."""
        return summary([a / b for a, b in zip(self.times[name], self.times[against], strict=True)])


def rounds_of(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 9,
    *,
    min_seconds: float = 0.02,
    warm_up: int = 2,
    wait: Callable[[], Any] | None = None,
    quiet_below: float | None = None,
    seconds: float | None = None,
) -> Rounds:
    """Seconds per call of each, measured in turn so that a change of the machine hits all alike.

    Args:
        rounds: At least 7 for a median worth reporting.
        min_seconds: Quick calls are repeated until a round of them lasts this long.
        wait: Called before the clock is read, for devices that run asynchronously (`torch.cuda.synchronize`).
        quiet_below: Rounds in which other processes took more than this share of the machine are measured again, up to
            `REDO` times as many as asked for; then they count after all.
        seconds: Time for it all. A round is measured again only where the rounds still missing fit as well, and once it has
            gone `LEAST` rounds do.
    """
    began = time.perf_counter()
    pause = wait if wait is not None else _nothing
    repeats = {}
    for name, call in calls.items():
        for _ in range(warm_up):
            call()
        pause()
        start = time.perf_counter()
        call()
        pause()
        once = time.perf_counter() - start
        repeats[name] = max(1, int(min_seconds / max(once, 1e-7)))
    kept = Rounds({name: [] for name in calls})
    names = list(calls)
    spare = REDO * rounds if quiet_below is not None else 0
    bystanders = Bystanders()
    i, left = 0, math.inf
    while (missing := rounds - len(kept.others)) and (left > 0 or len(kept.others) < LEAST):
        i += 1
        row, round_began = {}, time.perf_counter()
        bystanders.start()
        for name in names if i % 2 else reversed(names):
            call, n = calls[name], repeats[name]
            pause()
            start = time.perf_counter()
            for _ in range(n):
                call()
            pause()
            row[name] = (time.perf_counter() - start) / n
        share = bystanders.share()
        if seconds is not None:
            left = seconds - (time.perf_counter() - began)
        again = left > min(missing, LEAST) * (time.perf_counter() - round_began)
        if spare > 0 and again and quiet_below is not None and share is not None and share > quiet_below:
            spare -= 1
            kept.redone += 1
            continue
        kept.others.append(share)
        for name, value in row.items():
            kept.times[name].append(value)
    return kept


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 9, min_seconds: float = 0.02, warm_up: int = 2
) -> dict[str, list[float]]:
    """`rounds_of` for those who want the times only."""
    return rounds_of(calls, rounds, min_seconds=min_seconds, warm_up=warm_up).times


def summary(times: Sequence[float]) -> tuple[float, float]:
    """Median and half the interquartile range."""
    if len(times) < 4:
        return statistics.median(times), 0.0
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), (quarters[2] - quarters[0]) / 2


def _nothing() -> None:
    return None
