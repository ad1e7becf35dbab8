"""`fast.monitor(...)`: whether what calibration found still holds on the rows of today, without labels.

A random share of the rows (`shadow`) also runs to the end. How often their early answer is another than the full model's is
tested against what it was on the calibration rows plus `max_drop`; the probability that an alarm is ever false is at most
alpha (`sequences.py`), and each alarm after the first spends half of what is left. The mix of exits, of all rows, warns
earlier and promises nothing. Labels that come late test the drop itself.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.calibration.sequences import BETS, LIMITS, LowerBound, MeanAbove, mix_evidence, sparkline
from eecompile.errors import CalibrationError, DriftWarning, check_name, shown
from eecompile.ir.settings import EXITS
from eecompile.plain import LARGEST, as_path, check_callable, check_number, plain
from eecompile.training.report import Report, json_safe, number, percent, stacked, table
from eecompile.training.scores import agreement, choice
from eecompile.training.tasks import ANSWERS, own_task
from eecompile.writing import write_whole

REACTIONS = ("warn", "close", "recalibrate")
FORMAT = "eecompile monitor"
MOST_WAITING = 10_000
MOST_LINES = 500
"""Batches that are added to a state line by line before it is written anew."""
Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MonitorOptions:
    """Keyword arguments of `fast.monitor`.

    Attributes:
        max_drop: How much more often than on the calibration rows early and full answers may differ.
        alpha: Largest probability of any false alarm, over all time.
        shadow: Share of the rows that run to the end too.
        react: "warn"; "close": the next safer settings of the calibration, in the end no early exit; "recalibrate" with
            `loader`, each time with half of the delta before.
        limit: Largest share of differing answers that is no cause for an alarm; None: that of the calibration and max_drop.
        seed: Of the choice of rows.
    """

    max_drop: float = 0.01
    alpha: float = 0.05
    shadow: float = 0.01
    react: str = "warn"
    limit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_drop", "shadow", "limit"):
            if name != "limit" or self.limit is not None:
                check_number(name, getattr(self, name), above=0, most=1, error=CalibrationError)
        check_number("alpha", self.alpha, above=0, below=1, error=CalibrationError)
        check_number("seed", self.seed, whole=True, error=CalibrationError)
        check_name("reaction", self.react, REACTIONS, CalibrationError)


@dataclass
class MonitorState(Report):
    """What a monitor has seen.

    Attributes:
        program: The fingerprint and the exits that it was made for.
        options: See `MonitorOptions`.
        differ: The test of early answers that differ from full ones, among the shadow rows.
        bound: Lower bound of that share, at all times at once.
        drop: The test of the drop, from labels.
        counts: Rows by exit, and on the calibration rows (`before`).
        confidence: Sum of the confidences of the rows.
        alarms: Rows, mean and reaction of every alarm.
        spent: Of alpha.
        mix_alarm: Row at which the mix of exits was found to be another one; None before.
    """

    title: ClassVar[str] = "Monitor"

    program: dict[str, Any]
    options: MonitorOptions
    differ: MeanAbove
    drop: MeanAbove
    bound: LowerBound = field(default_factory=LowerBound)
    before: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    confidence: float = 0.0
    alarms: list[dict[str, Any]] = field(default_factory=list)
    spent: float = 0.0
    mix_alarm: int | None = None

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def level(self) -> float:
        """Of each of the two tests: half of alpha for a warning that comes once, else half of half of what is left."""
        left = self.options.alpha - self.spent
        return left / 2 if self.options.react == "warn" else left / 4

    @property
    def mix(self) -> float:
        """Logarithm of the evidence that the mix of exits is another one."""
        return mix_evidence(self.before, self.counts) if self.before else 0.0

    def add(self, counts: Sequence[int], confidence: float, losses: Sequence[float]) -> None:
        """A batch: its rows by exit, the sum of their confidences, and how its shadow rows differ."""
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.confidence += confidence
        if self.mix_alarm is None and self.mix >= -math.log(self.options.alpha):
            self.mix_alarm = self.rows
        if losses:
            self.differ.add(losses)
            self.bound.add(losses, self.options.alpha)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **json_safe(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MonitorState:
        """The inverse of `to_dict`.

        Raises:
            CalibrationError: No state of a monitor, or a damaged one.
        """
        fields: dict[str, Any] = {name: value for name, value in data.items() if name != "format"}
        if data.get("format") != FORMAT or fields.keys() != FIELDS.keys():
            raise CalibrationError("this is no state of a monitor", got=f"format {shown(data.get('format'))}")
        for name, like in FIELDS.items():
            if not _fits(fields[name], like):
                raise _damaged(name)
        parts = {"options": MonitorOptions, "differ": MeanAbove, "drop": MeanAbove, "bound": LowerBound}
        found = cls(**{name: parts[name](**value) if name in parts else value for name, value in fields.items()})
        ends = len(found.program["exits"]) + 1
        if len(found.counts) != ends or len(found.before) not in (0, ends) or not 0 <= found.spent <= found.options.alpha:
            raise _damaged("counts, before or spent")
        if not (found.differ.history and found.drop.history):
            raise _damaged("an empty history")
        return found

    def _threshold(self) -> str:
        return f"alarm at e^{number(-math.log(self.level), 3)}" if self.level > 0 else "alpha is spent"

    def __rich__(self) -> RenderableType:
        names = [*self.program["exits"], "model"]
        n, m = max(self.rows, 1), max(sum(self.before), 1)
        before = self.before or [math.nan] * len(names)
        cells = [[e, percent(a / n, 1), percent(b / m, 1)] for e, a, b in zip(names, self.counts, before, strict=True)]
        d = self.differ
        lines = [
            f"{self.rows} rows, {d.rows} of them shadow rows: {percent(d.mean)} of their early answers differ, at most "
            f"{percent(d.limit)} are no cause for an alarm; surely above {percent(self.bound.ruled_out)}",
            f"wealth {sparkline(d.history)} now e^{number(d.now, 3)}, " + self._threshold(),
        ]
        if self.drop.rows:
            lines.append(
                f"{self.drop.rows} labels: drop {percent(self.drop.mean)}, wanted at most {percent(self.drop.limit)}"
            )
        if self.mix_alarm is not None:
            lines.append(f"the mix of exits is another one than on the calibration rows (since row {self.mix_alarm})")
        lines += [f"ALARM at {a['rows']} rows: {a['what']} {percent(a['mean'])}; {a['did']}" for a in self.alarms]
        lines += [] if self.alarms else ["no alarm"]
        return stacked(table(self.title, ["exit", "leaving", "calibration"], cells), *lines)


MEAN = {
    "limit": float, "low": float, "rows": int, "total": float, "wealth": (float, len(BETS)), "largest": float,
    "history": [(float, 2)],
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "program": {"exits": [str], "weights": str},
    "options": dict.fromkeys(vars(MonitorOptions()), object),  # checked as they are made
    "differ": MEAN,
    "drop": MEAN,
    "bound": {"wealth": ((float, len(BETS)), len(LIMITS)), "ruled_out": float},
    "before": [float],
    "counts": [int],
    "confidence": float,
    "alarms": [{"rows": int, "shadow": int, "what": str, "mean": float, "level": float, "did": str}],
    "spent": float,
    "mix_alarm": int | None,
}
"""What the JSON of a state is like: `[kind]` is a list, `(kind, n)` one of n values."""


def _fits(value: Any, like: Any) -> bool:
    """Whether JSON is like that. Numbers are finite, whole ones 0 or more."""
    if isinstance(like, tuple):
        return isinstance(value, list) and len(value) == like[1] and all(_fits(v, like[0]) for v in value)
    if isinstance(like, list):
        return isinstance(value, list) and all(_fits(v, like[0]) for v in value)
    if isinstance(like, dict):
        return isinstance(value, dict) and value.keys() == like.keys() and all(_fits(value[k], like[k]) for k in like)
    if like is float or like is int:
        number = isinstance(value, int if like is int else int | float) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST and (like is float or value >= 0)
    return isinstance(value, like) and not isinstance(value, bool)


def _damaged(what: str, path: Any = None) -> CalibrationError:
    return CalibrationError(
        "this state of a monitor is damaged",
        where=None if path is None else str(path),
        got=what,
        hint="delete the file, or give another path=, to begin anew",
    )


def column(name: str, values: Any) -> Tensor:
    """Numbers that a user gave as float64 [n] on the CPU.

    Raises:
        CalibrationError: Something else, or NaN.
    """
    try:
        found = torch.as_tensor(values).detach().flatten().double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{name}: these are no numbers", got=shown(values)[:60], wanted="a tensor or list") from error
    if bool(found.isnan().any()):
        raise CalibrationError(f"{name}: NaN is among the numbers", got=f"{int(found.isnan().sum())} of {len(found)}")
    return found


def _losses(differ: Any, name: str = "differ") -> list[float]:
    found: list[float] = column(name, differ).tolist()
    if not all(0 <= d <= 1 for d in found):
        raise CalibrationError(f"{name}: differences leave [0, 1]", got=found[:5])
    return found


def _names(ids: Any, rows: int) -> list[Any]:
    """The names of rows that a user gave, for `labels` to find them by."""
    listed = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | Mapping)
    names: list[Any] | None = plain(ids.tolist() if isinstance(ids, Tensor) else list(ids)) if listed else None
    if names is None or len(names) != rows:
        got = type(ids).__name__ if names is None else f"{len(names)} names"
        raise CalibrationError("ids= is one name for each row", got=got, wanted=f"a list of {rows}")
    try:
        hash(tuple(names))
    except TypeError as error:
        raise CalibrationError("ids= are names, such as int or str", got=str(error)) from error
    return names


class Monitor:
    """Called like the compiled module. Several threads may call it.

    Args:
        fast: A calibrated module.
        options: See `MonitorOptions`.
        path: Where the state is kept after every batch with news; a state that is there already goes on.
        loader: Rows with labels for `react="recalibrate"`.
        compare: `(early, full) -> [B]` in [0, 1], how much predictions differ; None: whether the largest score does.

    Raises:
        CalibrationError: A program that is not calibrated, or was changed since; a state of another program or of other
            options; options out of range.
    """

    def __init__(
        self,
        fast: Any,
        options: MonitorOptions,
        path: str | Path | None = None,
        loader: Any = None,
        compare: Compare | None = None,
    ) -> None:
        check_callable("compare", compare, "(early, full) -> [B] in [0, 1]", CalibrationError)
        if loader is not None and (isinstance(loader, str) or not isinstance(loader, Iterable)):
            raise CalibrationError(
                "loader= is rows with labels", got=shown(loader)[:80], wanted="batches of (inputs, labels)"
            )
        self.fast, self.loader, self.compare = fast, loader, compare
        self.path = None if path is None else as_path("path", path, CalibrationError)
        guarantee = fast.guarantee
        if guarantee is None:
            raise CalibrationError(
                "there is nothing to watch: this program has no guarantee",
                hint="fast.calibrate(loader, max_drop=...) with a delta first",
            )
        void = guarantee.void(fast)
        if void:
            raise CalibrationError(
                f"there is nothing to watch: the guarantee is void: {void}", hint="calibrate again, then monitor"
            )
        if options.react == "recalibrate" and loader is None:
            raise CalibrationError("recalibration needs rows with labels", wanted="loader=")
        self.options = options
        exits = [e.name for e in fast.exits]
        before = [share * guarantee.rows for share in guarantee.shares]
        program = {"exits": exits, "weights": guarantee.made_for["weights"]}
        self.state = MonitorState(
            program, options, MeanAbove(self._limit()), MeanAbove(guarantee.max_drop, -1.0), before=before,
            counts=[0] * (len(exits) + 1),
        )  # fmt: skip
        self.lock = threading.RLock()
        self.random = random.Random(options.seed)
        self.until = self._gap(options.shadow)  # rows before the next shadow row
        self.lines = 0  # of the state in `path` that this monitor has written: 0 before the first, then the batches since
        self.waiting: OrderedDict[Any, tuple[int, int]] = OrderedDict()
        if self.path is not None and not self.path.parent.is_dir():
            raise CalibrationError("the monitor's state cannot be written", where=str(self.path), got="no such directory")
        if self.path is not None and self.path.exists():
            self.load(self.path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the compiled module gives."""
        return self.run(*args, **kwargs).output

    def run(self, *args: Any, ids: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """The `Result` of the compiled module; some of the rows run to the end too.

        Args:
            ids: A name for each row, by which `labels` may be given later.
        """
        result = self.fast.run(*args, **kwargs)
        self.watch(result, args, kwargs, ids=ids)
        return result

    def watch(
        self, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, rows: Any = None, ids: Any = None
    ) -> None:
        """Rows that were answered already; some of them run to the end too.

        Args:
            result: Of the compiled module for these arguments.
            rows: Which rows count, int64 [b]; all by default.
            ids: As for `run`.
        """
        n = len(result.exit_index)
        names = None if ids is None else _names(ids, n)
        index, confidence, losses = result.exit_index, result.confidence, []
        chosen = self._chosen(n if rows is None else len(rows))
        if rows is not None:
            there = rows.to(index.device)
            index, confidence = index[there], confidence[there]
        if chosen:
            at = torch.tensor(chosen) if rows is None else rows[chosen]
            early = self.fast.prediction_of(result.output)[at.to(index.device)].detach()
            full = self._full(args, kwargs, at)
            losses = self._differ(early, full)
            if names is not None:
                self._remember([names[i] for i in at.tolist()], early, full)
        counts = torch.bincount(index, minlength=len(self.state.counts)).tolist()
        self._add(counts, float(confidence.sum()), losses)

    def take(self, exit_index: Any, confidence: Any = None, differ: Any = None) -> None:
        """Rows that were answered elsewhere, such as by an exported program.

        Args:
            exit_index: [B] whole numbers from 0 to the number of exits.
            confidence: [B]; None where it is not known.
            differ: [b] in [0, 1], for rows that were chosen at random and run to the end: whether answers differ.

        Raises:
            CalibrationError: Exits that this program does not have, or numbers out of range.
        """
        found = column("exit_index", exit_index)
        index = found.long()
        if not torch.equal(index.double(), found):
            raise CalibrationError("exits are whole numbers", got=found[:5].tolist())
        ends = len(self.state.counts)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < ends:
            raise CalibrationError(
                "this is a log of another program", got=f"exit {int(index.max())}", wanted=f"0 to {ends - 1}"
            )
        losses = [] if differ is None else _losses(differ)
        sure = None if confidence is None else column("confidence", confidence)
        if sure is not None and len(sure) != len(index):
            raise CalibrationError("one confidence for each row", got=len(sure), wanted=len(index))
        self._add(torch.bincount(index, minlength=ends).tolist(), 0.0 if sure is None else float(sure.sum()), losses)

    def _add(self, *batch: Any) -> None:
        """What `MonitorState.add` takes."""
        if not math.isfinite(batch[1]):
            raise CalibrationError("confidence: NaN or infinity is among the numbers", got=batch[1])
        with self.lock:
            state, same_mix = self.state, self.state.mix_alarm is None
            state.add(*batch)
            self._keep(batch)
            if same_mix and state.mix_alarm is not None:
                warnings.warn(
                    f"the mix of exits has changed after {state.rows} rows; shadow rows show whether answers have",
                    DriftWarning,
                    stacklevel=3,
                )
            if batch[2]:
                self._react(state.differ, "of the early answers differ:")

    def labels(self, given: Mapping[Any, int]) -> int:
        """Labels, by the `ids` of `run`, of rows that ran to the end; others are passed over. How many were taken."""
        if not isinstance(given, Mapping):
            raise CalibrationError("labels go by the ids of run", got=shown(given)[:80], wanted="{id: class}")
        classes = {i: column(f"the label of {shown(i)}", label) for i, label in given.items()}
        for i, label in classes.items():
            if len(label) != 1 or not float(label).is_integer():
                raise CalibrationError("a late label is the class of one row", where=repr(i), got=label.tolist())
        with self.lock:
            found = [(self.waiting.pop(i), int(label)) for i, label in classes.items() if i in self.waiting]
            self.state.drop.add([float(full == label) - float(early == label) for (early, full), label in found])
            if found:
                self._keep()
                self._react(self.state.drop, "drop against labels:")
            return len(found)

    def _limit(self) -> float:
        """Largest share of differing answers that is no cause for an alarm."""
        guarantee, options = self.fast.guarantee, self.options
        usual = 0.0 if guarantee.target == "agreement" else guarantee.disagreement
        if options.limit is not None:
            return options.limit
        if usual is None:
            raise CalibrationError(
                "calibration saw no classes that could differ", got=guarantee.target, wanted="limit= and compare="
            )
        return min(usual + options.max_drop, 0.99)

    # ------------------------------------------------------------------ rows that run to the end

    def _chosen(self, n: int) -> list[int]:
        """Shadow rows among the next n. Gaps between them are drawn, which costs nothing where there is none."""
        share, found = self.state.options.shadow, []
        with self.lock:
            while self.until < n:
                found.append(self.until)
                self.until += 1 + self._gap(share)
            self.until -= n
        return found

    def _gap(self, share: float) -> int:
        """How many rows are passed over before the next shadow row: geometric, as if each row were drawn by itself."""
        return int(min(math.log1p(-self.random.random()) / math.log1p(-share), 1e18)) if share < 1 else 0

    def _full(self, args: Any, kwargs: Any, at: Tensor) -> Tensor:
        """The full model's prediction for some rows of a call."""
        fast = self.fast
        signature = fast.program.signature
        flat = fast.flatten(args, kwargs)
        rows = [
            t if leaf.batch_axis is None else t.index_select(leaf.batch_axis, at.to(t.device))
            for t, leaf in zip(flat, signature.inputs, strict=True)
        ]
        with torch.no_grad():
            found: Tensor = fast.prediction_of(signature.restore(list(fast.engine.full_graph()(*rows)), rows))
        return found

    def _differ(self, early: Tensor, full: Tensor) -> list[float]:
        if self.compare is None:
            return _losses(1 - agreement(early, full, each=own_task(self.fast) == ANSWERS))
        found = _losses(self.compare(early, full), "compare=")
        if len(found) != len(early):
            raise CalibrationError("compare= gives one number for each row", got=len(found), wanted=len(early))
        return found

    def _remember(self, ids: Sequence[Any], early: Tensor, full: Tensor) -> None:
        if early.ndim != 2 or (early.shape[1] > 1 and own_task(self.fast) == ANSWERS):
            raise CalibrationError("late labels are for one class for each row", got=f"predictions {list(early.shape)}")
        with self.lock:
            self.waiting.update(zip(ids, zip(choice(early).tolist(), choice(full).tolist(), strict=True), strict=True))
            while len(self.waiting) > MOST_WAITING:
                self.waiting.popitem(last=False)

    # ------------------------------------------------------------------ alarms

    def _react(self, test: MeanAbove, what: str) -> None:
        """Reacts once the wealth is large enough; the two tests share alpha."""
        state = self.state
        level = state.level
        if level <= 0 or not test.alarm(level):
            return
        did = {"warn": self._warn, "close": self._close, "recalibrate": self._recalibrate}[state.options.react]()
        state.spent += 2 * level
        alarm = {"rows": state.rows, "shadow": test.rows, "what": what, "mean": test.mean, "level": level, "did": did}
        state.alarms.append(alarm)
        state.differ, state.drop = MeanAbove(self._limit()), MeanAbove(self.fast.guarantee.max_drop, -1.0)
        state.bound, state.counts, state.before = LowerBound(), [0] * len(state.counts), []
        self.waiting.clear()
        self._keep()
        warnings.warn(
            f"drift: {what} {percent(test.mean)}, at most {percent(test.limit)} was expected; {did}",
            DriftWarning,
            stacklevel=4,
        )

    def _warn(self) -> str:
        return "settings stay as they are"

    def _close(self) -> str:
        fast = self.fast
        steps, now = [fast.guarantee.settings, *fast.guarantee.safer], fast.settings.to_dict()
        at = steps.index(now) if now in steps else len(steps)
        if at + 1 < len(steps):
            fast.settings = fast.settings.from_dict(steps[at + 1])
            return f"safer settings are set, step {at + 1} of {len(steps) - 1}"
        fast.settings = fast.settings.neutral()
        return "all exits are closed" if EXITS in fast.settings else "nothing is skipped"

    def _recalibrate(self) -> str:
        old = self.fast.guarantee
        delta = old.delta / 2
        target = "accuracy" if old.target == "metric" else old.target
        report = self.fast.calibrate(self.loader, max_drop=old.max_drop, delta=delta, target=target)
        if self.fast.guarantee is None:  # nothing qualified: what is watched stays, with all exits closed
            self.fast.guarantee = old
        return f"calibrated again with delta {delta:g}: expected cost {percent(report.expected_cost, 1)}"

    # ------------------------------------------------------------------ state

    def __reduce__(self) -> Any:
        raise CalibrationError(
            "a monitor cannot be pickled or copied: its threads share a lock",
            hint="save(path) keeps its state, and fast.monitor(path=path) goes on from there",
        )

    def save(self, path: str | Path) -> None:
        """Writes the state as JSON, in one step."""
        place = as_path("path", path, CalibrationError)
        with self.lock:
            text = json.dumps(self.state.to_dict(), allow_nan=False)
        try:
            write_whole(place, text)
        except OSError as error:
            raise _unwritable(place, error) from error

    def load(self, path: str | Path) -> None:
        """Goes on from a saved state.

        Raises:
            CalibrationError: No state of a monitor, or one of another program or of other options.
        """
        state = read_state(path)
        if state.program != self.state.program:
            raise CalibrationError("this state is of another program", where=str(path), got=state.program["exits"])
        was, now = asdict(state.options), asdict(self.options)
        differ = [name for name in now if now[name] != was[name]]
        if differ:
            raise CalibrationError(
                "this state was kept with other options",
                where=str(path),
                got=", ".join(f"{name}={now[name]!r}" for name in differ),
                wanted=", ".join(f"{name}={was[name]!r}" for name in differ),
                hint="give the options of before, or another path= to begin anew",
            )
        with self.lock:
            self.state = state

    def _keep(self, batch: Sequence[Any] | None = None) -> None:
        """Writes the state, or adds a line to it for one more batch: the whole state takes longer to write."""
        if self.path is None:
            return
        lines, self.lines = self.lines, 0  # where a line cannot be written whole, the state is written anew
        if batch is None or not 0 < lines < MOST_LINES or not _append(self.path, f"\n{json.dumps(batch)}".encode()):
            self.save(self.path)
            lines = 0
        self.lines = lines + 1

    def __str__(self) -> str:
        return str(self.state)


def read_state(path: str | Path) -> MonitorState:
    """A state that a `Monitor` keeps: JSON, then a line of JSON for each batch since. A last line that is cut short is no
    batch: the process was killed as it wrote.

    Raises:
        CalibrationError: It cannot be read, or is something else.
    """
    try:
        text, *lines = as_path("path", path, CalibrationError).read_text(encoding="utf-8").split("\n")
        data, batches = json.loads(text), []
        for i, line in enumerate(lines):
            try:
                batches.append(json.loads(line))
            except ValueError:
                if i + 1 < len(lines):
                    raise
    except (OSError, ValueError) as error:
        raise CalibrationError("the monitor's state cannot be read", where=str(path), got=str(error)) from error
    if not isinstance(data, dict):
        raise CalibrationError("this is no state of a monitor", where=str(path), got=type(data).__name__)
    try:
        state = MonitorState.from_dict(data)
    except CalibrationError as error:
        raise CalibrationError(error.what, where=str(path), got=error.got, wanted=error.wanted, hint=error.hint) from error
    for batch in batches:
        like = ((int, len(state.counts)), float, [float])
        whole = isinstance(batch, list) and len(batch) == 3 and all(map(_fits, batch, like))
        if not whole or not all(0 <= loss <= 1 for loss in batch[2]):
            raise _damaged(f"a batch {shown(batch)[:60]}", path)
        state.add(*batch)
    return state


def _append(path: Path, line: bytes) -> bool:
    """Whether there was a file to add the line to."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)  # open() takes four times as long
        try:
            if os.write(file, line) != len(line):
                raise OSError("the line was cut short")
        finally:
            os.close(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unwritable(path, error) from error
    return True


def _unwritable(path: Path, error: OSError) -> CalibrationError:
    return CalibrationError("the monitor's state cannot be written", where=str(path), got=str(error))
