"""Risk of drafts that are kept unverified (`kv="deferred"` or "copy"): the lowest threshold whose texts provably stay close.

A sequence's loss is one less the metric of the text with drafts kept against the text of the model itself. Thresholds are
hypotheses of Learn then Test, as settings of exits are (`eecompile.calibration.choose`): sequences are the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.calibration.choose import Path, split
from eecompile.calibration.options import Options, split_sizes
from eecompile.errors import CalibrationError
from eecompile.training.report import Report, json_safe, number, percent, stacked, table

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
NEVER = 2.0  # no draft is as sure as this

Metric = Callable[[Tensor, Tensor], float]
"""(new tokens with drafts kept [T], the model's own [T]) to a number in [0, 1], higher is better."""
Generate = Callable[[float, Tensor, Tensor], tuple[list[Tensor], list[float]]]
"""(threshold, ids [B, S], mask [B, S]) to new tokens [T] of each row and the share of them that the full model chose."""


def same_tokens(early: Tensor, full: Tensor) -> float:
    """Share of positions with the model's own token, where one text ends before the other included."""
    shared = min(len(early), len(full))
    return float((early[:shared] == full[:shared]).sum()) / max(len(early), len(full), 1)


@dataclass
class DeferredReport(Report):
    """The threshold of drafts that are kept unverified, and what is promised of them.

    Attributes:
        threshold: What was set; 2.0, with which nothing is drafted by the head, where nothing qualified.
        loss: Mean loss of a sequence on all rows, one less the metric.
        cost: Share of new tokens that the full model chose.
        tried: Every threshold with its mean loss and cost.
        p_value: Of "the mean loss is above max_drop", tested at `level`; None for `delta=None`.
    """

    title: ClassVar[str] = "Unverified drafts"

    qualified: bool
    threshold: float
    max_drop: float
    delta: float | None
    rows: int
    loss: float
    cost: float
    tried: list[dict[str, float]]
    p_value: float | None
    level: float | None
    rows_needed: int | None

    @property
    def guarantee(self) -> str:
        """The promise, or why there is none, as a sentence."""
        if not self.qualified:
            few = self.rows_needed is not None and self.rows < self.rows_needed
            more = f" At least {self.rows_needed} sequences are needed." if few else ""
            return f"No threshold qualifies for max_drop={self.max_drop:g} on {self.rows} sequences: no draft is kept.{more}"
        if self.delta is None:
            return f"No guarantee was asked for: a sequence loses {percent(self.loss)} on these {self.rows}."
        return (
            f"With probability at least {100 * (1 - self.delta):g}% over the calibration data, a sequence drawn like these "
            f"{self.rows} loses at most {percent(self.max_drop)} of the metric on average "
            f"(p = {number(self.p_value)} at level {number(self.level)})."
        )

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json_safe({**vars(self), "guarantee": self.guarantee})
        return found

    def __rich__(self) -> RenderableType:
        heads = ["threshold", "mean loss", "tokens of the full model"]
        rows = [[number(t["threshold"]), percent(t["loss"]), percent(t["cost"], 1)] for t in self.tried]
        return stacked(table(self.title, heads, rows), f"set: {number(self.threshold)}", self.guarantee)


def calibrate_deferred(
    generate: Generate,
    prompts: Iterable[tuple[Tensor, Tensor]],
    *,
    max_drop: float = 0.05,
    delta: float | None = 0.05,
    metric: Metric | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
) -> DeferredReport:
    """The threshold with the fewest passes of the full model whose mean loss of a sequence is at most `max_drop`.

    Args:
        prompts: Batches of token ids and attention masks, both [B, S].
        metric: By default the share of positions with the model's own token.
        thresholds: To try, each on all prompts.
        seed: Of the split into sequences to order thresholds by and sequences to test on.

    Raises:
        CalibrationError: Options out of range, no prompts, or a metric outside of [0, 1].
    """
    options = Options(max_drop=max_drop, delta=delta)
    if not 0 <= max_drop < 1 or not (delta is None or 0 < delta < 1):
        raise CalibrationError(
            "max_drop or delta is out of range", got=f"{max_drop}, {delta}", wanted="0 <= max_drop < 1, 0 < delta < 1"
        )
    score = metric or same_tokens
    settings = sorted(set(thresholds), reverse=True)
    losses: dict[float, list[float]] = {t: [] for t in settings}
    costs: dict[float, list[float]] = {t: [] for t in settings}
    for ids, mask in prompts:
        own, _ = generate(NEVER, ids, mask)
        for threshold in settings:
            texts, shares = generate(threshold, ids, mask)
            losses[threshold] += [1 - _in_unit(score(e, f)) for e, f in zip(texts, own, strict=True)]
            costs[threshold] += shares
    rows = len(losses[settings[0]])
    if rows < 2:
        raise CalibrationError("too few sequences to calibrate on", got=rows, wanted=options.rows_needed or 2)
    drops = {t: torch.tensor(losses[t], dtype=torch.float64) for t in settings}
    mean_cost = {t: sum(costs[t]) / rows for t in settings}
    keys = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = split(keys, split_sizes(rows, max_drop, delta)[0])
    path = Path(drop=drops.__getitem__, cost=mean_cost.__getitem__, rows=rows, full_cost=1.0, binary=False)
    chosen = path.choose(settings, first, second, options)
    at = chosen.value
    return DeferredReport(
        qualified=at is not None,
        threshold=NEVER if at is None else at,
        max_drop=max_drop,
        delta=delta,
        rows=rows,
        loss=0.0 if at is None else float(drops[at].mean()),
        cost=1.0 if at is None else mean_cost[at],
        tried=[{"threshold": t, "loss": float(drops[t].mean()), "cost": mean_cost[t]} for t in settings],
        p_value=chosen.p_value,
        level=chosen.level,
        rows_needed=options.rows_needed,
    )


def _in_unit(value: Any) -> float:
    found = float(value)
    if not 0 <= found <= 1:
        raise CalibrationError("metric= gives a number in [0, 1]", got=found, hint="higher is better; 1 for the same text")
    return found
