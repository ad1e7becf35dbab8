"""A server of rows: requests run in batches, and each is answered at the exit where its row leaves."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eecompile import anytime
from eecompile.calibration.monitor import Monitor
from eecompile.errors import EecompileError, StrategyError
from eecompile.passes import facts
from eecompile.plain import check_number
from eecompile.result import Result
from eecompile.runtime.limits import ROUNDING, Limits
from eecompile.serving.metrics import Metrics

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


class ServerBusy(EecompileError):
    """The queue is full. `retry_after_s` says when there is likely to be room."""

    retry_after_s: float = 1.0


class ServerClosed(EecompileError):
    """The server has been closed, or its worker has died."""


@dataclass(frozen=True)
class Answer:
    """What one row was answered with.

    Attributes:
        output: The type that the compiled module returns, with a batch of 1.
        exit: Name of the exit where the row left, "model" for the model's own end.
        exit_index: Its index.
        confidence: In [0, 1].
        cost: Fraction of the full model's FLOPs.
        final: Whether the row left by itself.
        stopped: "deadline" or "budget" where it did not.
    """

    output: Any
    exit: str
    exit_index: int
    confidence: float
    cost: float
    final: bool
    stopped: str | None


@dataclass
class _Request:
    leaves: list[Any]
    spec: Any
    axes: tuple[int | None, ...]
    key: tuple[Any, ...]
    deadline: float | None
    budget: float | None
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)


class RowServer:
    """Runs rows of many callers in batches.

    Rows of equal shapes share a batch. After each exit the rows that leave there are answered; the others go on. A row with
    a deadline is answered with the best output so far before the next stage would make it late, a row with a budget before
    the next stage would cost more than that.

    Args:
        fast: A compiled module with `stream`, in eval mode. While the server runs, its thresholds may be set.
        max_batch: Most rows that run together.
        max_wait_ms: How long the first row of a batch waits for others.
        max_queue: Most rows that wait; further ones are refused with `ServerBusy`.
        metrics: Prometheus metrics to keep, see `eecompile.serving.metrics.Metrics`; None for none.
        monitor: A `fast.monitor(...)` of this module. It sees every row that left by itself, after its answer; shadow rows
            run to the end before the next batch begins. Where it fails, it warns, and serving goes on without it.

    Raises:
        StrategyError: The module cannot pause between exits (`capture="blocks"`), or a number is out of range.
    """

    def __init__(
        self,
        fast: CompiledModule,
        *,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        metrics: Metrics | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        if not hasattr(fast, "program"):
            raise StrategyError(
                "a server runs compiled modules", got=type(fast).__name__, wanted="what eecompile(model, ...) gives"
            )
        check_number("max_batch", max_batch, least=1, whole=True, error=StrategyError)
        check_number("max_wait_ms", max_wait_ms, least=0, error=StrategyError)
        check_number("max_queue", max_queue, least=1, whole=True, error=StrategyError)
        if fast.program.capture.front_end == "blocks":
            raise StrategyError(
                "rows cannot be answered at their exits here", got='capture="blocks"', wanted='capture="export"'
            )
        if monitor is not None and monitor.fast is not fast:
            raise StrategyError(
                "the monitor watches another module", wanted="fast.monitor(...) of the module that is served"
            )
        self.fast, self.metrics, self.monitor = fast, metrics, monitor
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait_ms / 1e3, max_queue
        self._queue: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._changed = threading.Condition()
        self._closed: BaseException | None = None
        self._stage_s: dict[tuple[int, int], float] = {}  # recent seconds between two answers, by where and rounded rows
        self._batch_s = max_wait_ms / 1e3
        self._worker = threading.Thread(target=self._work, name="eecompile-rows", daemon=True)
        self._worker.start()

    # ------------------------------------------------------------------ callers

    def submit(
        self, *args: Any, deadline_ms: float | None = None, budget: float | None = None, **kwargs: Any
    ) -> Future[Answer]:
        """Queues one row.

        Args:
            args, kwargs: What the compiled module is called with, with a batch of 1.
            deadline_ms: Time from now by which an answer is wanted.
            budget: Most that the row may cost, as a fraction of the full model's FLOPs.

        Raises:
            ServerBusy: The queue is full.
            ServerClosed: The server has been closed, or its worker has died.
            EecompileError: The inputs do not fit the model, or are not one row.
        """
        request = self._request(args, kwargs, deadline_ms, budget)
        with self._changed:
            if self._closed is not None:
                raise ServerClosed("this server does not take rows any more", got=str(self._closed))
            if len(self._queue) >= self.max_queue:
                if self.metrics is not None:
                    self.metrics.rejected.inc()
                busy = ServerBusy("the queue is full", got=f"{len(self._queue)} rows", hint="try again later")
                busy.retry_after_s = max(self._batch_s * len(self._queue) / self.max_batch, 1e-3)
                raise busy
            self._queue.append(request)
            self._changed.notify()
        return request.future

    def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        """`submit`, and waits for the answer."""
        return self.submit(*args, **kwargs).result()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether rows are taken."""
        return self._closed is None

    def close(self) -> None:
        """Answers what is queued, then stops; further rows are refused."""
        with self._changed:
            if self._closed is None:
                self._closed = ServerClosed("the server was closed")
            self._changed.notify()
        self._worker.join()

    def __enter__(self) -> RowServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, args: Any, kwargs: Any, deadline_ms: float | None, budget: float | None) -> _Request:
        flat = self.fast.flatten(args, dict(kwargs))
        signature = self.fast.program.signature
        rows = signature.batch_size(flat)
        if rows != 1:
            raise StrategyError("submit() takes one row", got=f"{rows} rows", hint="submit each row by itself")
        device = facts.device_of(self.fast.graph_module)
        for t, leaf in zip(flat, signature.inputs, strict=True):
            if t.device != device:
                raise StrategyError("an input is on another device", where=leaf.path, got=t.device, wanted=device)
        limits = Limits(deadline_ms, budget)
        if limits:
            anytime.resolved(self.fast, limits)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        axis_of = {id(t): leaf.batch_axis for t, leaf in zip(flat, signature.inputs, strict=True)}
        axes = tuple(axis_of.get(id(t), 0) if isinstance(t, Tensor) else None for t in leaves)
        key = (str(spec), *((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in leaves))
        leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]  # the caller may write to its own meanwhile
        deadline = None if limits.deadline_ms is None else time.perf_counter() + limits.deadline_ms / 1e3
        return _Request(leaves, spec, axes, key, deadline, limits.budget)

    # ------------------------------------------------------------------ the worker

    def _work(self) -> None:
        try:
            while True:
                batch = self._next()
                if batch is None:
                    return
                self._running = batch
                self._run(batch)
                self._running = []
        except BaseException as e:  # noqa: BLE001 (whatever ends this thread is reported to those who wait)
            self._fail(e)

    def _next(self) -> list[_Request] | None:
        """The next rows that run together; None when the server is closed and nothing waits."""
        with self._changed:
            while not self._queue:
                if self._closed is not None:
                    return None
                self._changed.wait()
            first = self._queue[0]
            until = first.arrived + self.max_wait
            while self._closed is None and self._alike(first) < self.max_batch:
                left = until - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Request] = []
            rest: deque[_Request] = deque()
            for request in self._queue:
                fits = request.key == first.key and len(batch) < self.max_batch
                (batch if fits else rest).append(request)
            self._queue = rest
            return [r for r in batch if r.future.set_running_or_notify_cancel()]

    def _alike(self, first: _Request) -> int:
        return sum(r.key == first.key for r in self._queue)

    def _run(self, batch: list[_Request]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        try:
            self._stream(batch)
        except Exception as e:  # noqa: BLE001 (whatever a model raises belongs to the callers of this batch)
            for request in batch:
                if not request.future.done():
                    request.future.set_exception(e)
            if self.metrics is not None:
                self.metrics.failed.inc(len(batch))
        self._batch_s = 0.8 * self._batch_s + 0.2 * (time.perf_counter() - started)
        if self.metrics is not None:
            self.metrics.batch_rows.observe(len(batch))
            self.metrics.waiting.set(len(self._queue))

    def _stream(self, batch: list[_Request]) -> None:
        args, kwargs = _merged(batch)
        exits = range(len(self.fast.exits))
        is_open = [k in self.fast.settings.open_exits for k in exits]
        costs = self.fast.costs(is_open).tolist()
        following = {k: cost for k, cost in enumerate(costs) if k == len(is_open) or is_open[k]}
        names = [*(e.name for e in self.fast.exits), "model"]
        left = dict(enumerate(batch))
        last, at = time.perf_counter(), -1
        by_itself: list[int] = []
        with torch.no_grad():
            for result in self.fast.stream(*args, **kwargs):
                now = time.perf_counter()
                reached = int(result.exit_index.max())
                self._learn((at, len(batch)), now - last)
                last, at = now, reached
                assert result.final is not None
                final = result.final.tolist()
                for i, request in list(left.items()):
                    why = None if final[i] else self._why_now(request, following, at, len(batch), now)
                    if final[i] or why is not None:
                        del left[i]
                        by_itself += [i] if final[i] else []
                        request.future.set_result(self._answer(request, result, i, names, final[i], why))
                        if self.metrics is not None:
                            self.metrics.answered(names[int(result.exit_index[i])], now - request.arrived)
                if not left:
                    break
        for i, request in left.items():  # the stream ended with rows that are not final: interrupted
            request.future.set_result(self._answer(request, result, i, names, False, "interrupt"))
        self._watch(result, args, kwargs, by_itself)

    def _watch(self, result: Result, args: Any, kwargs: Any, rows: list[int]) -> None:
        if self.monitor is None or not rows:
            return
        try:
            self.monitor.watch(result, args, kwargs, rows=torch.tensor(rows))
        except Exception as e:  # noqa: BLE001 (these rows are answered: a monitor must not end the server)
            self.monitor = None
            warnings.warn(f"the monitor failed and is off: {type(e).__name__}: {e}", RuntimeWarning, stacklevel=2)

    def _learn(self, key: tuple[int, int], seconds: float) -> None:
        before = self._stage_s.get(key)
        self._stage_s[key] = seconds if before is None else 0.7 * before + 0.3 * seconds

    def _why_now(self, request: _Request, costs: Mapping[int, float], at: int, rows: int, now: float) -> str | None:
        """Why the row must be answered now although it has not left: the next stage would be late, or cost too much."""
        if request.deadline is not None and now + self._stage_s.get((at, rows), 0.0) > request.deadline:
            return "deadline"
        following = next((cost for k, cost in costs.items() if k > at), None)
        if request.budget is not None and following is not None and following > request.budget + ROUNDING:
            return "budget"
        return None

    def _answer(
        self, request: _Request, result: Result, row: int, names: Sequence[str], final: bool, stopped: str | None
    ) -> Answer:
        index = int(result.exit_index[row])
        output = _row(self.fast, result.output, row, request)
        return Answer(output, names[index], index, float(result.confidence[row]), float(result.cost[row]), final, stopped)

    def _fail(self, error: BaseException) -> None:
        """The worker dies: every request that waits fails, and none waits for ever."""
        with self._changed:
            self._closed = error
            lost = [*self._running, *self._queue]
            self._queue.clear()
        for request in lost:
            if not request.future.done():
                closed = ServerClosed("the server's worker has died", got=f"{type(error).__name__}: {error}")
                closed.__cause__ = error
                request.future.set_exception(closed)


def _merged(batch: Sequence[_Request]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of one call for all requests."""
    first = batch[0]
    leaves = [
        leaf if axis is None else torch.cat([r.leaves[i] for r in batch], axis)
        for i, (leaf, axis) in enumerate(zip(first.leaves, first.axes, strict=True))
    ]
    args, kwargs = pytree.tree_unflatten(leaves, first.spec)
    return args, kwargs


def _row(fast: CompiledModule, output: Any, row: int, request: _Request) -> Any:
    """One row of the model's output, a batch of 1 in the same type."""
    signature = fast.program.signature
    leaves = [
        value if leaf.batch_axis is None else value.narrow(leaf.batch_axis, row, 1).clone()
        for value, leaf in zip(signature.flatten_output(output), signature.outputs, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(request.leaves, request.spec) if signature.gives_sizes else ((), {})
    return signature.restore(leaves, signature.flatten(args, kwargs) if signature.gives_sizes else ())
