"""Runs a call piece by piece and decides after each exit whether to go on: streams, deadlines, budgets, interrupts.

The executor walks (`Walk`); this module holds the watch. A walk that is stopped gives every row that is still in the
output of the exit that it has just reached: the best output so far, as the program combines its exits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from eecompile.runtime.limits import Allowance
from eecompile.runtime.outcome import Outcome
from eecompile.runtime.timing import END, Piece, StageTimes

Pause = tuple[int, int]
"""Index of the piece that would come next, and the rows that are still in."""


class Walk(Protocol):
    """One call that can be paused after every decision."""

    interrupted: bool
    size: int

    @property
    def stops(self) -> Sequence[int]:
        """Where each piece ends: an exit's index, the number of exits for the model's own end."""
        ...

    def walk(self) -> Iterator[Pause]:
        """Runs a piece at each step; pauses where rows are still in, ends where none are."""
        ...

    def stop(self, why: str) -> None:
        """Rows that are still in take what they have; the walk is over."""
        ...

    def so_far(self) -> Outcome:
        """The output if the walk were stopped here; it may go on afterwards."""
        ...

    def outcome(self) -> Outcome: ...

    def wait(self) -> None:
        """Until the device has done what it was given."""
        ...


class Watch:
    """Measures the pieces of one walk and says when to stop."""

    def __init__(self, run: Walk, allowance: Allowance, times: StageTimes) -> None:
        self.run, self.allowance, self.times = run, allowance, times
        self.at, self.rows = 0, run.size
        self.stops = run.stops
        self.steps = run.walk()

    def piece(self, at: int) -> Piece:
        return (self.stops[at - 1] if at else -1, self.stops[at])

    def step(self) -> bool:
        """Runs one piece and measures it; False where the walk has ended."""
        started = self.times.clock()
        pause = next(self.steps, None)
        if pause is None:
            self.run.wait()
        self.times.add(self.piece(self.at), self.rows, self.times.clock() - started)
        if pause is None:
            return False
        self.at, self.rows = pause
        return True

    def why_stop(self) -> str | None:
        """ "interrupt", "budget" or "deadline" where the next piece must not run."""
        if self.run.interrupted:
            return "interrupt"
        deepest, deadline = self.allowance.deepest, self.allowance.deadline
        if deepest is not None and self.stops[self.at - 1] >= deepest:
            return "budget"
        if deadline is not None:
            piece = self.piece(self.at)
            needed = self.times.predict(piece, self.rows) + self.times.predict(END, self.run.size)
            if self.times.clock() + needed > deadline:
                self.times.refused(piece)
                return "deadline"
        return None

    def late(self) -> bool:
        """Whether what is there came after the deadline, or costs more than the budget."""
        deadline = self.allowance.deadline
        return self.allowance.over or (deadline is not None and self.times.clock() > deadline)

    def outcome(self) -> Outcome:
        started = self.times.clock()
        outcome = self.run.outcome()
        outcome.late = self.late()
        outcome.closing = (started, self.run.size)
        return outcome


def run_within(run: Walk, allowance: Allowance, times: StageTimes) -> Outcome:
    """The best output that the allowance lets a call have; at least the first exit's."""
    watch = Watch(run, allowance, times)
    while watch.step():
        why = watch.why_stop()
        if why is not None:
            run.stop(why)
            break
    return watch.outcome()


def stream_of(run: Walk, allowance: Allowance, times: StageTimes) -> Generator[Outcome, None, None]:
    """The output after each exit, until every row is final, the allowance is used up or the consumer has enough."""
    watch = Watch(run, allowance, times)
    while watch.step():
        why = watch.why_stop()
        if why is not None:
            run.stop(why)
            yield watch.outcome()
            return
        outcome = run.so_far()
        outcome.late = watch.late()
        yield outcome
        if watch.why_stop() is not None:  # the consumer took its time, or called interrupt()
            return
    yield watch.outcome()
