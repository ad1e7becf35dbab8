"""What `calibrate` may be asked for, and how it splits its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eecompile.calibration.risk import rows_needed
from eecompile.errors import CalibrationError, check_name
from eecompile.plain import arguments, check_callable, check_number
from eecompile.training.full import skips
from eecompile.training.scores import Metric
from eecompile.training.tasks import ANSWERS, no_choice

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

TARGETS = ("accuracy", "agreement")
CLASSES = "classes"
FIRST_START = 0.85
LATER_STARTS = (0.25, 0.5, 0.75)
MOST_SEARCH_ROWS = 10_000
LEAST_SEARCH_ROWS = 30


@dataclass(frozen=True)
class Options:
    """Keyword arguments of `calibrate`.

    Attributes:
        max_drop: Largest drop, in [0, 1): 0.01 is one percent point of accuracy.
        delta: Largest probability, over the draw of the calibration data, that the drop is larger after all,
            in (0, 1). None: no guarantee, the cheapest settings whose drop on this data is at most `max_drop`.
        target: "accuracy" (against the labels) or "agreement" (with the full model; needs no labels).
        temperature: Whether temperatures are fitted. Exits with a patience, a learned or a routed criterion keep 1.
        metric: `(prediction, labels) -> [B]` in [0, 1], higher is better, for a task that is not classification.
        keep_open: Whether every exit stays open (threshold at most 1), so that a call may be stopped there. None: what
            the strategy asks for, and always where exits answer together, since closing one would change the others.
        seed: Of the random split of the rows.
        conditional: Whether the bound is to hold among the rows that leave at or before each exit too (Ringel et al. 2024).
        groups: A label for each row of the loader, in order, or a callable `(inputs, labels) -> [B]`; "classes" for the
            class labels. The drop of each group is reported.
        control_groups: Whether the bound is to hold in each group too.
        static: A smaller model to compare with, and its cost as a fraction of the full model's: `(model, 0.4)`.
    """

    max_drop: float = 0.01
    delta: float | None = 0.05
    target: str = "accuracy"
    temperature: bool = True
    metric: Metric | None = None
    keep_open: bool | None = None
    seed: int = 0
    conditional: bool = False
    groups: Any = None
    control_groups: bool = False
    static: tuple[Callable[..., Any], float] | None = None

    @classmethod
    def of(cls, fast: CompiledModule, given: Mapping[str, Any]) -> Options:
        """Keyword arguments for this module, checked.

        Raises:
            CalibrationError: An unknown name, a value out of range, or a target that does not fit the task.
        """
        found = cls(**arguments("calibrate", cls, given, CalibrationError))
        found.check(fast)
        return found

    @property
    def score(self) -> str:
        """What is compared: "accuracy", "agreement" or "metric"."""
        return self.target if self.metric is None else "metric"

    @property
    def rows_needed(self) -> int | None:
        """Calibration rows with which something could qualify: enough to test on, and some to search on."""
        least = None if self.delta is None else rows_needed(self.max_drop, FIRST_START * self.delta)
        return None if least is None else least + LEAST_SEARCH_ROWS

    def check(self, fast: CompiledModule) -> None:
        """Raises `CalibrationError` where a value is out of range or the target does not fit the task."""
        if not fast.exits and not skips(fast):
            raise CalibrationError(
                "there are no exits, gates, branches or halting thresholds to calibrate",
                hint="compile with a strategy that inserts exits or gates, or that halts",
            )
        check_number("max_drop", self.max_drop, least=0, below=1, error=CalibrationError)
        if self.delta is not None:
            check_number("delta", self.delta, above=0, below=1, error=CalibrationError)
        check_number("seed", self.seed, whole=True, error=CalibrationError)
        check_name("target", self.target, TARGETS, CalibrationError)
        if self.metric is not None and self.target == "agreement":
            raise CalibrationError(
                "agreement is for classification", got="metric= and target='agreement'", hint="leave out target"
            )
        if self.control_groups and self.groups is None:
            raise CalibrationError(
                "there are no groups to control", got="control_groups=True", wanted='groups=, or "classes"'
            )
        if isinstance(self.groups, str) and self.groups != CLASSES:
            raise CalibrationError("unknown groups", got=repr(self.groups), wanted='a column, a callable, or "classes"')
        check_callable("metric", self.metric, "(prediction, labels) -> [B] in [0, 1]", CalibrationError)
        given: Any = self.static
        if given is not None:
            if not (isinstance(given, tuple) and len(given) == 2 and callable(given[0])):
                raise CalibrationError("static= is a model and its cost", got=type(given).__name__, wanted="(model, 0.4)")
            check_number("the cost in static=", given[1], above=0, error=CalibrationError)
        other = no_choice(fast) if self.target == "agreement" else ""
        if other:
            raise CalibrationError(
                "agreement compares the classes that predictions choose, and these choose none",
                got=other,
                wanted="one class of several for each row, or a yes or no to each score",
                hint=f'fast.task = "{ANSWERS}" where a score above 0 is a yes; else give the full model\'s answers as '
                "labels, [(x, fast.full(x))], and metric=lambda z, y: ... that compares them",
            )

    def stays_open(self, fast: CompiledModule) -> bool:
        """Whether calibration leaves every exit open.

        Raises:
            CalibrationError: Exits answer together, and `keep_open` is False.
        """
        together = combination_of(fast) != "last"
        if self.keep_open is None:
            return together or bool(getattr(getattr(fast, "strategy", None), "keep_open", False))
        if together and not self.keep_open:
            raise CalibrationError(
                "exits that answer together stay open: closing one would change what the others say",
                got=f"combine={combination_of(fast)!r}, keep_open=False",
                hint="leave out keep_open",
            )
        return self.keep_open


def combination_of(fast: CompiledModule) -> str:
    """How the exits answer: "last", "ensemble", "confident" or "weighted"."""
    return str(getattr(fast.exits[0], "combine", "last")) if fast.exits else "last"


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
