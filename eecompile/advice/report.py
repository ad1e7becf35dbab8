"""What `advise` found: a table, and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.training.report import Report, json_safe, percent, stacked, table

CASCADE = "cascade"
WORTH = 0.97  # share of the model's time below which something is faster


@dataclass
class Option:
    """One way to run the model.

    Attributes:
        name: A strategy, "one exit for all rows", or a rival's name.
        kind: "strategy", "constant" or "rival".
        max_drop: Most that thresholds may lose; None where there is nothing to choose.
        cost: Fraction of the model's FLOPs, with an interval of 90%.
        drop: Mean score lost on the validation rows.
        time: Measured time over the model's, with half the interquartile range of the rounds.
        exits: Names of the exits that are open.
    """

    name: str
    kind: str
    max_drop: float | None
    cost: float
    low: float
    high: float
    drop: float
    time: float | None = None
    spread: float = 0.0
    exits: tuple[str, ...] = ()


@dataclass
class Advice(Report):
    """What early exit is likely to give, compared with the alternatives.

    Attributes:
        pays: Whether early exit is likely to pay here.
        strategy: The one to take; None where it does not pay.
        max_drop: What it is projected to lose at most.
        why: The reasons, in sentences.
        options: Everything that was measured.
        skipped: Strategies and rivals that were not, with the reason.
        rows: Rows that heads were fitted on, and rows that thresholds were chosen on.
        batch: Rows of the batches that were timed.
        accuracy: Of the model on the rows that thresholds were chosen on.
        seconds: What advice took.
        by_name: Whether inputs are keyword arguments.
        model, data: As the command line has them.
    """

    title: ClassVar[str] = "advice"

    pays: bool
    strategy: str | None
    max_drop: float
    why: list[str]
    options: list[Option]
    skipped: dict[str, str]
    rows: tuple[int, int]
    batch: int
    accuracy: float
    seconds: float
    by_name: bool = False
    notes: list[str] = field(default_factory=list)
    model: str = "MODEL"
    data: str = "DATA"

    @property
    def commands(self) -> list[str]:
        """What to type; nothing where early exit does not pay."""
        if self.strategy is None:
            return []
        models = f"SMALL {self.model}" if self.strategy == CASCADE else self.model
        fit = [] if self.strategy == CASCADE else ["eecompile fit fast --data TRAIN --heads-only"]
        return [
            f"eecompile rewrite {models} -o fast --strategy {self.strategy} --data {self.data}",
            *fit,
            f"eecompile calibrate fast --data VAL --max-drop {self.max_drop:g}",
        ]

    @property
    def python(self) -> list[str]:
        """The same as Python."""
        if self.strategy is None:
            return []
        models = '{"small": small, "large": model}' if self.strategy == CASCADE else "model"
        example = "example_kwargs=batch" if self.by_name else "example_inputs=(x,)"
        return [
            f'fast = eecompile({models}, "{self.strategy}", {example})',
            *([] if self.strategy == CASCADE else ["fast.fit(train, trunk=False)"]),
            f"fast.calibrate(val, max_drop={self.max_drop:g})",
        ]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json_safe({**asdict(self), "commands": self.commands, "python": self.python})
        return found

    def __rich__(self) -> RenderableType:
        verdict = "Early exit is likely to pay here." if self.pays else "Early exit does not pay here."
        rows = [
            [
                o.name,
                "-" if o.max_drop is None else percent(o.max_drop, 0),
                percent(o.cost, 1),
                "-" if o.low == o.high else f"{percent(o.low, 1)} to {percent(o.high, 1)}",
                percent(o.drop),
                "-" if o.time is None else f"{o.time:.2f}x ± {o.spread:.2f}",
            ]
            for o in self.options
        ]
        heads = ["what", "may lose", "cost", "interval of 90%", "loses", "time"]
        right = f"on {self.rows[1]} rows, of which the model gets {percent(self.accuracy, 1)} right"
        shown = table(f"{right}; time of batches of {self.batch}", heads, rows)
        lines = [f"not tried: {name}: {reason}" for name, reason in self.skipped.items()]
        return stacked(verdict, *self.why, shown, *lines, *self.notes)


def decide(options: list[Option], drops: tuple[float, ...]) -> tuple[Option | None, float, list[str]]:
    """The strategy to take, the drop that it may lose, and why; no strategy where none pays."""
    strategies = [o for o in options if o.kind == "strategy" and o.time is not None]
    if not strategies:
        return None, drops[0], ["No strategy could be measured."]
    for most in drops:
        mine = [o for o in strategies if o.max_drop == most]
        best = min(mine, key=lambda o: o.time or 0.0, default=None)
        if best is None or best.exits == () or best.time is None or best.time + best.spread >= WORTH:
            continue
        if not _simpler(best, options):
            return best, most, [_said(best), *_quicker(best, options)]
    return None, drops[0], _why_not(strategies, options, drops)


def _said(o: Option) -> str:
    return (
        f"{o.name} is projected to cost {percent(o.cost, 1)} of the model's FLOPs for a loss of at most "
        f"{percent(o.max_drop, 0)}, and took {o.time or 0:.2f}x the model's time."
    )


def _simpler(best: Option, options: list[Option]) -> list[Option]:
    """What decides nothing for each row, loses no more than allowed, and is as quick or as cheap."""
    assert best.max_drop is not None and best.time is not None
    alike = [o for o in options if o.kind == "constant" and o.max_drop == best.max_drop and o.drop <= best.max_drop]
    alike += [o for o in options if o.name == "smaller model" and o.drop <= best.max_drop]
    return [o for o in alike if o.cost <= best.low or (o.time is not None and o.time <= best.time - best.spread)]


def _quicker(best: Option, options: list[Option]) -> list[str]:
    """Rivals that take less time and lose no more."""
    assert best.max_drop is not None and best.time is not None
    quicker = [o for o in options if o.kind == "rival" and o.time is not None and o.time < best.time]
    return [
        f"{o.name} alone takes {o.time:.2f}x the time and loses {percent(o.drop)}: compare before you train."
        for o in quicker
        if o.drop <= best.max_drop
    ]


def _why_not(strategies: list[Option], options: list[Option], drops: tuple[float, ...]) -> list[str]:
    said = []
    for most in drops:
        best = min((o for o in strategies if o.max_drop == most), key=lambda o: o.time or 0.0)
        simpler = _simpler(best, options)
        if not best.exits or best.cost > WORTH:
            said.append(
                f"At a loss of {percent(most, 0)} hardly a row may exit early: the best costs {percent(best.cost, 1)}."
            )
        elif best.time is not None and best.time + best.spread >= WORTH:
            said.append(
                f"At a loss of {percent(most, 0)} {best.name} saves FLOPs (it costs {percent(best.cost, 1)}) but no time "
                f"({best.time:.2f}x ± {best.spread:.2f}): heads and decisions take what they save at this batch size."
            )
        elif simpler:
            names = " and ".join(f"{o.name} ({percent(o.cost, 1)} of the cost, loses {percent(o.drop)})" for o in simpler)
            said.append(
                f"At a loss of {percent(most, 0)} {names} does as well as {best.name} ({percent(best.cost, 1)}), without a "
                "decision for each row."
            )
    return said
