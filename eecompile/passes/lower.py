"""Turns the staged program into a schedule: stages, decisions, and what survives between them, as data.

A `Schedule` depends on which exits are open. A closed exit is not in it: its head does not run, nothing is decided there,
and the stages before and after it are one. Inserted operators are lowered to their definitions, which copy nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import eecompile.ops as ops
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.extract import Extractor
from eecompile.passes.regions import Possible, decisions, defined, possible
from eecompile.passes.stage import Layout, inserted
from eecompile.program import Live, Program


@dataclass(frozen=True)
class Segment:
    """The work from one open exit to the next, as one module.

    Attributes:
        module: `module(*live, *states)` gives `(*decision, *leaves, *reports, *live)`.
        exit: The exit at its end, None for the model's own end.
        inputs: Live values that it takes, in order.
        outputs: Live values that it hands on, in order.
        leaves: Indices of the output leaves that it computes, in order.
        reports: Indices of `program.choices.reports` that it gives, in order.
        takes_states: How many states come in after the live values: the first so many of those handed on.
        gives_states: How many states the decision hands on: `(logits, confidence, *states)`. That of the criterion
            comes first, then that of the combination of exits.
        head: Where a router sends rows to the exit at its end, so that only their head runs: `head(*values)` gives
            `(logits,)`. The decision is then the confidence alone, and the head's inputs come after the live values.
        head_axes: Batch axis of each of the head's inputs.
    """

    module: fx.GraphModule
    exit: int | None
    inputs: tuple[Live, ...]
    outputs: tuple[Live, ...]
    leaves: tuple[int, ...]
    reports: tuple[int, ...]
    takes_states: int
    gives_states: int
    head: fx.GraphModule | None = None
    head_axes: tuple[int | None, ...] = ()

    @property
    def decision(self) -> int:
        """How many values of the decision come first."""
        return 1 if self.head is not None else 2 + self.gives_states


@dataclass(frozen=True)
class Schedule:
    """What executors run for one set of open exits."""

    open_exits: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Lower(Pass):
    """Checks that the program can be scheduled with all exits open, and ends the rewriting."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"staged"})
    ensures: ClassVar[frozenset[str]] = frozenset({"scheduled"})

    def run(self, program: Program) -> PassResult:
        done = schedule(program, tuple(range(len(program.exits))))
        crossing = [sum(v.batch_axis is not None for v in s.outputs) for s in done.segments[:-1]]
        summary = f"{len(done.segments)} segments, tensors that survive: {', '.join(map(str, crossing))}"
        return PassResult(program.replace(level="schedule"), False, summary=summary)


def schedule(
    program: Program,
    open_exits: tuple[int, ...],
    decide_at_end: bool = False,
    arms: Possible | None = None,
    live_only: bool = False,
    keep_thresholds: bool = False,
) -> Schedule:
    """The segments between the open exits.

    Args:
        open_exits: Indices of the exits that are open, in order.
        decide_at_end: Whether the last segment also gives the confidence of the model's own output, and every segment
            its reports.
        arms: Of each conditional, the arms that rows can take (see `possible`); None for all of them.
        live_only: Whether position-wise parts of halting steps run at live positions only, so many as there are: their
            number is known on the host only.
        keep_thresholds: Whether decisions with a state read thresholds, so that an exit closed later leaves it alone.
    """
    arms = possible(program, None) if arms is None else arms
    layout = Layout(program, live_only)
    stops = (*open_exits, len(program.exits))
    segments = []
    start = -1
    incoming = layout.inputs()
    for i, stop in enumerate(stops):
        later = tuple(open_exits[i + 1 :])
        segment = _segment(layout, start, stop, incoming, later, decide_at_end, arms, keep_thresholds)
        segments.append(segment)
        incoming = [layout.names[v.node] for v in segment.outputs]
        start = stop
    return Schedule(open_exits, tuple(segments))


def _segment(
    layout: Layout,
    start: int,
    stop: int,
    incoming: list[fx.Node],
    later: tuple[int, ...],
    decide_at_end: bool,
    arms: Possible,
    keep_thresholds: bool,
) -> Segment:
    program, gm = layout.program, layout.gm
    at_end = stop == len(program.exits)
    assert gm is not None
    part = Extractor(gm)
    for n in incoming:
        part.placeholder(n)
    decides = not at_end or decide_at_end
    needed = layout.needed(later if at_end else (stop, *later), arms)
    if decide_at_end:
        asked = [r for r in program.choices.reports if not r.training_only and r.name not in fixed(program, arms)]
        needed = needed | facts.needed_for(layout.names[r.node] for r in asked if layout.names[r.owner] in needed)
    carried = states_of(program)
    taken = [r for r in carried if start >= 0 and decides and not (at_end and r == "memory")]
    states: dict[str, fx.Node | None] = {r: part.graph.placeholder(r) for r in taken}
    layout.copy_interval(part, start, stop, arms, needed)
    decision: list[fx.Node] = []
    head: Extractor | None = None
    reads: list[fx.Node] = []
    if decides and not at_end and program.exits[stop].routed:
        reads = [layout.names[n] for n in program.exits[stop].head_inputs]
        head = _routed_head(gm, reads, stop)
        decision = [part.copy(n) for n in gm.graph.nodes if inserted(n) and _routed_confidence(n, stop)]
    elif decides:
        decision = _decision(gm, part, -1 if at_end else stop, states, carried, keep_thresholds)
    leaves = layout.produced(start, stop)
    given = [part.resolve(layout.leaves[i]) for i in leaves]
    reports = _reported(program, layout, start, stop, arms, needed) if decide_at_end else ()
    given += [part.resolve(layout.names[program.choices.reports[i].node]) for i in reports]
    if at_end:
        given.append(part.resolve(layout.prediction()))
        handed: list[fx.Node] = []
    else:
        handed = layout.live(stop, later, arms)
    defined(part.graph)
    last = [part.resolve(n) for n in (*handed, *reads)]
    module = part.finish([*decision, *given, *last], f"Segment{start + 1}to{stop}")
    return Segment(
        module=module,
        exit=None if at_end else stop,
        inputs=layout.as_live(incoming),
        outputs=layout.as_live(handed),
        leaves=tuple(leaves),
        reports=reports,
        takes_states=len(taken),
        gives_states=0 if at_end or head is not None else len(decision) - 2,
        head=None if head is None else head.finish(_output_of(gm, head, stop), f"Head{stop}"),
        head_axes=tuple(v.batch_axis for v in layout.as_live(reads)),
    )


