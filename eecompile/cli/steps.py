"""What `run --stream`, `--deadline-ms` and `--budget` show: each answer of a call as it gets better."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import RenderableType

from eecompile.module import CompiledModule
from eecompile.result import Result
from eecompile.training.report import Report, json_safe, number, percent, stacked, table


@dataclass
class Steps(Report):
    """The answers of one call.

    Attributes:
        answers: One dict each: `at` (names of the exits that rows have reached), `final` (share of rows that left by
            themselves), mean `confidence` and `cost`, `milliseconds` since the start, `stopped` and `late`, and
            `prediction` (the class of every row; None for outputs with positions).
    """

    title: ClassVar[str] = "Answers"

    answers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {"answers": json_safe(self.answers)}

    def __rich__(self) -> RenderableType:
        rows = [
            [
                ", ".join(a["at"]),
                percent(a["final"], 0),
                number(a["confidence"]),
                percent(a["cost"], 1),
                number(a["milliseconds"]),
                " ".join(map(str, a["prediction"][:12])) if a["prediction"] is not None else "-",
            ]
            for a in self.answers
        ]
        last = self.answers[-1]
        notes = [f"stopped by the {last['stopped']}"] if last["stopped"] else []
        if last["late"]:
            notes.append("late: even the first exit is beyond what was allowed")
        heads = ["rows are at", "final", "mean confidence", "mean cost", "ms", "prediction"]
        return stacked(table(self.title, heads, rows), *notes)


def steps(
    fast: CompiledModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    deadline_ms: float | None,
    budget: float | None,
    stream: bool,
) -> Steps:
    """Runs the call and keeps every answer; where there is a deadline the stages are timed on it first."""
    if deadline_ms is not None and fast.executor != "reference":
        fast.measure_stages(*args, rounds=5, **kwargs)
    within = fast.within(deadline_ms=deadline_ms, budget=budget)
    started = time.perf_counter()
    results = within.stream(*args, **kwargs) if stream else [within.run(*args, **kwargs)]
    return Steps([_answer(fast, r, started) for r in results])


def _answer(fast: CompiledModule, r: Result, started: float) -> dict[str, Any]:
    names = [*(e.name for e in fast.exits), "model"]
    scores = fast.prediction_of(r.output)
    assert r.final is not None
    return {
        "at": [names[k] for k in sorted(set(r.exit_index.tolist()))],
        "final": float(r.final.float().mean()),
        "confidence": float(r.confidence.mean()),
        "cost": float(r.cost.mean()),
        "milliseconds": 1e3 * (time.perf_counter() - started),
        "stopped": r.stopped,
        "late": r.late,
        "prediction": scores.argmax(1).tolist() if scores.ndim == 2 else None,
    }
