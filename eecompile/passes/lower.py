"""Turns the staged program into a schedule: stages, decisions, and what survives between them, as data.

A `Schedule` depends on which exits are open. A closed exit is not in it: its head does not run, nothing is decided there,
and the stages before and behind it are one. Inserted operators are lowered to their definitions, which copy nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import eecompile.ops as ops
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.extract import Extractor
from eecompile.passes.stage import Layout, inserted
from eecompile.program import Live, Program


@dataclass(frozen=True)
class Segment:
    """The work from one open exit to the next, as one module.

    Attributes:
        module: `module(*live, [state])` gives `(*decision, *leaves, *live)`.
        exit: The exit at its end, None for the model's own end.
        inputs: Live values that it takes, in order.
        outputs: Live values that it hands on, in order.
        leaves: Indices of the output leaves that it computes, in order.
        takes_state: Whether a state comes in behind the live values.
        gives_state: Whether the decision hands a state on: `(logits, confidence, state)` instead of two.
    """

    module: fx.GraphModule
    exit: int | None
    inputs: tuple[Live, ...]
    outputs: tuple[Live, ...]
    leaves: tuple[int, ...]
    takes_state: bool
    gives_state: bool

    @property
    def decision(self) -> int:
        """How many values of the decision come first."""
        return 2 + self.gives_state


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


def schedule(program: Program, open_exits: tuple[int, ...], decide_at_end: bool = False) -> Schedule:
    """The segments between the open exits.

    Args:
        open_exits: Indices of the exits that are open, in order.
        decide_at_end: Whether the last segment also gives the confidence of the model's own output.
    """
    layout = Layout(program)
    stops = (*open_exits, len(program.exits))
    segments = []
    start = -1
    incoming = layout.inputs()
    for i, stop in enumerate(stops):
        later = tuple(open_exits[i + 1 :])
        segment = _segment(program, layout, start, stop, incoming, later, i > 0, decide_at_end)
        segments.append(segment)
        incoming = [layout.names[v.node] for v in segment.outputs]
        start = stop
    return Schedule(open_exits, tuple(segments))


def _segment(
    program: Program,
    layout: Layout,
    start: int,
    stop: int,
    incoming: list[fx.Node],
    later: tuple[int, ...],
    after_open: bool,
    decide_at_end: bool,
) -> Segment:
    at_end = stop == len(program.exits)
    gm = layout.gm
    assert gm is not None
    part = Extractor(gm)
    for n in incoming:
        part.placeholder(n)
    stateful = bool(program.exits) and program.exits[0].criterion.stateful
    decides = not at_end or decide_at_end
    takes_state = stateful and after_open and decides
    state = part.graph.placeholder("state") if takes_state else None
    needed = layout.needed(later if at_end else (stop, *later))
    for n in layout.interval(start, stop):
        if n.op in ("placeholder", "get_attr") or n in part.env or n not in needed:
            continue
        if facts.is_symbolic_number(n) and any(a not in part.env and a.op != "get_attr" for a in n.all_input_nodes):
            continue
        part.copy(n)
    decision: list[fx.Node] = []
    if decides:
        decision = _decision(gm, part, -1 if at_end else stop, state, stateful)
    leaves = layout.produced(start, stop)
    given = [part.resolve(layout.leaves[i]) for i in leaves]
    if at_end:
        given.append(part.resolve(layout.prediction()))
        handed: list[fx.Node] = []
    else:
        handed = layout.live(stop, later)
    module = part.finish([*decision, *given, *(part.resolve(n) for n in handed)], f"Segment{start + 1}to{stop}")
    return Segment(
        module=module,
        exit=None if at_end else stop,
        inputs=layout.as_live(incoming),
        outputs=layout.as_live(handed),
        leaves=tuple(leaves),
        takes_state=takes_state,
        gives_state=stateful and not at_end,
    )


def _decision(gm: fx.GraphModule, part: Extractor, mark: int, state: fx.Node | None, stateful: bool) -> list[fx.Node]:
    """Head and decision of one exit inside a part; for the model's own end (mark -1) its confidence only."""
    wanted: list[fx.Node] = []
    logits: fx.Node | None = None
    for n in gm.graph.nodes:
        if not inserted(n) or n.meta["eecompile"] != mark or n.op == "get_attr":
            continue
        if n.target in (torch.ops.eecompile.select.default, torch.ops.eecompile.blank.default):
            break
        if n.target is torch.ops.eecompile.confidence.default:
            logits_or_score, _, *rest = n.args  # the state comes in with the rows that carry it
            copied: list[Any] = [part.resolve(a) if isinstance(a, fx.Node) else a for a in (logits_or_score, *rest)]
            copied.insert(1, state)
            options = {k: part.resolve(v) if isinstance(v, fx.Node) else v for k, v in n.kwargs.items()}
            # every exit of a schedule is open: no threshold is needed to freeze the state of a closed one
            options.pop("threshold", None)
            part.env[n] = part.graph.call_function(ops.confidence, tuple(copied), options)
            continue
        part.env[n] = part.graph.node_copy(n, part.resolve)
        if n.name.endswith(("_head", "_logits")) and logits is not n:
            logits = n
        if n.name.endswith("_confidence") or n.name == "model_confidence":
            wanted.append(n)
        if stateful and n.name.endswith("_state") and mark >= 0:
            wanted.append(n)
    confidence = part.env[wanted[0]]
    if mark < 0:
        return [confidence]
    assert logits is not None
    return [part.env[logits], confidence, *(part.env[n] for n in wanted[1:])]