def _routed_confidence(n: fx.Node, mark: int) -> bool:
    return n.meta["eecompile"] == mark and n.meta.get("eecompile_role") == "confidence"


def _routed_head(gm: fx.GraphModule, reads: list[fx.Node], mark: int) -> Extractor:
    """The head of an exit that rows are sent to, without the decision, from its inputs on."""
    part = Extractor(gm)
    for n in reads:
        part.placeholder(n)
    for n in gm.graph.nodes:
        if inserted(n) and n.meta["eecompile"] == mark and n.op != "get_attr" and not _routed_confidence(n, mark):
            part.copy(n)
    return part


def _output_of(gm: fx.GraphModule, head: Extractor, mark: int) -> list[fx.Node]:
    roles = ((n, n.meta.get("eecompile_role")) for n in gm.graph.nodes if inserted(n) and n.meta["eecompile"] == mark)
    return [head.env[n] for n, role in roles if role == "output"]


def _reported(
    program: Program, layout: Layout, start: int, stop: int, arms: Possible, needed: set[fx.Node]
) -> tuple[int, ...]:
    """The reports between two exits; what is the same whatever the input is not reported."""
    inside = needed.intersection(layout.interval(start, stop))
    known = fixed(program, arms)
    return tuple(
        i
        for i, r in enumerate(program.choices.reports)
        if not r.training_only and r.name not in known and layout.names[r.node] in inside
    )


def fixed(program: Program, arms: Possible) -> set[str]:
    """Names of gates, steps and chains that do the same for every row: nothing is reported of them."""
    known = {name for name, taken in decisions(program, arms).items() if len(taken) == 1}
    return known | {h.name for h in program.choices.chains if h.steps[-1].name in known}


def states_of(program: Program) -> tuple[str, ...]:
    """What a row carries from one decision to the next, in order: "state" of the criterion, "memory" of the combination."""
    if not program.exits:
        return ()
    e = program.exits[0]
    return (*(("state",) if e.criterion.stateful else ()), *(("memory",) if e.combine != "last" else ()))


def state_shapes(program: Program) -> dict[str, tuple[int | str, ...]]:
    """Shapes of what a row carries, by name: strings are dynamic sizes; what is fixed may be any number here."""
    scores = program.prediction_leaf.shape
    positions = scores[1:-1] if len(scores) > 2 else ()
    several = bool(program.exits) and program.exits[0].combine == "weighted"
    return {"state": ("batch", *positions, 2), "memory": ("batch", *positions, *((0, 0) if several else (0,)))}


# Inserted operators by their definitions; the argument that is a state, and which.
DEFINED: dict[Any, tuple[Callable[..., Any], int, str]] = {
    torch.ops.eecompile.confidence.default: (ops.confidence, 1, "state"),
    torch.ops.eecompile.ensemble.default: (ops.ensemble, 1, "memory"),
    torch.ops.eecompile.weighted_ensemble.default: (ops.weighted_ensemble, 1, "memory"),
    torch.ops.eecompile.keep_best.default: (ops.keep_best, 2, "memory"),
}


def _decision(
    gm: fx.GraphModule,
    part: Extractor,
    mark: int,
    states: dict[str, fx.Node | None],
    carried: tuple[str, ...],
    keep_thresholds: bool,
) -> list[fx.Node]:
    """Head and decision of one exit inside a part; for the model's own end (mark -1) its confidence only.

    Every exit of a schedule is open: unless it may be closed later, no threshold is needed to freeze the state of a closed
    one. The last exit gives no memory: nothing reads it.
    """
    given: dict[str, fx.Node] = {}

    def dropped(a: Any) -> bool:
        return not keep_thresholds and _is_threshold(a)

    for n in gm.graph.nodes:
        if not inserted(n) or n.meta["eecompile"] != mark or n.op == "get_attr" or dropped(n):
            continue
        if n.target in (torch.ops.eecompile.select.default, torch.ops.eecompile.blank.default):
            break
        if n.target in DEFINED:
            definition, at, kind = DEFINED[n.target]
            args = [None if i == at else a for i, a in enumerate(n.args) if not dropped(a)]
            copied: list[Any] = [part.resolve(a) if isinstance(a, fx.Node) else a for a in args]
            copied[at] = states.get(kind)
            named = {k: v for k, v in n.kwargs.items() if not dropped(v)}
            options = {k: part.resolve(v) if isinstance(v, fx.Node) else v for k, v in named.items()}
            part.env[n] = part.graph.call_function(definition, tuple(copied), options)
        else:
            part.env[n] = part.graph.node_copy(n, part.resolve)
        if "eecompile_role" in n.meta:
            given[n.meta["eecompile_role"]] = part.env[n]
    if mark < 0:
        return [given["confidence"]]
    return [given["output"], given["confidence"], *(given[r] for r in carried if r in given)]


def _is_threshold(a: Any) -> bool:
    return isinstance(a, fx.Node) and a.meta.get("eecompile_role") == "threshold"
