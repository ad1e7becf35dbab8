"""How long the work between two exits takes on this machine: measured while it runs, and predicted from that.

A prediction is a high quantile of the last measurements at about as many rows, times the present drift. Where there are
none yet, those at other numbers of rows are interpolated; where there are none at all, the rate (seconds per FLOP) of what
has been measured stands in, with a margin. A piece that is refused time and again is never measured again, so after many
refusals its old measurements are forgotten: a machine that was busy an hour ago may be idle now.

The drift is how much slower the last few pieces, whichever, were than their usual selves. It follows a machine that has just
become busy within a call or two, long before the quantiles do; it never shortens a prediction.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW = 256
LEVEL = 0.99
RECENT = 16  # measurements that the drift is the median of
SLOWEST = 4.0  # drift; a machine that is slower still is out of order
FEW = 3  # fewer measurements than this are not trusted without a margin
MARGIN_FEW = 1.25
MARGIN_RATE = 1.5
FORGET_AFTER = 100  # refusals in a row
STEPS_PER_OCTAVE = 4  # numbers of rows within 19% of one another share their measurements

Piece = tuple[int, int]
"""Work from one exit (-1: the input) up to another (the number of exits: the model's own end)."""
END: Piece = (-2, -2)
"""What comes after the last piece: putting the output together, until the caller has it."""


class StageTimes:
    """Measured times of the pieces of one program, by number of rows. Safe to use from several threads.

    Args:
        work: FLOPs of one row of a piece, for pieces that were never measured.
        clock: Seconds; only differences count.
    """

    def __init__(self, work: Callable[[Piece], float], clock: Callable[[], float] = time.perf_counter) -> None:
        self.work, self.clock = work, clock
        self.changes = 0  # goes up with every measurement
        self._seen: dict[Piece, dict[int, deque[float]]] = {}
        self._refused: dict[Piece, int] = {}
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def add(self, piece: Piece, rows: int, seconds: float) -> None:
        """One measurement."""
        with self._lock:
            found = self._seen.setdefault(piece, {}).setdefault(_bucket(rows), deque(maxlen=WINDOW))
            usual = _median(found) if len(found) >= FEW else 0.0
            if usual > 0:
                self._ratios.append(seconds / usual)
            found.append(seconds)
            self._refused[piece] = 0
            self.changes += 1

    def refused(self, piece: Piece) -> None:
        """A piece was not run because its prediction did not fit."""
        with self._lock:
            count = self._refused.get(piece, 0) + 1
            if count >= FORGET_AFTER:
                self._seen.pop(piece, None)
                count = 0
            self._refused[piece] = count

    def predict(self, piece: Piece, rows: int) -> float:
        """Seconds that a piece will hardly ever exceed; 0 where nothing was measured at all."""
        with self._lock:
            by_rows = self._seen.get(piece)
            return self._drift() * (self._from_rows(by_rows, rows) if by_rows else self._from_rate(piece, rows))

    @property
    def drift(self) -> float:
        """How many times as long as usual the last pieces took; at least 1."""
        with self._lock:
            return self._drift()

    def forget(self) -> None:
        """Everything that was measured: for another device, or another number of threads."""
        with self._lock:
            self.changes += 1
            self._seen.clear()
            self._refused.clear()
            self._ratios.clear()

    def to_dict(self) -> list[dict[str, float | int]]:
        """Per piece and number of rows: measurements, median and the prediction, in milliseconds."""
        with self._lock:
            return [
                {
                    "from": piece[0],
                    "to": piece[1],
                    "rows": round(_rows(bucket)),
                    "count": len(found),
                    "median_ms": 1e3 * _median(found),
                    "predicted_ms": 1e3 * _high(found),
                }
                for piece, by_rows in sorted(self._seen.items())
                for bucket, found in sorted(by_rows.items())
            ]

    def _drift(self) -> float:
        return min(max(_median(self._ratios), 1.0), SLOWEST) if len(self._ratios) == RECENT else 1.0

    def _from_rows(self, by_rows: dict[int, deque[float]], rows: int) -> float:
        wanted = _bucket(rows)
        if wanted in by_rows:
            return _high(by_rows[wanted])
        below = max((b for b in by_rows if b < wanted), default=None)
        above = min((b for b in by_rows if b > wanted), default=None)
        if below is None:
            assert above is not None
            return _high(by_rows[above])  # fewer rows take no longer
        low, low_rows = _high(by_rows[below]), _rows(below)
        if above is None:
            return low * rows / low_rows  # at worst in proportion
        high, high_rows = _high(by_rows[above]), _rows(above)
        share = min(max((rows - low_rows) / (high_rows - low_rows), 0.0), 1.0)
        return low + max(high - low, 0.0) * share

    def _from_rate(self, piece: Piece, rows: int) -> float:
        rates = [
            _median(found) / (self.work(known) * _rows(bucket))
            for known, by_rows in self._seen.items()
            for bucket, found in by_rows.items()
            if self.work(known) > 0
        ]
        return MARGIN_RATE * max(rates, default=0.0) * self.work(piece) * rows


def _bucket(rows: int) -> int:
    return round(STEPS_PER_OCTAVE * math.log2(max(rows, 1)))


def _rows(bucket: int) -> float:
    return float(2.0 ** (bucket / STEPS_PER_OCTAVE))


def _median(found: deque[float]) -> float:
    return sorted(found)[len(found) // 2]


def _high(found: deque[float]) -> float:
    """The quantile that a new measurement stays below with probability LEVEL (the largest, for few)."""
    values = sorted(found)
    at = min(math.ceil(LEVEL * (len(values) + 1)), len(values)) - 1
    return values[at] * (MARGIN_FEW if len(values) < FEW else 1.0)
