"""What `calibrate` may be asked for, and how it splits its rows."""

from __future__ import annotations

from eecompile.calibration.collect import combination_of
from eecompile.calibration.risk import rows_needed
from eecompile.errors import CalibrationError, near
from eecompile.training.full import skips
from eecompile.training.protocol import Compiled
from eecompile.training.scores import Metric

TARGETS = ("accuracy", "agreement")
FIRST_START = 0.85
LATER_STARTS = (0.25, 0.5, 0.75)
MOST_SEARCH_ROWS = 10_000
LEAST_SEARCH_ROWS = 30


def check_options(fast: Compiled, max_drop: float, delta: float | None, target: str, metric: Metric | None) -> None:
    if not fast.exits and not skips(fast):
        raise CalibrationError(
            "there are no exits, gates, branches or halting thresholds to calibrate",
            hint="compile with a strategy that inserts exits or gates, or that halts",
        )
    if not (0 <= max_drop < 1):
        raise CalibrationError("max_drop is out of range", got=max_drop, wanted="0 <= max_drop < 1, 0.01 for 1%")
    if delta is not None and not (0 < delta < 1):
        raise CalibrationError("delta is out of range", got=delta, wanted="0 < delta < 1, or None for no guarantee")
    if target not in TARGETS:
        raise CalibrationError("unknown target", got=repr(target), wanted=near(str(target), TARGETS))
    if metric is not None and target == "agreement":
        raise CalibrationError(
            "agreement is for classification", got="metric= and target='agreement'", hint="leave out target"
        )
    other = _no_classes(fast) if target == "agreement" else ""
    if other:
        raise CalibrationError(
            "agreement compares the class of the largest score, which is not what this model is for",
            got=other,
            wanted="one class of several for each row",
            hint="give the full model's answers as labels, [(x, fast.full(x))], and metric=lambda z, y: ... that compares "
            "them, for several labels ((z > 0) == (y > 0)).all(-1).double()",
        )


def _no_classes(fast: Compiled) -> str:
    """Why the largest score is no answer; empty where it is."""
    if getattr(fast, "trained_by_loss", False):
        return "a program that was trained with loss="
    program = getattr(fast, "program", None)
    if program is None or program.prediction is None:
        return ""
    return "one score for each row" if program.signature.outputs[program.prediction].shape[-1] == 1 else ""


def stays_open(fast: Compiled, keep_open: bool | None) -> bool:
    """Whether calibration leaves every exit open.

    Raises:
        CalibrationError: Exits answer together, and `keep_open` is False.
    """
    together = combination_of(fast) != "last"
    if keep_open is None:
        return together or bool(getattr(getattr(fast, "strategy", None), "keep_open", False))
    if together and not keep_open:
        raise CalibrationError(
            "exits that answer together stay open: closing one would change what the others say",
            got=f"combine={combination_of(fast)!r}, keep_open=False",
            hint="leave out keep_open",
        )
    return keep_open


def split_sizes(n: int, max_drop: float, delta: float | None) -> tuple[int, int]:
    """Rows to search on and rows to test on.

    A third and two thirds; the test takes more where it would otherwise be too small to show anything.
    """
    if delta is None:
        return n, 0
    search = min(max(1, n // 3), MOST_SEARCH_ROWS)
    least = rows_needed(max_drop, FIRST_START * delta)
    if least is not None and n - search < least and n - least >= LEAST_SEARCH_ROWS:
        search = n - least
    return search, n - search


def starts(count: int, delta: float) -> dict[int, float]:
    """Levels at which a path of so many hypotheses is entered, by index; they add up to delta."""
    levels = {0: FIRST_START * delta}
    for share in LATER_STARTS:
        at = int(share * count)
        levels[at] = levels.get(at, 0.0) + (1 - FIRST_START) / len(LATER_STARTS) * delta
    return levels
