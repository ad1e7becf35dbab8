"""What a benchmark found: figures with their targets, merged into one JSON file, and shown as a table."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from eecompile.measuring import Rounds, summary

RESULTS = Path(__file__).parent / "results"
BUSY = 0.05  # share of the machine in other hands above which a figure is called disturbed


@dataclass(frozen=True)
class Target:
    """A figure is met where it is `at most` or `at least` this."""

    bound: float
    sense: Literal["at most", "at least"] = "at most"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sense == "at most" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass
class Figure:
    """One number.

    Attributes:
        name: What was measured, as the table says it; unique within its group.
        value: A median.
        unit: "x the time", "x as fast", "s", "x the memory", ...
        spread: Half the interquartile range over the rounds.
        rounds: How many rounds the median is of; 1 for counts that do not vary.
        target: None for figures that are only reported.
        cause: Why the target was missed, with what was measured about it.
        medians_ms: Time per call of everything that took part, by name.
        others: Median share of the machine that other processes took; None where it is unknown.
        detail: Further facts: exits, batch sizes that survived, page faults, ...
    """

    name: str
    value: float
    unit: str
    spread: float = 0.0
    rounds: int = 1
    target: Target | None = None
    cause: str | None = None
    medians_ms: dict[str, float] = field(default_factory=dict)
    spreads_ms: dict[str, float] = field(default_factory=dict)
    others: float | None = None
    redone: int = 0
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met(self.value)

    def to_dict(self) -> dict[str, Any]:
        made = asdict(self)
        made["target"] = None if self.target is None else str(self.target)
        made["met"] = self.met
        made["disturbed"] = self.others is not None and self.others > BUSY
        return _rounded(made)


def timed(
    name: str, rounds: Rounds, what: str, against: str, target: Target | None = None, *, inverse: bool = False, **rest: Any
) -> Figure:
    """The ratio of two of the things that were timed.

    Args:
        what: Name in `rounds` of the numerator.
        inverse: Give the rate instead: how many times as fast `what` is.
    """
    value, spread = rounds.ratio(against, what) if inverse else rounds.ratio(what, against)
    unit = "x as fast" if inverse else "x the time"
    return with_times(Figure(name, value, unit, spread, target=target, **rest), rounds)


def with_times(figure: Figure, rounds: Rounds) -> Figure:
    """The figure with what was measured in the same rounds."""
    figure.rounds = len(rounds.others)
    for name, times in rounds.times.items():
        median, spread = summary(times)
        figure.medians_ms[name], figure.spreads_ms[name] = 1e3 * median, 1e3 * spread
    known = [share for share in rounds.others if share is not None]
    figure.others = summary(known)[0] if known else None
    figure.redone = rounds.redone
    return figure


# ---- the file


def merge(path: Path, group: str, made: dict[str, Any]) -> dict[str, Any]:
    """Puts one group's result into the file, next to those of the other groups; a reader never sees half a file."""
    whole = read(path) if path.exists() else {"groups": {}}
    whole["groups"] = dict(sorted({**whole["groups"], group: made}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, written = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    os.chmod(written, 0o644)
    os.replace(written, path)
    return whole


def read(path: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(path.read_text())
    return whole


def _rounded(value: Any) -> Any:
    """Six digits: more is noise, and makes every diff longer."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


# ---- for people


def table(whole: dict[str, Any]) -> Table:
    """The whole file as a table."""
    made = Table(title="against the original or a named rival, interleaved in one run", title_justify="left")
    for name, right in (("group", 0), ("what", 0), ("figure", 1), ("spread", 1), ("target", 0), ("", 0), ("rounds", 1)):
        made.add_column(name, justify="right" if right else "left")
    verdicts = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}
    for group, result in whole["groups"].items():
        for f in result["figures"]:
            verdict = verdicts[f["met"]] + (" [yellow]disturbed[/yellow]" if f["disturbed"] else "")
            figure = f"{f['value']:.3f} {f['unit']}"
            rounds = str(f["rounds"]) if f["rounds"] > 1 else "-"
            made.add_row(group, f["name"], figure, f"{f['spread']:.3f}", f["target"] or "-", verdict, rounds)
        made.add_section()
    return made


def misses(whole: dict[str, Any]) -> list[str]:
    """A sentence for each target that was missed."""
    return [
        f"{group}: {f['name']} is {f['value']:.3f}, wanted {f['target']}. {f['cause'] or 'Cause unknown.'}"
        for group, result in whole["groups"].items()
        for f in result["figures"]
        if f["met"] is False
    ]
