"""One pass over the calibration data: what is kept of every row.

Every row draws a random key from a generator of its own; the rows with the smallest keys are the part that
the thresholds are searched on, the others the part that they are tested on. Logits are kept for the
temperatures up to `LIMIT` bytes, those of the smallest keys. If that is all of them, confidences at other
temperatures are computed from them; if not, or where outputs have positions, the data is read a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from eecompile.calibration.options import Options, combination_of
from eecompile.errors import CalibrationError
from eecompile.ir.settings import Settings
from eecompile.result import Result
from eecompile.training.batches import WANTED, Batch, alike, batches
from eecompile.training.scores import (
    IGNORE,
    agreement,
    check_finite,
    check_labels,
    choice,
    class_labels,
    measure,
    over_classes,
    right,
)
from eecompile.training.subgroups import groups_of, indexed
from eecompile.training.tasks import ANSWERS, check_task, own_task
from eecompile.training.workers import shared

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

LIMIT = 2**29
Parts: TypeAlias = tuple[list[str], Tensor]
"""Names of classes or groups, and for each row [n] which one is its."""


@dataclass
class Logits:
    """Logits of the rows (or positions) with the smallest keys."""

    keys: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    size: int = 0
    whole: bool = True

    def add(self, keys: Tensor, outputs: tuple[Tensor, ...], labels: Tensor) -> None:
        """`outputs` E + 1 of `[B, C]` or `[B, S, C]`, `labels` `[B]`, `[B, S]` or as `outputs`, `keys` `[B]`."""
        outputs = tuple(over_classes(output.detach().float().cpu(), labels) for output in outputs)
        if labels.shape[1:] == (1,):
            outputs, labels = tuple(output[:, 0] for output in outputs), labels[:, 0]
        stacked = torch.stack(outputs, -2)
        if labels.ndim > 1:
            real = labels != IGNORE
            keys = keys.view(-1, *(1,) * (labels.ndim - 1)).expand(labels.shape)[real]
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
        confidences: float32 `[n, E + 1]`, all exits open.
        score: float64 `[n, E + 1]`: right or wrong, agreeing or not, or the metric.
        predictions: int64 `[n, E + 1]` for outputs `[n, C]`, else None.
        scores: float32 `[n, E]` logits of learned criteria, else None.
        static: float64 `[n]`, drop of the smaller model that is compared with; None without.
        members: Classes and groups.
        kept: Logits for the temperatures; None where they are not fitted.
        skipped: Rows without any label.
    """

    keys: Tensor
    confidences: Tensor
    score: Tensor
    predictions: Tensor | None
    scores: Tensor | None
    static: Tensor | None
    members: Members
    kept: Logits | None
    skipped: int

    @property
    def rows(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Source:
    """Where the rows come from and how they are scored.

    Attributes:
        loader: Of the calibration data.
        device: Where the compiled module is.
    """

    fast: CompiledModule
    loader: Iterable[Any]
    options: Options
    device: torch.device

    def batches(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            CalibrationError: No batch; some batches with labels and others without.
        """
        empty = True
        for batch in alike(batches(self.loader, self.device), CalibrationError):
            empty = False
            yield batch
        if empty:
            raise CalibrationError(
                "the calibration loader is empty",
                got="no batch",
                wanted="at least one batch of (inputs, labels)",
                hint="check the data set's size and `drop_last`; a used-up generator yields nothing",
            )

    def observe(self, batch: Batch, settings: Settings) -> Result:
        """The batch under these settings; those of the module stay as they are.

        Raises:
            CalibrationError: NaN in an output.
        """
        result = self.fast.observe_at(settings, batch.args, batch.kwargs)
        if not result.outputs or not result.confidences:
            raise CalibrationError("the compiled module gave no outputs of the exits", where=batch.where)
        check_finite(result.outputs, self.fast.exits, batch.where, CalibrationError)
        return result

    def static(self, batch: Batch) -> Tensor:
        """The prediction of the smaller model that is compared with.

        Raises:
            CalibrationError: It is no tensor, and has no `logits`.
        """
        assert self.options.static is not None
        found = static_output(self.options.static[0], batch)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor):
            raise CalibrationError("static= gives no prediction", got=type(found).__name__, wanted="a tensor, or logits")
        return found

    def scores(self, outputs: Sequence[Tensor], full: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """float64 [B, K] of K outputs on the CPU, bool [B] of rows with a label, and the labels where they are classes.

        Args:
            full: What agreement is with.

        Raises:
            CalibrationError: Labels that are missing or wrong; a metric outside of [0, 1].
        """
        n = full.shape[0]
        valid, labels = torch.ones(n, dtype=torch.bool), None
        if self.options.metric is not None:
            found = [measure(self.options.metric, o, batch.labels, n, batch.where, CalibrationError).cpu() for o in outputs]
            check_unit(torch.stack(found, 1), batch.where)
            return torch.stack(found, 1), valid, None
        if batch.labels is not None or self.options.target == "accuracy":
            if batch.index == 0:
                check_task(self.fast, batch.labels, CalibrationError)
            labels = check_labels(full, batch.labels, batch.where, CalibrationError)
            valid = right(full, labels)[1].cpu()
        if self.options.target == "agreement":
            each = own_task(self.fast) == ANSWERS
            return torch.stack([agreement(o, full, labels, each).cpu() for o in outputs], 1), valid, labels
        assert labels is not None
        return torch.stack([right(o, labels)[0].cpu() for o in outputs], 1), valid, labels


def static_output(static: Callable[..., Any], batch: Batch, name: str = "static=") -> Any:
    """What a model of the user's gives for a batch.

    Raises:
        CalibrationError: It does not run on these inputs.
    """
    try:
        with torch.no_grad():
            return static(*batch.args, **batch.kwargs)
    except Exception as error:  # the user's code may raise anything
        shapes = ", ".join(str(list(t.shape)) for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor))
        raise CalibrationError(
            f"{name} does not run on the inputs of the loader",
            where=type(static).__name__,
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} (inputs {shapes or 'without a tensor'})",
            wanted="a model that takes what the large one takes" if name == "static=" else WANTED,
            hint="put what it needs (another size of the input, say) into a module around it",
        ) from error


@dataclass
class Members:
    """The class and the group of every row that has a label."""

    groups: Any
    labels: list[Tensor] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    start: int = 0

    def add(self, batch: Batch, classes: Tensor | None, valid: Tensor) -> None:
        """Rows of a batch, with their class labels [B] where they have one; bool [B], whether they have labels."""
        n = len(valid)
        if classes is not None:
            self.labels.append(classes[valid])
        if self.groups is not None and not isinstance(self.groups, str):
            mine = groups_of(self.groups, batch, self.start, n)
            self.found += [g for g, v in zip(mine, valid.tolist(), strict=True) if v]
        self.start += n

    def classes(self) -> Parts | None:
        """By class label; None where rows have none."""
        if not self.labels:
            return None
        return indexed([str(k) for k in torch.cat(self.labels).tolist()])

    def by_group(self) -> Parts | None:
        """As `groups=` has it; None without.

        Raises:
            CalibrationError: A column with more labels than there are rows, or "classes" where rows have none.
        """
        if isinstance(self.groups, str):
            found = self.classes()
            if found is None:
                raise CalibrationError("rows have no class label to be grouped by", got='groups="classes"')
            return found
        if self.groups is None:
            return None
        if not callable(self.groups) and len(self.groups) != self.start:
            raise CalibrationError("groups= is one label for each row", got=len(self.groups), wanted=self.start)
        return indexed(self.found)


def collect(source: Source, settings: Settings, *, temperatures: bool, seed: int) -> Collected:
    """One pass under `settings`.

    Args:
        temperatures: Whether logits are kept for them.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {}
    kept = Logits() if temperatures and source.options.metric is None else None
    skipped, members = 0, Members(source.options.groups)
    for batch, (columns, valid, of_classes, logits) in shared(
        source.batches(), lambda b: _columns(source, settings, b, kept is not None)
    ):
        keys = torch.rand(len(valid), generator=generator, dtype=torch.float64)
        members.add(batch, of_classes, valid)
        if kept is not None and logits is not None:
            kept.add(keys[valid], *logits)
        for name, column in {"keys": keys, **columns}.items():
            parts.setdefault(name, []).append(column[valid])
        skipped += int((~valid).sum())
    joined = {name: torch.cat(found) for name, found in parts.items()}
    return Collected(
        keys=joined["keys"],
        confidences=joined["confidences"],
        score=joined["score"],
        predictions=joined.get("predictions"),
        scores=joined.get("scores"),
        static=joined.get("static"),
        members=members,
        kept=kept if kept is not None and kept.keys else None,
        skipped=skipped,
    )


Columns: TypeAlias = tuple[dict[str, Tensor], Tensor, Tensor | None, tuple[tuple[Tensor, ...], Tensor] | None]
"""Numbers of the rows of a batch [B, ...] by name, whether rows have a label, their class; logits and labels of those with
one."""


def _columns(source: Source, settings: Settings, batch: Batch, logits_too: bool) -> Columns:
    """What is kept of one batch, on the CPU."""
    result = source.observe(batch, settings)
    assert result.outputs is not None and result.confidences is not None
    outputs = result.outputs
    score, valid, labels = source.scores(outputs, outputs[-1], batch)
    found = {"confidences": torch.stack([c.float().cpu() for c in result.confidences], 1), "score": score}
    several = own_task(source.fast) == ANSWERS and outputs[-1].shape[-1] > 1
    if source.options.metric is None and outputs[-1].ndim == 2 and not several:
        found["predictions"] = torch.stack([choice(o) for o in outputs], 1).cpu()
    if source.options.static is not None:
        found["static"] = score[:, -1] - source.scores([source.static(batch)], outputs[-1], batch)[0][:, 0]
    if result.trace.scores is not None:
        found["scores"] = torch.stack([s.float().cpu() for s in result.trace.scores], 1)
    logits = None
    if logits_too and labels is not None:
        # where the surest exit answers, temperatures belong to what each head says by itself
        surest = combination_of(source.fast) == "confident" and result.trace.separate
        scored = result.trace.separate if surest else outputs
        assert scored is not None
        logits = tuple(o.cpu()[valid] for o in scored), labels.cpu()[valid]
    return found, valid, classes_of(outputs[-1], labels), logits


def classes_of(scores: Tensor, labels: Tensor | None) -> Tensor | None:
    """The class label of each row of a batch, on the CPU; None where rows have none."""
    found = None if labels is None else class_labels(scores, labels)
    return None if found is None else found.cpu()


def second_pass(source: Source, settings: Settings, collected: Collected) -> Tensor:
    """Confidences `[n, E + 1]` under `settings`, of the same rows in the same order.

    Raises:
        CalibrationError: The loader gave other rows: its order or its augmentation is random.
    """
    again = collect(source, settings, temperatures=False, seed=0)
    if not torch.equal(again.score, collected.score):
        raise CalibrationError(
            "the calibration loader gave other rows when it was read again",
            got=f"{again.rows} rows against {collected.rows}, or in another order",
            wanted="the same rows in the same order",
            hint="pass shuffle=False and no augmentation, or temperature=False, which reads the data once",
        )
    return again.confidences


def check_unit(score: Tensor, where: str) -> None:
    if bool(((score < 0) | (score > 1)).any()):
        raise CalibrationError(
            "the metric leaves [0, 1]",
            where=where,
            got=f"values from {float(score.min()):.4g} to {float(score.max()):.4g}",
            wanted="0 (worst) to 1 (best) for each row, because a guarantee needs a bounded loss",
            hint="rescale or clip the metric",
        )
