"""How the heads of a frozen trunk were fitted: rows of the report of `fit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class HeadRow:
    """How the head of one exit was fitted.

    Attributes:
        kind: The kind of head that the exit has now.
        before: The kind that it had.
        flops: Cost of head and decision for one row.
        weight_decay: The one that was taken.
        loss: Objective on the rows held out, or on those fitted to where none were.
        score: Accuracy there, None where the task is no classification.
        tried: Held-out loss of each kind that was tried, by name.
        steps: Optimizer steps in all.
        seconds: Wall time.
        cut: Whether time ran out before it had converged.
    """

    exit: str
    kind: str
    before: str
    flops: float
    weight_decay: float
    loss: float
    score: float | None
    tried: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    cut: bool = False


def cut_short(rows: Sequence[HeadRow]) -> list[str]:
    """What to say of heads that were not fitted to the end; nothing where there are none."""
    names = [row.exit for row in rows if row.cut]
    return [f"time ran out before the heads of {', '.join(names)} were fitted to the end"] if names else []


def heads_table(rows: Sequence[HeadRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
    columns = ["exit", "head", "weight decay", "loss", "accuracy", "tried (loss)", "steps", "s"]
    cells = []
    for row in rows:
        tried = ", ".join(f"{kind} {loss:.3g}" for kind, loss in row.tried.items())
        kind = row.kind if row.kind == row.before else f"{row.kind} (was {row.before})"
        score = "-" if row.score is None else f"{row.score:.2%}"
        loss = f"{row.loss:.4g}" if math.isfinite(row.loss) else "-"
        cells.append([row.exit, kind, f"{row.weight_decay:g}", loss, score, tried, str(row.steps), f"{row.seconds:.1f}"])
    return columns, cells
