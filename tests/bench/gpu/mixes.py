"""Exit mixes that are exact: rows and thresholds are chosen by what the heads say of a pool of rows.

Every chosen row lies as far from the thresholds that it meets as the pool allows, so that a smaller batch, another kernel or
half precision does not send it elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIXES = ("no row leaves", "50/25/25", "all at the first")
SLACK = 0.1  # a threshold may stand this share of the rows to either side of where the mix wants it
SURE = 0.98  # rows surer than this at an exit that no row leaves at are not taken


@dataclass(frozen=True)
class Mix:
    """Rows and thresholds.

    Attributes:
        rows: int64 `[n]`, numbers in the pool, in no order of their exits.
        exits: int64 `[n]`, where each leaves.
        thresholds: One for each exit, all of them open.
        margin: The least distance of a chosen row's confidence from a threshold that it meets.
    """

    rows: Tensor
    exits: Tensor
    thresholds: list[float]
    margin: float


def leaving(mix: str, n: int, exits: int) -> list[int]:
    """How many of `n` rows leave at each exit; the others reach the end."""
    if mix == "no row leaves":
        return [0] * exits
    if mix == "all at the first":
        return [n, *[0] * (exits - 1)]
    if n % 4 or exits < 3:
        raise ValueError(f"50/25/25 needs three exits and a number of rows that four divides, not {exits} and {n}")
    return [n // 2, n // 4, n // 4, *[0] * (exits - 3)]


def choose(confidences: Sequence[Tensor], counts: Sequence[int], n: int) -> Mix:
    """Rows of which exactly `counts[k]` leave at exit `k`.

    Args:
        confidences: float32 `[P]` of every exit, over the whole pool.
        n: Rows to choose; those that `counts` leaves over reach the end.

    Raises:
        ValueError: The pool has too few rows of a kind.
    """
    inside = torch.arange(len(confidences[0]))
    margin = torch.ones(len(inside), dtype=torch.float64)
    left, thresholds = n, []
    taken: list[tuple[int, Tensor]] = []
    for k, count in enumerate(counts):
        c = torch.nan_to_num(confidences[k].double().cpu(), nan=-1.0)
        if count == left:
            thresholds.append(0.0)
            taken.append((k, best(inside[c[inside] >= 0], margin, count, f"exit {k}")))
            inside, left = inside[:0], 0
            continue
        t = above(c[inside]) if count == 0 else between(c[inside], count / left)
        thresholds.append(t)
        margin = torch.minimum(margin, (c - t).abs())
        sure = c[inside] >= t
        if count > 0:
            taken.append((k, best(inside[sure], margin, count, f"exit {k}")))
        inside, left = inside[~sure], left - count
    taken.append((len(counts), best(inside, margin, left, "the end")))
    where = torch.cat([torch.full((len(r),), k) for k, r in taken])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([r for _, r in taken])[order]
    return Mix(rows, where[order], thresholds, float(margin[rows].min()))


def best(rows: Tensor, margin: Tensor, count: int, what: str) -> Tensor:
    """The rows that lie farthest from the thresholds."""
    if len(rows) < count:
        raise ValueError(f"the pool has {len(rows)} rows for {what}, wanted {count}")
    return rows[margin[rows].argsort(descending=True, stable=True)[:count]]


def between(c: Tensor, share: float) -> float:
    """In the widest gap near the place that lets `share` of the rows leave."""
    ranked = c.sort(descending=True).values
    at, slack = round(share * len(c)), max(1, int(SLACK * len(c)))
    low, high = max(1, at - slack), min(len(c) - 1, at + slack)
    if low > high:
        raise ValueError(f"{len(c)} rows cannot be separated")
    i = low + int((ranked[low - 1 : high] - ranked[low : high + 1]).argmax())
    return float(ranked[i - 1] + ranked[i]) / 2


def above(c: Tensor) -> float:
    """An open threshold that no row reaches, or only rows that are not taken."""
    usual = c[c < SURE]
    return min(1.0, (float(usual.max()) + 1) / 2) if len(usual) else 1.0
