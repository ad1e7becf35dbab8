"""Why each row exited where it did: its confidence at every exit against the threshold there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from eecompile.inspect.text import percent
from eecompile.training.batches import Batch
from eecompile.training.full import full_prediction
from eecompile.training.objectives import outputs_of
from eecompile.training.report import Report, json_safe
from eecompile.training.scores import choice

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

MOST_ROWS = 20


@dataclass
class At:
    """One row at one exit.

    Attributes:
        prediction: The class that the exit predicts; None for outputs with positions.
        sure: Whether the row would exit here.
    """

    exit: str
    confidence: float
    threshold: float | None
    open: bool
    sure: bool
    prediction: int | None


@dataclass
class Departure:
    """One row: where it exited, with which prediction, and the confidence of every exit.

    Attributes:
        left_at: Name of the exit, "model" for the model's own end.
        prediction: The class that was predicted; None for outputs with positions.
        full_prediction: What the whole model would have predicted, all exits closed and all gates open.
        gates: Whether each gate was open for the row, by name.
        widths: The share of its channels that each part with widths ran with, by region; 0 for skipped.
        steps: Steps that it took, its positions' mean where each halts by itself; None where nothing halts.
        route: The exit or the branch that a router sent it to; None without one, or where it had exited before.
    """

    row: int
    left_at: str
    prediction: int | None
    full_prediction: int | None
    cost: float
    exits: list[At]
    gates: dict[str, bool] = field(default_factory=dict)
    widths: dict[str, float] = field(default_factory=dict)
    steps: float | None = None
    route: str | None = None

    @property
    def why(self) -> str:
        """One sentence, and a clause for each of gates, widths, steps and route that the program has."""
        parts = [self._why_left()] if len(self.exits) > 1 else []
        if self.route is not None:
            parts.append(f"the router sent it to {self.route}")
        if self.gates:
            closed = [name for name, is_open in self.gates.items() if not is_open]
            parts.append(
                f"{len(closed)} of {len(self.gates)} gates were closed" + (f": {', '.join(closed)}" if closed else "")
            )
        if self.widths:
            parts.append("widths " + ", ".join(f"{region} {percent(share)}" for region, share in self.widths.items()))
        if self.steps is not None:
            parts.append(f"it took {self.steps:.3g} step{'' if self.steps == 1 else 's'}")
        return "; ".join(parts) or self._why_left()

    def _why_left(self) -> str:
        taken = next(a for a in self.exits if a.exit == self.left_at)
        before = [a for a in self.exits[: self.exits.index(taken)] if a.open]
        unsure = ", ".join(f"{a.exit} {a.confidence:.3f} < {a.threshold:.3f}" for a in before)
        if taken.threshold is None:
            return f"no open exit was sure enough ({unsure})" if before else "every exit is closed"
        sure = f"{taken.exit} is the first that is sure: {taken.confidence:.3f} >= {taken.threshold:.3f}"
        return sure + (f" (before it {unsure})" if before else "")


@dataclass
class Departures(Report):
    """What `where` found, a row of the input each."""

    title: ClassVar[str] = "where rows exited"

    rows: list[Departure]
    criterion: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "criterion": self.criterion,
            "rows": [json_safe({**vars(r), "why": r.why, "exits": [vars(a) for a in r.exits]}) for r in self.rows],
        }

    def __rich__(self) -> RenderableType:
        made = Table(title=f"{self.title} ({self.criterion})", title_justify="left")
        made.add_column("row", justify="right")
        for at in self.rows[0].exits if self.rows else []:
            made.add_column(_heading(at), justify="right")
        for name in ("exit", "prediction", "cost"):
            made.add_column(name, justify="right")
        for r in self.rows[:MOST_ROWS]:
            says = "-" if r.prediction is None else str(r.prediction)
            if r.prediction != r.full_prediction:
                says += f" (the model: {r.full_prediction})"
            made.add_row(str(r.row), *(_cell(a, r) for a in r.exits), r.left_at, says, percent(r.cost))
        gated = self.rows[0].gates if self.rows else {}
        shares = ", ".join(f"{g} {percent(sum(r.gates[g] for r in self.rows) / len(self.rows))}" for g in gated)
        opened = [Text(f"share of the rows that each gate was open for: {shares}")] if gated else []
        if any(r.route is not None for r in self.rows):
            counts = Counter(r.route for r in self.rows if r.route is not None)
            sent = ", ".join(f"{name} {percent(n / len(self.rows))}" for name, n in sorted(counts.items()))
            opened.append(Text(f"share of the rows that went to each route: {sent}"))
        taken = [r.steps for r in self.rows if r.steps is not None]
        opened += [Text(f"{sum(taken) / len(taken):.3g} steps on average")] if taken else []
        note = f"and {len(self.rows) - MOST_ROWS} more rows" if len(self.rows) > MOST_ROWS else ""
        return Group(made, *([Text(note)] if note else []), *opened)


def _heading(at: At) -> str:
    if at.threshold is None:
        return at.exit
    return f"{at.exit}\n>= {at.threshold:.3f}" if at.open else f"{at.exit}\nclosed"


def _cell(at: At, row: Departure) -> Text:
    names = [a.exit for a in row.exits]
    text = f"{at.confidence:.3f}" + ("" if at.prediction is None else f": {at.prediction}")
    if at.exit == row.left_at:
        return Text(text + " *", "bold green")
    later = names.index(at.exit) > names.index(row.left_at)
    return Text(text, "dim" if later or not at.open else "")


def where(fast: CompiledModule, *args: Any, **kwargs: Any) -> Departures:
    """Runs every exit on the given input; gives for each row where it exits, and why.

    Args:
        fast: The compiled module; thresholds as they are now.
        args: The call, as for the model.

    Returns:
        Departures: Prints as a table; `rows[i].why` is a sentence, `to_dict()` everything.

    Raises:
        CaptureError: Other arguments than the model was captured with.
    """
    result = fast.observe(*args, **kwargs)
    assert result.confidences is not None
    predictions = [_classes(o) for o in outputs_of(result)]
    confidences = [c.float().cpu().tolist() for c in result.confidences]
    steps = [float(s.double().mean()) for s in result.steps] if result.steps is not None else []
    whole = _classes(full_prediction(fast, Batch(args, kwargs, None, 0), result))
    opened = [] if result.gates is None else result.gates.tolist()
    wide = [] if result.widths is None else result.widths.tolist()
    names = [*fast.route_names, None]  # -1 where the row had exited before
    routes = [None] * len(result.exit_index) if result.route is None else [names[k] for k in result.route.tolist()]
    exits = fast.exits
    rows = []
    for i, left in enumerate(result.exit_index.tolist()):
        found = []
        for k, name in enumerate([*(e.name for e in exits), "model"]):
            threshold = exits[k].threshold if k < len(exits) else None
            is_open = threshold is None or exits[k].is_open
            said = predictions[k]
            found.append(
                At(
                    exit=name,
                    confidence=confidences[k][i],
                    threshold=threshold,
                    open=is_open,
                    sure=is_open and (threshold is None or confidences[k][i] >= threshold),
                    prediction=None if said is None else said[i],
                )
            )
        rows.append(
            Departure(
                i,
                found[left].exit,
                found[left].prediction,
                None if whole is None else whole[i],
                float(result.cost[i]),
                found,
                dict(zip((g.name for g in fast.gates), opened[i], strict=True)) if opened else {},
                dict(zip((w.region for w in fast.widths), wide[i], strict=True)) if wide else {},
                steps[i] if steps else None,
                routes[i],
            )
        )
    return Departures(rows, exits[0].criterion.name if exits else "no exits")


def _classes(output: Tensor) -> list[int] | None:
    return [int(c) for c in choice(output).tolist()] if output.ndim == 2 else None
