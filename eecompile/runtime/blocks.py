"""The compact executor for models that were captured as blocks: gather on entry of a block, scatter on its exit.

Python between the blocks runs with the full batch; rows that have exited are zeros there. When no row is active any more the
model's forward is abandoned.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eecompile.capture.adapter import mode
from eecompile.capture.blocks import Axis, BlocksModel, Tap
from eecompile.errors import CaptureError, UnsupportedModelError
from eecompile.ir.settings import EXITS, TEMPERATURES_BUFFER, Settings
from eecompile.kernels.combine import ensemble, keep_best, weighted_ensemble
from eecompile.kernels.confidence import confidence as confidence_of
from eecompile.kernels.confidence import yes_or_no
from eecompile.passes.insert_exits import COMBINATION, masks_positions
from eecompile.program import Program
from eecompile.runtime.limits import Allowance
from eecompile.runtime.outcome import Outcome, assemble, times_of
from eecompile.runtime.precision import OutputDtypes
from eecompile.runtime.survivors import Survivors
from eecompile.runtime.timing import StageTimes


class _NoRowsLeft(BaseException):
    """Ends the model's forward where no row is active any more, or where the call is stopped.

    Not an Exception, so that the model's own handlers let it through.
    """


class BlocksExecutor:
    """Runs the user's Python model with fewer rows inside its blocks.

    Hooks are on the user's modules while a call runs; calls of this executor wait for one another, calls of the model
    itself from other threads are not touched.
    """

    name = "compact"

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._dtypes = OutputDtypes(program)
        self._running: set[_Call] = set()
        self.times = times_of(program)

    def reset(self) -> None:
        self.times.forget()

    def run(
        self,
        flat: Sequence[Tensor],
        settings: Settings,
        want_confidence: bool = False,
        allowance: Allowance | None = None,
    ) -> Outcome:
        with self._lock:
            dtypes = self._dtypes.of(flat)
            call = _Call(self.program, flat, dtypes, settings, want_confidence, allowance or Allowance(), self.times)
            self._running.add(call)
            try:
                return call.outcome()
            finally:
                self._running.discard(call)

    def stream(self, flat: Sequence[Tensor], settings: Settings, allowance: Allowance) -> Generator[Outcome, None, None]:
        raise UnsupportedModelError(
            "there is no stream of a model that was captured as blocks",
            got="the model's own Python, which runs from start to end and cannot pause between two exits",
            wanted='capture="export"',
            hint="deadline_ms=, budget= and interrupt() work here too",
        )

    def measure(self, flat: Sequence[Tensor], settings: Settings) -> None:
        self.run(flat, settings, True, Allowance(deadline=math.inf))

    def interrupt(self) -> int:
        running = list(self._running)
        for call in running:
            call.interrupted = True
        return len(running)


def take(t: Any, axis: Axis, rows: Tensor, size: int) -> Any:
    """The given rows of a value whose batch axis may hold several rows for each sample."""
    if axis is None or not isinstance(t, Tensor):
        return t
    i, factor = axis
    if factor == 1:
        return t.index_select(i, rows)
    split = t.unflatten(i, (size, factor))  # type: ignore[no-untyped-call]
    return split.index_select(i, rows).flatten(i, i + 1)


def spread(t: Any, axis: Axis, rows: Tensor, size: int) -> Any:
    """The inverse: a value of the full batch with zeros where rows have left."""
    if axis is None or not isinstance(t, Tensor):
        return t
    i, factor = axis
    shape = list(t.shape)
    shape[i] = size * factor
    full = t.new_zeros(shape)
    if factor == 1:
        return full.index_copy(i, rows, t)
    split = full.unflatten(i, (size, factor)).index_copy(i, rows, t.unflatten(i, (rows.numel(), factor)))  # type: ignore[no-untyped-call]
    return split.flatten(i, i + 1)


class _Call:
    """One call of the model."""

    def __init__(
        self,
        program: Program,
        flat: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        settings: Settings,
        want_confidence: bool,
        allowance: Allowance,
        times: StageTimes,
    ) -> None:
        assert program.marked is not None
        self.program, self.flat, self.want_confidence = program, list(flat), want_confidence
        self.thresholds, self.dtypes = settings[EXITS], dtypes
        self.model: BlocksModel = program.marked.get_submodule("model")  # type: ignore[assignment]
        index, axis = program.signature.batch_input
        first = flat[index]
        self.in_ = Survivors(first.shape[axis], first.device, len(program.exits), dtypes[program.prediction.index or 0])
        self.taps: dict[str, Tap] = {t.name: t for t in self.model.found.taps}
        self.exits = {e.cut: (i, e) for i, e in enumerate(program.exits) if i in settings.open_exits}
        self.counts: dict[str, int] = {}
        self.state: Tensor | None = None
        self.memory: Tensor | None = None
        self.names = [n.name for n in program.marked.graph.nodes if n.op == "placeholder"]
        self.temperatures = settings.tensors(first.device)[TEMPERATURES_BUFFER]
        self.allowance, self.times = allowance, times
        self.interrupted = False
        self.stopped: str | None = None
        self.open = sorted(i for i, _ in self.exits.values())
        self.passed, self.started = -1, times.clock()  # the last exit, and when the work after it began

    def outcome(self) -> Outcome:
        model = self.model.model
        thread = threading.get_ident()
        handles = []
        for name in self.model.found.modules:
            module = model.get_submodule(name)

            def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                return self.enter(name, args, kwargs) if threading.get_ident() == thread else None

            def after(m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                return self.leave(name, output) if threading.get_ident() == thread else None

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        leaves: list[Tensor | None] = [None] * len(self.program.signature.outputs)
        try:
            with mode(model, False):
                output = self.model.invoke(self.flat)
            leaves = self.end(output)
        except _NoRowsLeft:
            pass
        finally:
            for h in handles:
                h.remove()
        outcome = assemble(self.program, self.flat, self.in_, leaves, self.dtypes, self.want_confidence)
        outcome.stopped = self.stopped
        deadline = self.allowance.deadline
        outcome.late = self.allowance.over or (deadline is not None and self.times.clock() > deadline)
        return outcome

    def why_stop(self, exit_index: int, rows: int) -> str | None:
        """Why the rows that are still in must not go on."""
        if self.interrupted:
            return "interrupt"
        if self.allowance.deepest is not None and exit_index >= self.allowance.deepest:
            return "budget"
        if self.allowance.deadline is None:
            return None
        now = self.times.clock()
        self.times.add((self.passed, exit_index), rows, now - self.started)
        nearest = next((k for k in self.open if k > exit_index), len(self.program.exits))
        self.passed, self.started = exit_index, now
        if now + self.times.predict((exit_index, nearest), rows) > self.allowance.deadline:
            self.times.refused((exit_index, nearest))
            return "deadline"
        return None

    def tap(self, name: str) -> Tap:
        k = self.counts.get(name, 0)
        full = name if k == 0 else f"{name}@{k}"
        if full not in self.taps:
            raise CaptureError(
                "a block is called more often than when the model was captured",
                where=full,
                hint="compile again with an example that runs every block",
            )
        return self.taps[full]

    def enter(self, name: str, args: Any, kwargs: Any) -> Any:
        if self.in_.rows is None:
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tap = self.tap(name)
        if tuple(isinstance(t, Tensor) for t in leaves) != tap.given:
            raise CaptureError(
                "a block is called with other arguments than when the model was captured",
                where=tap.name,
                got=f"{sum(isinstance(t, Tensor) for t in leaves)} tensors, of which the rows that are left are unknown",
                wanted=f"{sum(tap.given)} tensors",
                hint="compile again with an example like this call (padded, where the model leaves out a mask of ones)",
            )
        taken = [take(t, a, self.in_.rows, self.in_.size) for t, a in zip(leaves, tap.inputs, strict=True)]
        return pytree.tree_unflatten(taken, spec)

    def leave(self, name: str, output: Any) -> Any:
        tap = self.tap(name)
        self.counts[name] = self.counts.get(name, 0) + 1
        leaves, spec = pytree.tree_flatten(output)
        rows = self.in_.rows
        at = self.exits.get(tap.name)
        if at is not None:
            stay = self.decide(at[0], leaves[tap.primary])
            if stay is not None and stay.numel() == 0:
                raise _NoRowsLeft
        if rows is None:
            return None
        full = [spread(t, a, rows, self.in_.size) for t, a in zip(leaves, tap.outputs, strict=True)]
        return pytree.tree_unflatten(full, spec)

    def decide(self, index: int, h: Tensor) -> Tensor | None:
        """Head and decision for the rows that are in; `h` has just those."""
        e = self.program.exits[index]
        assert self.program.marked is not None
        branch = self.program.marked.get_submodule(e.head)
        sides = [self.side(n) for n in e.head_inputs[1:]] if branch.takes_mask else []
        logits = branch(h, *sides)
        scored = logits
        if isinstance(logits, tuple):
            logits, score = logits
            scored = score if e.criterion.learned else logits
        if e.combine == "ensemble":
            logits, self.memory = ensemble(logits, self.memory)
            scored = scored if e.criterion.learned else logits
        elif e.combine == "weighted":
            own = self.program.marked.get_submodule(COMBINATION)
            logits, self.memory = weighted_ensemble(logits, self.memory, own.weights, own.bias, index)  # type: ignore[arg-type]
            scored = scored if e.criterion.learned else logits
        found, state = confidence_of(
            scored if e.criterion.learned else yes_or_no(scored, e.criterion.multi_label),
            self.state if e.criterion.stateful else None,
            e.criterion.name,
            self.temperatures[index],
            patience=e.criterion.patience,
            reduce=e.criterion.reduce,
            mask=self.positions_mask(),
        )
        if e.combine == "confident":
            logits, found, self.memory = keep_best(logits, found, self.memory)
        stay = self.in_.decide(index, logits, found, self.thresholds[index])
        if e.criterion.stateful:
            self.state = state if stay is None else state.index_select(0, stay)
        if self.memory is not None and stay is not None:
            self.memory = self.memory.index_select(0, stay)
        if stay is None or stay.numel():
            self.stopped = self.why_stop(index, self.in_.size if self.in_.rows is None else self.in_.rows.numel())
            if self.stopped is not None:
                mine = logits if stay is None else logits.index_select(0, stay)
                self.in_.finish(mine, found if stay is None else found.index_select(0, stay), at=index)
                raise _NoRowsLeft
        return stay

    def side(self, name: str) -> Tensor:
        t = self.flat[self.names.index(name)]
        return t if self.in_.rows is None else t.index_select(0, self.in_.rows)

    def positions_mask(self) -> Tensor | None:
        e = self.program.exits[0]
        if e.mask_input is None or e.criterion.learned or not masks_positions(self.program, e):
            return None
        return self.side(e.mask_input)

    def end(self, output: Any) -> list[Tensor | None]:
        """The model's own end: rows that are still in have their values in the full batch."""
        signature = self.program.signature
        values = signature.flatten_output(output)
        at = self.program.prediction.index or 0
        axis = signature.outputs[at].batch_axis or 0
        prediction = values[at].movedim(axis, 0)
        rows = self.in_.rows
        mine = prediction if rows is None else prediction.index_select(0, rows)
        confidence = None
        if self.want_confidence:
            criterion = self.program.exits[-1].criterion.at_end
            confidence, _ = confidence_of(
                yes_or_no(mine, criterion.multi_label),
                self.state if criterion.stateful else None,
                criterion.name,
                self.temperatures[-1],
                patience=criterion.patience,
                reduce=criterion.reduce,
                mask=self.positions_mask(),
            )
        self.in_.finish(mine, confidence)
        leaves: list[Tensor | None] = []
        for t, leaf in zip(values, signature.outputs, strict=True):
            if rows is None or leaf.batch_axis is None:
                leaves.append(t)
                continue
            fill = torch.full_like(t, float("nan") if t.is_floating_point() else 0)
            leaves.append(fill.index_copy(leaf.batch_axis, rows, t.index_select(leaf.batch_axis, rows)))
        return leaves
