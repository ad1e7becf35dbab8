"""One pass over the calibration data: what is kept of every row.

Every row draws a random key from a generator of its own; the rows with the smallest keys are the part that
the thresholds are searched on, the others the part that they are tested on. Logits are kept for the
temperatures up to `LIMIT` bytes, those of the smallest keys. If that is all of them, confidences at other
temperatures are computed from them; if not, or where outputs have positions, the data is read a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import CalibrationError
from eecompile.training.batches import batches
from eecompile.training.protocol import Compiled
from eecompile.training.scores import IGNORE, Metric, agreement, check_labels, measure, right

LIMIT = 2**29


@dataclass
class Logits:
    """Logits of the rows (or positions) with the smallest keys."""

    keys: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    size: int = 0
    whole: bool = True

    def add(self, keys: Tensor, outputs: tuple[Tensor, ...], labels: Tensor) -> None:
        """`outputs` E + 1 of `[B, C]` or `[B, S, C]`, `labels` `[B]` or `[B, S]`, `keys` `[B]`."""
        stacked = torch.stack([output.detach().float().cpu() for output in outputs], -2)
        if labels.ndim == 2:
            real = labels != IGNORE
            keys = keys[:, None].expand(labels.shape)[real]
            stacked, labels, self.whole = stacked[real], labels[real], False
        self.keys.append(keys)
        self.logits.append(stacked)
        self.labels.append(labels)
        self.size += stacked.nelement() * 4
        if self.size > 2 * LIMIT:
            self.whole = False
            k, z, y = self.joined()
            order = k.argsort(stable=True)[: max(1, len(k) * LIMIT // self.size)]
            self.keys, self.logits, self.labels = [k[order]], [z[order]], [y[order]]
            self.size = self.logits[0].nelement() * 4

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[m]`, logits `[m, E + 1, C]`, labels `[m]`."""
        return torch.cat(self.keys), torch.cat(self.logits), torch.cat(self.labels)


@dataclass
class Collected:
    """n rows that have a label (or all, where labels are not needed).

    Attributes:
        keys: float64 `[n]`, random.
        confidences: float32 `[n, E + 1]`, all exits open, as `observe` gave them.
        score: float64 `[n, E + 1]`: right or wrong, agreeing or not, or the metric.
        correct: float64 `[n, E + 1]` against labels; None without labels or with a metric.
        predictions: int64 `[n, E + 1]` for outputs `[n, C]`, else None.
        scores: float32 `[n, E]` logits of learned criteria, else None.
        kept: Logits for the temperatures; None where they are not fitted.
        skipped: Rows without any label.
    """

    keys: Tensor
    confidences: Tensor
    score: Tensor
    correct: Tensor | None
    predictions: Tensor | None
    scores: Tensor | None
    kept: Logits | None
    skipped: int

    @property
    def rows(self) -> int:
        return len(self.keys)


