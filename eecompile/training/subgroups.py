"""Parts of the data: what a mean over all rows hides, for each class and for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from eecompile.binomial import log_binomial_tail
from eecompile.errors import EecompileError, shown
from eecompile.plain import check_callable
from eecompile.training.batches import Batch
from eecompile.training.report import percent, table

LEVEL = 0.05
CERTAIN = 0.001  # level at which the full model is said to be worse than a constant answer
SHOWN = 10
LEAST_DROP = 0.005  # below which no class is said to be harmed


@dataclass
class GroupRow:
    """One class or group.

    Attributes:
        rows: How many.
        score: Mean early score; of a class its recall.
        full_score: Of the full model.
        drop: `full_score - score`.
    """

    name: str
    rows: int
    score: float
    full_score: float
    drop: float


def group_rows(names: Sequence[str], group: Tensor, early: Tensor, full: Tensor) -> list[GroupRow]:
    """One for each group that has rows, the largest drop first.

    Args:
        group: int64 `[n]`, index into `names`.
        early: float64 `[n]`; `full` likewise.
    """
    found = []
    for k, name in enumerate(names):
        mine = group == k
        if bool(mine.any()):
            a, b = float(early[mine].mean()), float(full[mine].mean())
            found.append(GroupRow(name, int(mine.sum()), a, b, b - a))
    return sorted(found, key=lambda row: -row.drop)


def harmed(rows: Sequence[GroupRow], max_drop: float) -> list[GroupRow]:
    """Those whose drop is above `max_drop`, or half a point, by more than chance: at level 5%, shared by all of them.

    The number of rows that are lost net, against a binomial one of mean `max_drop`; exact by its upper tail.
    """
    most = max(max_drop, LEAST_DROP)
    return [r for r in rows if upper_tail(round(r.drop * r.rows), r.rows, most) < LEVEL / len(rows)]


def below_constant(rows: Sequence[GroupRow]) -> list[str]:
    """A line where the full model is right less often than one class for all rows would be, by more than chance.

    Another output than the class scores, or labels in another order, are the usual causes.
    """
    n = sum(r.rows for r in rows)
    commonest = max(rows, key=lambda r: r.rows, default=None)
    if commonest is None:
        return []
    wrong = round(sum((1 - r.full_score) * r.rows for r in rows))
    if upper_tail(wrong, n, 1 - commonest.rows / n) >= CERTAIN:
        return []
    return [
        f"The full model is right on {percent(1 - wrong / n, 1)} of these rows, class {commonest.name} for all of them on "
        f"{percent(commonest.rows / n, 1)}. Look at prediction= (which output holds the class scores), the order of the "
        "labels, and how the inputs are prepared."
    ]


def upper_tail(k: int, n: int, p: float) -> float:
    """`P(Bin(n, p) >= k)`."""
    return float(log_binomial_tail(torch.tensor(n - k), n, 1 - p).exp())


def check_groups(groups: Any, loader: Any) -> None:
    """Whether a column of groups belongs to the rows in the order in which the loader gives them.

    Raises:
        EecompileError: A `DataLoader` that draws rows in another order than that of its data.
    """
    if groups is None or isinstance(groups, str):
        return
    if callable(groups):
        check_callable("groups", groups, "(inputs, labels) -> [B]")
        return
    if not hasattr(groups, "__getitem__") or not hasattr(groups, "__len__") or isinstance(groups, Mapping):
        raise EecompileError(
            "groups= is no column of labels",
            got=shown(groups)[:80],
            wanted="a label for each row, in order, or a callable (inputs, labels) -> [B]",
        )
    if not isinstance(loader, DataLoader):
        return
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    if not isinstance(loader.dataset, IterableDataset) and type(sampler) is not SequentialSampler:
        raise EecompileError(
            "a column of groups belongs to rows in the order of the data, and this loader draws them in another one",
            got=type(sampler).__name__,
            wanted="a DataLoader with shuffle=False",
            hint="or pass a callable: groups=lambda inputs, labels: ...",
        )


def groups_of(groups: Any, batch: Batch, start: int, n: int) -> list[Any]:
    """The label of each row of a batch.

    Args:
        groups: A column for the whole loader, or a callable `(inputs, labels) -> [B]`.
        start: Rows before this batch.

    Raises:
        EecompileError: Another number of labels than rows.
    """
    if callable(groups):
        inputs: Any = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
        found = groups(inputs, batch.labels)
    else:
        found = groups[start : start + n]
    found = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise EecompileError(
            "groups= gives no labels", where=batch.where, got=type(found).__name__, wanted=f"a label for each of {n} rows"
        )
    if len(found) != n:
        raise EecompileError(
            "groups= has another number of labels than the loader has rows", where=batch.where, got=len(found), wanted=n
        )
    return [str(g) for g in found]


def indexed(labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names of the groups, and for each row which one is its."""
    names = sorted(set(labels))
    known = {name: k for k, name in enumerate(names)}
    return names, torch.tensor([known[label] for label in labels], dtype=torch.int64)


def group_tables(by_class: Sequence[GroupRow], by_group: Sequence[GroupRow], max_drop: float) -> list[RenderableType]:
    """A table of the groups, and a line for every class that loses more than the whole by more than chance."""
    found: list[RenderableType] = []
    if by_group:
        rows = [[r.name, str(r.rows), percent(r.score), percent(r.full_score), percent(r.drop)] for r in by_group]
        found.append(table("Groups", ["group", "rows", "early", "full model", "drop"], rows[:SHOWN]))
    found += [
        f"class {r.name} ({r.rows} rows): recall {percent(r.full_score, 1)} falls to {percent(r.score, 1)}"
        for r in harmed(by_class, max_drop)[:SHOWN]
    ]
    return found
