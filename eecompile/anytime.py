"""Answers before the end: streams, deadlines, budgets and interrupts, for any program with exits.

A call may be stopped after every open exit, and then returns the best output so far. Closed exits are not computed, so
nothing can stop there: `set_thresholds(1.0)` opens exits that hardly any row leaves at by itself.

On a device that decides by itself a deadline counts from when the device begins, less what the host has used by then; what
`run` says of it (`stopped`, `late`, `final`) is read back at the end, `fast(x, deadline_ms=...)` reads nothing. With a
budget alone `run` waits for nothing either: `stopped` is found out when it is read.

`deadline_ms` and `budget` are taken from the keyword arguments of `fast(...)`, `fast.run(...)` and `fast.stream(...)`. An
argument of that name that the model itself has is the model's; then `fast.within(deadline_ms=5.0)(...)` is the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.plain import check_number
from eecompile.result import Result
from eecompile.runtime.limits import NAMES, Allowance, Limits, deepest, no_exit, own_names
from eecompile.runtime.outcome import Outcome
from eecompile.runtime.timing import END, StageTimes

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def taken(fast: CompiledModule, kwargs: dict[str, Any]) -> Allowance | None:
    """Takes the limits out of a call's keyword arguments; None where there are none.

    Raises:
        StrategyError: A limit that is no number or cannot be kept.
    """
    if not any(name in kwargs for name in NAMES):
        return None
    signature = fast.program.signature
    own = own_names(signature.parameters, signature.inputs)
    limits = Limits(**{name: kwargs.pop(name) for name in NAMES if name in kwargs and name not in own})
    return resolved(fast, limits) if limits else None


def resolved(fast: CompiledModule, limits: Limits) -> Allowance:
    """Limits as the executor reads them; the deadline's clock starts here.

    Raises:
        StrategyError: In train mode, or a limit that cannot be kept.
    """
    executor = fast.engine.chosen
    now = executor.times.clock()
    needs_eval(fast, "a deadline or a budget")
    settings = fast.settings
    allowance = Allowance()
    if limits.deadline_ms is not None:
        if executor.name == "reference":
            raise StrategyError(
                "the reference executor computes everything, so it cannot keep a deadline",
                hint='set fast.executor = "compact"',
            )
        if not settings.open_exits:
            raise no_exit("deadline")
        allowance = Allowance(deadline=now + limits.deadline_ms / 1e3)
    if limits.budget is not None:
        last, over = deepest(limits.budget, fast.cost_model.at_exits(settings), settings.open_exits)
        allowance = replace(allowance, deepest=last, over=over)
    return allowance


def needs_eval(fast: CompiledModule, what: str) -> None:
    """Refuses train mode.

    Raises:
        StrategyError: In train mode.
    """
    if fast.training:
        raise StrategyError(
            f"{what} needs eval mode", got="train mode, which computes every exit", hint="call fast.eval() first"
        )


def close(fast: CompiledModule, outcome: Outcome, allowance: Allowance | None, result: Result | None = None) -> None:
    """Ends the measurement of a call, now that the caller has everything; it may be late by then."""
    if outcome.closing is None:
        return
    times = fast.engine.chosen.times
    now = times.clock()
    times.add(END, outcome.closing[1], now - outcome.closing[0])
    if result is not None and allowance is not None and allowance.deadline is not None:
        result.stop.late = result.late or now > allowance.deadline


def stream(fast: CompiledModule, flat: Sequence[Tensor], allowance: Allowance) -> Iterator[Result]:
    """A `Result` after each open exit."""
    settings = fast.settings
    with closing(fast.engine.chosen.stream(flat, settings, allowance)) as outcomes:
        for outcome in outcomes:
            result = fast.result_of(outcome, settings, flat)
            close(fast, outcome, allowance, result)
            yield result


def measure_stages(fast: CompiledModule, flat: Sequence[Tensor], rounds: int) -> StageTimes:
    """Times every stage on an example.

    Raises:
        StrategyError: In train mode, fewer than one round, or an executor without stages.
    """
    check_number("rounds", rounds, least=1, whole=True, error=StrategyError)
    with torch.no_grad():
        for _ in range(rounds):
            settings = fast.settings
            outcome = fast.engine.chosen.measure(flat, settings)
            if outcome is not None:
                fast.result_of(outcome, settings, flat)
                close(fast, outcome, None)
    return fast.engine.chosen.times


class Within:
    """A compiled module under limits: `fast.within(budget=0.5)(x)`, `.run(x)` and `.stream(x)`."""

    def __init__(self, fast: CompiledModule, limits: Limits) -> None:
        self.fast, self.limits = fast, limits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        allowance = resolved(self.fast, self.limits)
        return self.fast.answer(self.fast.flatten(args, kwargs), allowance)

    def run(self, *args: Any, **kwargs: Any) -> Result:
        allowance = resolved(self.fast, self.limits)
        return self.fast.measured(self.fast.flatten(args, kwargs), allowance)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Result]:
        allowance = resolved(self.fast, self.limits)
        return stream(self.fast, self.fast.flatten(args, kwargs), allowance)
