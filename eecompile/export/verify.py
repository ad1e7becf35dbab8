"""Runs an exported program in its runtime: is it right, row by row, and does it save what its exits should save."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.costs import CostModel
from eecompile.errors import EecompileError, ExportError
from eecompile.export import targets
from eecompile.export.runtimes import Opened, opened
from eecompile.export.targets import TARGETS
from eecompile.ir.settings import EXITS, GATES, Settings
from eecompile.measuring import rounds_of
from eecompile.passes.lower_cond import example_of
from eecompile.program import Program
from eecompile.runtime.outcome import Outcome
from eecompile.runtime.reference import ReferenceExecutor
from eecompile.training.batches import batches
from eecompile.training.report import Report, json_safe, number, percent, stacked, table

SIZES = (1, 2, 5, 64)
NEAR = 1e-3
"""A confidence that is no further than this from its threshold may be rounded to either side."""
ROUNDED = 2e-2
"""How far activations that are rounded to integers carry a sum in another order: both what an output of a quantized program
may be off, relative to the largest value, and how near to a threshold its rows are left out."""
CHECKED = (1, 2, 37)
"""Batch sizes at which compiled code is compared before it is given out."""
QUICK = 1e-2
"""Seconds: what the runtime spends around a shorter call hides what its exits save."""
FULL = -1
SAVED = 0.25
"""Least share of the expected saving that has to be measured: a runtime that computes every branch saves nothing."""
TRIES = 3
"""Measurements that must all say so: what other processes do to a machine is no fault of the program."""


@dataclass
class ExportReport(Report):
    """Whether an exported program is right and saves.

    Attributes:
        ok: Whether nothing is wrong.
        problems: What is wrong, one sentence each.
        target: The runtime that it was run in.
        rows: Rows compared.
        sizes: Batch sizes that they were compared at.
        near: Rows, by batch and row of the loader, that were left out: a confidence or score of theirs is within 1e-3 of its
            threshold, or 2e-2 where activations are quantized.
        largest_difference: Of an output of the other rows, relative to the largest value of the reference.
        times: For each place that rows leave at: `rows` per call, `seconds` per call of the quickest round, `full_seconds`
            of the full model in the same runtime, their `ratio`, and the `cost` that the ratio would be if only FLOPs
            counted.
        notes: What could not be verified.
    """

    title: ClassVar[str] = "exported program"

    target: str
    rows: int
    sizes: list[int]
    problems: list[str] = field(default_factory=list)
    near: list[dict[str, int]] = field(default_factory=list)
    largest_difference: float = 0.0
    times: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        safe: dict[str, Any] = json_safe({"ok": self.ok, **vars(self)})
        return safe

    def __rich__(self) -> RenderableType:
        head = (
            f"{self.rows} rows at batch sizes {', '.join(map(str, self.sizes))}, {len(self.near)} of them near a threshold"
        )
        head += f"; largest difference {number(self.largest_difference, 2)}"
        rows = [
            [t["name"], str(t["rows"]), f"{1e3 * t['seconds']:.3f}", f"{1e3 * t['full_seconds']:.3f}", f"{t['ratio']:.3f}"]
            + [percent(t["cost"], 1)]
            for t in self.times
        ]
        columns = ["leaves at", "rows", "ms", "full model, ms", "ratio", "cost in FLOPs"]
        said = [f"problem: {p}" for p in self.problems] + self.notes + ["ok" if self.ok else "not ok"]
        return stacked(table(f"{self.target}: {head}", columns, rows), *said)


def verify_export(
    program: Program, settings: Settings, path: Any, loader: Iterable[Any], *, rounds: int = 7
) -> ExportReport:
    """Runs an exported program in its runtime at several batch sizes, and compares every row with the reference.

    Args:
        program: What it was exported from.
        settings: Any of this program; those that the file was written with are used.
        loader: Yields batches as for `evaluate`; labels are not read. The first two are used.
        rounds: Of each measurement of time.

    Raises:
        ExportError: The file is not one of `export`, or the runtime refuses it.
        MissingDependencyError: The runtime is not installed.
    """
    found = opened(path)
    return _Check(program, settings.from_dict(found.description.settings), found, rounds).run(loader)


def export(program: Program, settings: Settings, path: Any, target: Any = "pt2") -> Path:
    """Writes the program for a runtime, with its exits, and gives the path.

    Code that a compiler made is compared with the reference at a few batch sizes, on random inputs, before it is put there.

    Args:
        path: A file whose name ends as the target asks for.
        target: One of `TARGETS`.

    Raises:
        ExportError: An unknown target, a name that does not fit, a place that cannot be written to, a program that has no
            such form, or compiled code that gives other outputs; the message says what and why.
        MissingDependencyError: The target needs packages that are not installed.
    """

    def check(written: Path) -> None:
        compared = _Check(program, settings, opened(written), rounds=0)
        low, high = program.signature.dynamic["batch"]
        for size in [n for n in CHECKED if n >= low and (high is None or n <= high)] or [low]:
            compared.compare(_random_inputs(program, size), 0, size)
        if compared.report.problems:
            raise ExportError(
                "the code that was compiled from the program is not the program",
                got=compared.report.problems[0],
                hint='target="pt2" or "onnx" needs no compiler; nothing was written',
            )

    return targets.export(program, settings, path, target, check)


def _random_inputs(program: Program, rows: int) -> list[Tensor]:
    """Integers are 0 or 1, which every table has, and masks are open."""
    random = torch.Generator().manual_seed(rows)
    found = []
    for leaf, example in zip(program.signature.inputs, example_of(program, program.signature.dynamic), strict=True):
        shape = [rows if i == leaf.batch_axis else n for i, n in enumerate(example.shape)]
        if leaf.dtype.is_floating_point:
            made = torch.randn(shape, generator=random).to(leaf.dtype)
        elif leaf.dtype == torch.bool:
            made = torch.ones(shape, dtype=leaf.dtype)
        else:
            made = torch.randint(0, 2, shape, generator=random, dtype=leaf.dtype)
        found.append(made.to(example.device))
    return found


class _Check:
    def __init__(self, program: Program, settings: Settings, found: Opened, rounds: int) -> None:
        self.program, self.settings, self.found, self.rounds = program, settings, found, rounds
        self.reference = ReferenceExecutor(program)
        self.rounded = rounds_activations(program)
        self.report = ExportReport(found.description.target, 0, [])
        self.left: dict[int, tuple[list[Tensor], int]] = {}  # by exit: a batch and one of its rows that leaves there

    def run(self, loader: Iterable[Any]) -> ExportReport:
        for batch in batches(loader):
            flat = self.program.signature.flatten(batch.args, batch.kwargs)
            sizes = [self.program.signature.batch_size(flat)]
            sizes = sizes if batch.index else list(dict.fromkeys((*self._admitted(), *sizes)))
            for size in sizes:
                self.compare(self._rows(flat, [i % sizes[-1] for i in range(size)]), batch.index, sizes[-1])
            if batch.index == 1:
                break
        if not self.report.rows:
            raise EecompileError("the loader yields no batch", wanted="at least one batch of inputs")
        self._measure()
        return self.report

    def _admitted(self) -> list[int]:
        low, high = self.program.signature.dynamic["batch"]
        return [s for s in SIZES if s >= low and (high is None or s <= high)]

    def _rows(self, flat: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        inputs = self.program.signature.inputs
        at = torch.tensor(rows)
        axes = [leaf.batch_axis for leaf in inputs]
        return [t if a is None else t.index_select(a, at.to(t.device)) for t, a in zip(flat, axes, strict=True)]

    def _outcome(self, flat: Sequence[Tensor]) -> Outcome:
        with torch.no_grad():
            return self.reference.run(flat, self.settings)

    # -------------------------------------------------------------- numbers

    def compare(self, flat: list[Tensor], batch: int, distinct: int) -> None:
        report, want = self.report, self._outcome(flat)
        size = len(want.exit_index)
        *leaves, index, _ = self.found.run(flat)
        near = self._near(want)
        rows = [{"batch": batch, "row": i} for i in sorted({int(i) % distinct for i in near.nonzero().flatten()})]
        report.near += [r for r in rows if r not in report.near]
        report.rows += size
        report.sizes = sorted({*report.sizes, size})
        for row in (~near).nonzero().flatten().tolist():
            self.left.setdefault(int(want.exit_index[row]), (flat, row))
        wrong = ((index != want.exit_index) & ~near).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            report.problems.append(
                f"{len(wrong)} of {size} rows leave elsewhere than in the reference, row {row % distinct} of batch {batch} "
                f"at {int(index[row])} in place of {int(want.exit_index[row])}"
            )
        signature = self.program.signature
        wanted = signature.flatten_output(self.program.restore(want.leaves, flat))
        for leaf, a, b in zip(signature.outputs, leaves, wanted, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                report.problems.append(f"{leaf.path} is {a.dtype} {list(a.shape)}, wanted {b.dtype} {list(b.shape)}")
                continue
            keep = (~near & (index == want.exit_index)).nonzero().flatten()
            if leaf.batch_axis is not None:
                a, b = a.index_select(leaf.batch_axis, keep), b.index_select(leaf.batch_axis, keep)
            off = _difference(a, b)
            report.largest_difference = max(report.largest_difference, off)
            if off > tolerance(b.dtype, self.rounded):
                report.problems.append(f"{leaf.path} differs by {off:.1e} of its largest value at batch size {size}")

    def _near(self, want: Outcome) -> Tensor:
        """Rows [B] with a confidence or a gate's score next to its threshold; what is counted, as patience is, is exact."""
        assert want.confidences is not None
        exits = zip(self.program.exits, want.confidences, self.settings[EXITS], strict=False)
        pairs = [(c, t) for e, c, t in exits if t <= 1 and not e.criterion.stateful]
        gates = self.settings.to_dict().get(GATES, {})
        scores = ((want.reports.get(f"{name}.score"), t) for name, t in gates.items())
        pairs += [(s, t) for s, t in scores if s is not None and 0 < t <= 1]
        found = torch.zeros_like(want.exit_index, dtype=torch.bool)
        for value, threshold in pairs:
            found |= (value.float() - threshold).abs() <= (ROUNDED if self.rounded else NEAR)
        return found

    # -------------------------------------------------------------- time

    def _measure(self) -> None:
        if not self.left:
            self.report.notes.append("every row is near a threshold: times are not measured")
            return
        with tempfile.TemporaryDirectory() as folder:
            name = f"full{TARGETS[self.report.target].suffix}"
            full = opened(targets.export(self.program, self.settings.neutral(), Path(folder) / name, self.report.target))
            for _ in range(TRIES):
                times, rows = self._times(full)
                said = self._every_branch(times, rows)
                if not said:
                    break
        self.report.problems += [said] if said else []
        names, costs, whole = self._names(), self._costs(), min(times[FULL])
        for k in sorted(self.left):
            quickest = min(times[k])
            own = {"seconds": quickest, "full_seconds": whole, "ratio": quickest / whole, "cost": costs[k]}
            self.report.times.append({"name": names[k], "rows": rows, **own})
        unseen = [names[k] for k in self.settings.open_exits if k not in self.left]
        self.report.notes += [f"no row leaves at {name}: its time is not measured" for name in unseen]
        if whole < QUICK:
            self.report.notes.append(
                f"a call takes {1e3 * whole:.2f} ms at {rows} rows: too short to see whether the runtime computes every "
                "branch"
            )

    def _names(self) -> list[str]:
        return [*(e.name for e in self.program.exits), "the end"]

    def _costs(self) -> Sequence[float]:
        return CostModel(self.program).at_exits(self.settings)

    def _times(self, full: Opened) -> tuple[dict[int, list[float]], int]:
        """Seconds of a call in each round, by where its rows leave, and of the full model; and the rows of a call."""
        found: dict[int, list[float]] = {}
        for size in (8, 64, 256):
            calls = {k: self._rows(flat, [row] * size) for k, (flat, row) in self.left.items()}
            run = {str(k): partial(self.found.run, call) for k, call in calls.items()}
            run[str(FULL)] = partial(full.run, next(iter(calls.values())))
            measured = rounds_of(run, self.rounds)
            found = {int(name): seconds for name, seconds in measured.times.items()}
            if min(found[FULL]) >= QUICK:
                break
        return found, size

    def _every_branch(self, times: dict[int, list[float]], rows: int) -> str:
        """What says that rows that leave first take as long as those that leave last, or as the full model; else empty."""
        names, costs = self._names(), self._costs()
        first, last = min(self.left), max(self.left)
        before, cost = (times[last], costs[last]) if last != first else (times[FULL], 1.0)
        expected = 1 - costs[first] / cost
        share = min(times[first]) / min(before)
        if expected <= 0 or min(before) < QUICK or 1 - share >= SAVED * expected:
            return ""
        return (
            f"the runtime computes every branch: {rows} rows that leave at {names[first]} take {share:.2f} of the "
            f"time of those that leave at {names[last]}, where they cost {costs[first] / cost:.2f} of the FLOPs"
        )


def rounds_activations(program: Program) -> bool:
    """Whether a graph that was quantized rounds activations to integers."""
    names = (str(getattr(n.target, "_opname", "")) for n in program.source.graph.nodes)
    return any(name.startswith("quantize") for name in names)


def tolerance(dtype: torch.dtype, rounded: bool = False) -> float:
    """How far an output may be from the reference's, relative to the largest value: runtimes sum in orders of their own."""
    if not dtype.is_floating_point:
        return 0.0
    if rounded:
        return ROUNDED
    return 1e-4 if torch.finfo(dtype).eps < 1e-4 else 20 * torch.finfo(dtype).eps


def _difference(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    if not b.dtype.is_floating_point:
        return 0.0 if torch.equal(a, b) else math.inf
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
