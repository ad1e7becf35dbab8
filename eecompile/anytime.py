"""The anytime half of the compiled module: streams, deadlines, budgets and interrupts, for any program with exits.

A call may be stopped behind every open exit, and then returns the best output so far. Closed exits are not computed, so
nothing can stop there: `set_thresholds(1.0)` opens exits that hardly anybody leaves at by itself.

On a device that decides by itself a deadline counts from when the device begins, less what the host has used by then; what
`run` says of it (`stopped`, `late`, `final`) is read back at the end, `fast(x, deadline_ms=...)` reads nothing. With a
budget alone `run` waits for nothing either: `stopped` is found out when somebody reads it.

`deadline_ms` and `budget` are taken from the keyword arguments of `fast(...)`, `fast.run(...)` and `fast.stream(...)`. An
argument of that name that the model itself has is the model's; then `fast.within(deadline_ms=5.0)(...)` is the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.ir.settings import Settings
from eecompile.program import Result
from eecompile.runtime.limits import NAMES, Allowance, Limits, deepest, no_exit, own_names
from eecompile.runtime.outcome import Executor, Outcome
from eecompile.runtime.timing import END, StageTimes
from eecompile.trainable import Trainable


class Anytime(Trainable):
    """What `CompiledModule` offers where an answer is wanted before the end."""

    _chosen: Executor

    def _result(self, outcome: Outcome, settings: Settings, flat: Sequence[Tensor]) -> Result:
        raise NotImplementedError

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        raise NotImplementedError

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Result]:
        """Yields a `Result` after each open exit, each at least as far along as the one before.

        Every row has an output at once: `final` says which rows have left, the others have that of the exit just
        passed. The last result is that of `fast.run(x)`. Nothing is computed before it is asked for, and nothing more
        once the loop is left. `deadline_ms=` counts from this call and includes the time that the consumer takes.

        Raises:
            StrategyError: In train mode; a limit that is no number or cannot be kept; or an executor that runs from input
                to output without the host ("device", "simulate"): `executor="compact"` streams.
            UnsupportedModelError: The model was captured as blocks.
        """
        self._evaluates("a stream")
        allowance = self._allowance(kwargs) or Allowance()
        flat = self.flatten(args, kwargs)
        return self._results(flat, allowance)

    def _results(self, flat: Sequence[Tensor], allowance: Allowance) -> Iterator[Result]:
        settings = self.settings
        with closing(self._chosen.stream(flat, settings, allowance)) as outcomes:
            for outcome in outcomes:
                result = self._result(outcome, settings, flat)
                self._close(outcome, allowance, result)
                yield result

    def interrupt(self) -> int:
        """Stops every call of this module that is running now, in whatever thread, behind its next exit.

        Each returns the best output so far (`stopped="interrupt"`), at least the first exit's; a stream ends. Calls that
        start later are not touched. The reference executor computes everything, and what runs on a device by itself is out
        of the host's reach: neither can be stopped.

        Returns:
            How many calls were told to stop; 0 where none is running, which is no error.
        """
        executors: list[Executor] = list(self.__dict__["_executors"].values())
        return sum(executor.interrupt() for executor in executors)

    def within(self, *, deadline_ms: float | None = None, budget: float | None = None) -> Within:
        """This module under limits, for models that have an argument `deadline_ms` or `budget` of their own."""
        return Within(self, Limits(deadline_ms, budget))

    @property
    def stage_times(self) -> StageTimes:
        """What the present executor has measured of this machine; deadlines are kept by it."""
        return self._chosen.times

    def measure_stages(self, *args: Any, rounds: int = 20, **kwargs: Any) -> StageTimes:
        """Times every stage on an example now, so that the first deadlines are kept as well as later ones.

        Executors of device programs ("device", "simulate") time stages only here, in every bucket, and before the first
        deadline of a program: calls leave no measurements there.

        Args:
            rounds: Passes over the example. No row leaves early in them.
        """
        if rounds < 1:
            raise StrategyError("stages are measured at least once", got=rounds, wanted="1 or more rounds")
        self._evaluates("a measurement")
        flat = self.flatten(args, kwargs)
        with torch.no_grad():
            for _ in range(rounds):
                settings = self.settings
                outcome = self._chosen.measure(flat, settings)
                if outcome is not None:
                    self._result(outcome, settings, flat)
                    self._close(outcome, None)
        return self._chosen.times

    def _close(self, outcome: Outcome, allowance: Allowance | None, result: Result | None = None) -> None:
        """Ends the measurement of a call, now that the caller has everything; it may be late by then."""
        if outcome.closing is None:
            return
        times = self._chosen.times
        now = times.clock()
        times.add(END, outcome.closing[1], now - outcome.closing[0])
        if result is not None and allowance is not None and allowance.deadline is not None:
            result.late = result.late or now > allowance.deadline

    def _evaluates(self, what: str) -> None:
        if self.training:
            raise StrategyError(
                f"{what} needs eval mode", got="train mode, which computes every exit", hint="call fast.eval() first"
            )

    def _allowance(self, kwargs: dict[str, Any]) -> Allowance | None:
        """Takes the limits out of a call's keyword arguments; None where there are none."""
        if not any(name in kwargs for name in NAMES):
            return None
        own = own_names(self.program.signature.parameters, self.program.signature.inputs)
        found = {name: kwargs.pop(name) for name in NAMES if name in kwargs and name not in own}
        limits = Limits(**found)
        return self._resolved(limits) if limits else None

    def _resolved(self, limits: Limits) -> Allowance:
        """Limits as the executor reads them; the deadline's clock starts here."""
        now = self._chosen.times.clock()
        self._evaluates("a deadline or a budget")
        is_open = self.open_exits
        open_exits = [k for k, o in enumerate(is_open) if o]
        allowance = Allowance()
        if limits.deadline_ms is not None:
            if self._chosen.name == "reference":
                raise StrategyError(
                    "the reference executor computes everything, so it cannot keep a deadline",
                    hint='set fast.executor = "compact"',
                )
            if not open_exits:
                raise no_exit("deadline")
            allowance = Allowance(deadline=now + limits.deadline_ms / 1e3)
        if limits.budget is not None:
            costs = self.costs(is_open).tolist()
            last, over = deepest(limits.budget, costs, open_exits)
            allowance = replace(allowance, deepest=last, over=over)
        return allowance


class Within:
    """A compiled module under limits: `fast.within(budget=0.5)(x)`, `.run(x)` and `.stream(x)`."""

    def __init__(self, fast: Anytime, limits: Limits) -> None:
        self.fast, self.limits = fast, limits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        allowance = self.fast._resolved(self.limits)
        flat = self.fast.flatten(args, kwargs)
        outcome = self.fast._chosen.run(flat, self.fast.settings, False, allowance)
        output = self.fast.program.restore(outcome.leaves, flat)
        self.fast._close(outcome, allowance)
        return output

    def run(self, *args: Any, **kwargs: Any) -> Result:
        allowance = self.fast._resolved(self.limits)
        flat = self.fast.flatten(args, kwargs)
        settings = self.fast.settings
        outcome = self.fast._chosen.run(flat, settings, True, allowance)
        result = self.fast._result(outcome, settings, flat)
        self.fast._close(outcome, allowance, result)
        return result

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Result]:
        allowance = self.fast._resolved(self.limits)
        return self.fast._results(self.fast.flatten(args, kwargs), allowance)
