"""The interface of passes, and the loop that runs a list of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from eecompile.errors import PassError
from eecompile.program import Program, Refusal, Snapshot


@dataclass(frozen=True)
class PassResult:
    """Result of a pass.

    Attributes:
        program: The program after the pass; the one it was given is unchanged.
        modified: Whether the graph is another one.
        refusals: Places that it looked at and left alone.
    """

    program: Program
    modified: bool
    refusals: tuple[Refusal, ...] = ()
    summary: str = ""


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler. Options are fields; facts say what it needs and what it gives."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Gives the changed program; never changes the one that it is given."""


def check_order(passes: Sequence[Pass], facts: frozenset[str]) -> None:
    """Whether every pass finds what it needs, before anything runs.

    Raises:
        PassError: A pass comes before the one that establishes what it requires.
    """
    known = set(facts)
    for p in passes:
        missing = p.requires - known
        if missing:
            raise PassError(
                f"pass {p.name!r} cannot run yet",
                got=", ".join(sorted(known)) or "nothing established",
                wanted=", ".join(sorted(missing)),
                hint="put the pass that ensures it earlier in the list",
            )
        known |= p.ensures


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    progress: Callable[[str], None] | None = None,
    facts: frozenset[str] = frozenset(),
) -> Program:
    """Runs the passes in order, checks the graph after each, and records a snapshot after each.

    Args:
        progress: Called with the name of each pass.
        facts: Established in another way than by a pass.

    Raises:
        PassError: Wrong order, or a pass left an invalid graph.
    """
    program = program.establish(*facts)
    check_order(passes, program.history.facts)
    for p in passes:
        if progress is not None:
            progress(p.name)
        before = len(program.graph_module.graph.nodes)
        start = time.perf_counter()
        result = p.run(program)
        seconds = time.perf_counter() - start
        graph = result.program.graph_module.graph
        try:
            graph.lint()
        except RuntimeError as error:
            raise PassError(f"pass {p.name!r} left an invalid graph", got=str(error)) from error
        snapshot = Snapshot(
            name=p.name,
            level=result.program.level,
            seconds=seconds,
            nodes_before=before,
            nodes_after=len(graph.nodes),
            modified=result.modified,
            refusals=result.refusals,
            graph_module=result.program.graph_module,
            summary=result.summary,
        )
        program = result.program.replace(history=result.program.history.append(snapshot, p.ensures))
    return program