def collect(
    fast: Compiled,
    loader: Iterable[Any],
    *,
    target: str,
    metric: Metric | None,
    temperatures: bool,
    seed: int,
    device: torch.device,
) -> Collected:
    """One pass.

    Raises:
        CalibrationError: No rows; labels that are missing or wrong; NaN in an output; a metric outside of
            [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    names = [record.name for record in fast.exits] + ["the model's own output"]
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("keys", "confidences", "score", "correct", "predictions", "scores")
    }
    kept = Logits() if temperatures and metric is None else None
    skipped = 0
    # where the surest exit answers, temperatures belong to what each head says by itself
    surest = combination_of(fast) == "confident"
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        if not result.outputs or not result.confidences:
            raise CalibrationError("fast.observe gave no outputs of the exits", where=batch.where)
        outputs = result.outputs
        check_finite(outputs, names, batch.where)
        n = outputs[-1].shape[0]
        keys = torch.rand(n, generator=generator, dtype=torch.float64)
        valid = torch.ones(n, dtype=torch.bool)
        labels: Tensor | None = None
        if metric is not None:
            score = torch.stack(
                [measure(metric, o, batch.labels, n, batch.where, CalibrationError).cpu() for o in outputs], 1
            )
            check_unit(score, batch.where)
        else:
            if batch.labels is not None or target == "accuracy":
                labels = check_labels(outputs[-1], batch.labels, batch.where, CalibrationError)
                pairs = [right(output, labels) for output in outputs]
                correct = torch.stack([score for score, _ in pairs], 1).cpu()
                valid = pairs[-1][1].cpu()
                parts["correct"].append(correct[valid])
            if target == "accuracy":
                score = correct
            else:
                score = torch.stack([agreement(output, outputs[-1], labels) for output in outputs], 1).cpu()
            if kept is not None and labels is not None:
                judged = result.separate if surest and result.separate else outputs
                kept.add(keys[valid], tuple(o.cpu()[valid] for o in judged), labels.cpu()[valid])
            if outputs[-1].ndim == 2:
                parts["predictions"].append(torch.stack([o.argmax(1) for o in outputs], 1).cpu()[valid])
        parts["keys"].append(keys[valid])
        parts["confidences"].append(torch.stack([c.float().cpu() for c in result.confidences], 1)[valid])
        parts["score"].append(score[valid])
        if result.scores is not None:
            parts["scores"].append(torch.stack([s.float().cpu() for s in result.scores], 1)[valid])
        skipped += int((~valid).sum())
    if not parts["keys"]:
        raise CalibrationError(
            "the calibration loader is empty",
            got="no batch",
            wanted="at least one batch of (inputs, labels)",
            hint="check the data set's size and `drop_last`; a used-up generator yields nothing",
        )
    joined = {name: torch.cat(found) for name, found in parts.items() if found}
    correct_rows = joined.get("correct")
    if correct_rows is not None and len(correct_rows) != len(joined["keys"]):
        raise CalibrationError("some batches have labels and others do not", wanted="labels in all or in none")
    if kept is not None and not kept.keys:
        kept = None
    return Collected(
        keys=joined["keys"],
        confidences=joined["confidences"],
        score=joined["score"],
        correct=correct_rows,
        predictions=joined.get("predictions"),
        scores=joined.get("scores"),
        kept=kept,
        skipped=skipped,
    )


def combination_of(fast: Compiled) -> str:
    """How the exits answer: "last", "ensemble", "confident" or "weighted"."""
    return str(getattr(fast.exits[0], "combine", "last")) if fast.exits else "last"


def second_pass(fast: Compiled, loader: Iterable[Any], collected: Collected, device: torch.device) -> Tensor:
    """Confidences `[n, E + 1]` with the temperatures that `fast` has now, of the same rows in the same order.

    Raises:
        CalibrationError: The loader gave other rows: its order or its augmentation is random.
    """
    found, predictions = [], []
    for batch in batches(loader, device):
        result = fast.observe(*batch.args, **batch.kwargs)
        outputs, confidences = result.outputs or (), result.confidences or ()
        valid = torch.ones(outputs[-1].shape[0], dtype=torch.bool)
        if batch.labels is not None:
            valid = right(outputs[-1], check_labels(outputs[-1], batch.labels, batch.where))[1].cpu()
            predictions.append(right(outputs[-1], check_labels(outputs[-1], batch.labels))[0].cpu()[valid])
        found.append(torch.stack([c.float().cpu() for c in confidences], 1)[valid])
    again = torch.cat(found)
    same = len(again) == collected.rows
    if same and predictions and collected.correct is not None:
        same = torch.equal(torch.cat(predictions), collected.correct[:, -1])
    if not same:
        raise CalibrationError(
            "the calibration loader gave other rows when it was read again",
            got=f"{len(again)} rows against {collected.rows}, or in another order",
            wanted="the same rows in the same order",
            hint="pass shuffle=False and no augmentation, or temperature=False, which reads the data once",
        )
    return again


def check_finite(outputs: tuple[Tensor, ...], names: list[str], where: str) -> None:
    for name, output in zip(names, outputs, strict=True):
        bad = output.isnan()
        if bool(bad.any()):
            rows = int(bad.flatten(1).any(1).sum())
            raise CalibrationError(
                "NaN in the outputs",
                where=f"{name}, {where}",
                got=f"NaN in {rows} of {output.shape[0]} rows",
                wanted="numbers",
                hint="look at these inputs, and whether training diverged",
            )


def check_unit(score: Tensor, where: str) -> None:
    if bool(((score < 0) | (score > 1)).any()):
        raise CalibrationError(
            "the metric leaves [0, 1]",
            where=where,
            got=f"values from {float(score.min()):.4g} to {float(score.max()):.4g}",
            wanted="0 (worst) to 1 (best) for each row, because a guarantee needs a bounded loss",
            hint="rescale or clip the metric",
        )
