"""Exits, gates, widths, halting and routes of a compiled module, as records with their present settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from eecompile.costs import CostModel
from eecompile.criteria import Criterion
from eecompile.gates import GateUnit
from eecompile.heads import Branch
from eecompile.ir.settings import BRANCHES, CLOSED, EXITS, GATES, HALTING, TEMPERATURES, Settings
from eecompile.program import Program
from eecompile.routers import RouterUnit
from eecompile.runtime.live_settings import units_of
from eecompile.untrained import is_untrained

OWN_END = "model"


@dataclass(frozen=True)
class ExitRecord:
    """One exit as users see it.

    Attributes:
        name: `exit_0`, `exit_1`, ...
        node: Name of the graph node whose value the head reads.
        cut: Block or node that it lies after.
        depth: Fraction of the full model's cost spent before it.
        threshold: Confidence from which a sample leaves; above 1 the exit is closed.
        head: The head's module.
        head_cost: Cost of head and decision, as a fraction of the full model's.
        combine: What it answers, given the open exits before it: "last", "ensemble", "confident" or "weighted".
        units: What must be trained before it is of use.
    """

    name: str
    node: str
    cut: str
    depth: float
    threshold: float
    temperature: float
    head: nn.Module
    head_kind: str
    head_cost: float
    criterion: Criterion
    combine: str = "last"
    units: tuple[nn.Module, ...] = field(default=(), repr=False)

    @property
    def is_open(self) -> bool:
        return self.threshold <= 1.0

    @property
    def trained(self) -> bool:
        """Whether its weights are others than those that it was inserted with."""
        return not any(map(is_untrained, self.units))


@dataclass(frozen=True)
class GateRecord:
    """One gate as users see it.

    Attributes:
        name: `gate_0`, `gate_1`, ...
        node: Name of the graph node that hands on the region's value or what went past it.
        region: What it may skip: a block, or a part of one; "... at 50%" where it opens a width of it.
        kind: "block", "attention", "mlp", "part", "branch", or "width" where it only makes its part wider.
        depth: Fraction of the full model's cost spent before it.
        threshold: Score from which it is open; 0 is always open, above 1 always closed.
        head: The unit that gives the score; one for all gates where it is a policy.
        saves: What it saves when closed, as a fraction of the full model's cost.
        head_cost: Cost of the score, as a fraction of the full model's.
        stage: How many exits lie before it.
    """

    name: str
    node: str
    region: str
    kind: str
    depth: float
    threshold: float
    head: nn.Module
    head_kind: str
    saves: float
    head_cost: float
    stage: int

    @property
    def trained(self) -> bool:
        """Whether the unit's weights are others than those that it was inserted with."""
        return not is_untrained(self.head)


@dataclass(frozen=True)
class WidthRecord:
    """One part of the model that runs at one of several widths, as users see it.

    Attributes:
        name: `width_0`, `width_1`, ...
        region: The block, half of a block, or pair of layers.
        fractions: Shares of its hidden channels that a row may run with.
        channels: How many channels these are, for each group of channels in it.
        skips: Whether a row may skip it altogether.
        gates: Names of the gates that open one width after the other.
        saves: What the least of it saves, as a fraction of the full model's cost.
    """

    name: str
    region: str
    fractions: tuple[float, ...]
    channels: tuple[tuple[int, ...], ...]
    skips: bool
    gates: tuple[str, ...]
    saves: float


@dataclass(frozen=True)
class HaltStepRecord:
    """One step of a chain that rows halt in, as users see it.

    Attributes:
        name: `halt_0_step_0`, ...
        region: The block that it runs.
        unit: What gives its halting score: "linear", or "token" for one at every position.
        cost: Cost of the block for one row, as a fraction of the full model's.
        unit_cost: Cost of the score.
        live_cost: Of `cost`, what runs at positions that have not halted only, where every position halts by itself.
    """

    name: str
    region: str
    unit: str
    cost: float
    unit_cost: float
    live_cost: float = 0.0


@dataclass(frozen=True)
class HaltRecord:
    """One chain of steps that rows halt in, as users see it.

    Attributes:
        name: `halt_0`, ...
        depth: Fraction of the full model's cost spent before it.
        threshold: What scores must add up to; above 1 no row halts. All chains share it.
        rule: "mean", the output is the mean of the states under the scores, or "stop", the state that a row stopped at.
        repeated: Whether the steps are one block again and again.
        per_token: Whether every position halts by itself.
    """

    name: str
    depth: float
    threshold: float
    rule: str
    repeated: bool
    per_token: bool
    steps: tuple[HaltStepRecord, ...]


@dataclass(frozen=True)
class RouterRecord:
    """A router as users see it.

    Attributes:
        at: The input or cut that it reads.
        over: The cuts where branches begin and end; None for a router to exits.
        unit: What gives its probabilities: "conv", "linear" or "mlp".
        unit_cost: Of them, as a fraction of the full model's.
        depth: Fraction of the full model's cost spent before it.
    """

    at: str
    over: list[str] | None
    unit: str
    unit_cost: float
    depth: float


@dataclass(frozen=True)
class RouteRecord:
    """One route as users see it.

    Attributes:
        name: Of the exit or the branch; "model" and "full" for the model's own end and branch.
        to: "exit" or "branch".
        cost: Of a row that takes it, as a fraction of the full model's; open exits elsewhere count as passed by.
        is_open: Whether rows may be sent there.
        margin: Of a branch: what its probability is lowered by before it is compared with the others; above 1 it is
            closed. None for exits, whose thresholds are those of `fast.exits`.
        left_out: Blocks that a light version leaves out.
    """

    name: str
    to: str
    cost: float
    is_open: bool
    margin: float | None = None
    left_out: tuple[str, ...] = ()


def exit_records(program: Program, settings: Settings) -> tuple[ExitRecord, ...]:
    """The exits in order."""
    thresholds, temperatures = settings[EXITS], settings[TEMPERATURES]
    return tuple(
        ExitRecord(
            name=e.name,
            node=e.node,
            cut=e.cut,
            depth=e.depth,
            threshold=thresholds[i],
            temperature=temperatures[i],
            head=branch_of(program, e.head).head,
            head_kind=e.head_kind,
            head_cost=program.share(e.head_flops),
            criterion=e.criterion,
            combine=e.combine,
            units=tuple(units_of(program, e)),
        )
        for i, e in enumerate(program.exits)
    )


def gate_records(program: Program, settings: Settings) -> tuple[GateRecord, ...]:
    """The gates in order."""
    thresholds, found = settings[GATES], []
    for i, g in enumerate(program.choices.gates):
        unit = _marked(program).get_submodule(g.unit)
        assert isinstance(unit, GateUnit)
        found.append(
            GateRecord(
                name=g.name,
                node=g.node,
                region=f"{g.region} at {g.width:.0%}" if g.width else g.region,
                kind=g.kind,
                depth=g.depth,
                threshold=thresholds[i],
                head=unit,
                head_kind=unit.kind,
                saves=program.share(g.flops),
                head_cost=program.share(g.unit_flops),
                stage=program.choices.stage_of(g.decision),
            )
        )
    return tuple(found)


def width_records(program: Program) -> tuple[WidthRecord, ...]:
    """The parts that run at one of several widths."""
    saves = {g.name: program.share(g.flops) for g in program.choices.gates}
    return tuple(
        WidthRecord(w.name, w.region, w.fractions, w.channels, w.skips, w.gates, sum(saves[g] for g in w.gates))
        for w in program.choices.widths
    )


def halt_records(program: Program, settings: Settings) -> tuple[HaltRecord, ...]:
    """The chains of steps that rows halt in."""
    graph = _marked(program)
    return tuple(
        HaltRecord(
            name=h.name,
            depth=h.depth,
            threshold=halting_threshold(program, settings),
            rule=program.choices.halt_recipes[h.group].rule,
            repeated=h.repeated,
            per_token=h.per_token,
            steps=tuple(
                HaltStepRecord(
                    s.name,
                    s.region,
                    str(getattr(graph.get_submodule(s.unit), "kind", "custom")),
                    program.share(s.flops),
                    program.share(s.unit_flops),
                    program.share(sum(p.flops for p in program.choices.parts.get(s.name, ()))),
                )
                for s in h.steps
            ),
        )
        for h in program.choices.chains
    )


def halting_threshold(program: Program, settings: Settings) -> float:
    """What the halting scores of a row must add up to; above 1, as without halting, no row halts."""
    return settings[HALTING][0] if program.choices.chains else CLOSED


def router_record(program: Program) -> RouterRecord | None:
    """The router; None without one."""
    route = program.choices.route
    if route is None:
        return None
    unit = _marked(program).get_submodule(route.unit)
    assert isinstance(unit, RouterUnit)
    over = None if route.to_exits else list(route.over)
    return RouterRecord(route.at, over, unit.kind, program.share(route.unit_flops), route.depth)


def route_names(program: Program) -> list[str]:
    """Names of the routes, the model's own last; none without a router."""
    route = program.choices.route
    if route is None:
        return []
    return [e.name for e in program.exits] + [OWN_END] if route.to_exits else [w.name for w in route.ways]


def route_records(program: Program, settings: Settings, costs: CostModel) -> tuple[RouteRecord, ...]:
    """The router's routes in order."""
    route = program.choices.route
    if route is None:
        return ()
    of_each = costs.at_routes(settings).tolist()
    if route.to_exits:
        is_open = [*costs.is_open(settings), True]
        return tuple(RouteRecord(n, "exit", c, o) for n, c, o in zip(route_names(program), of_each, is_open, strict=True))
    margins = settings[BRANCHES]
    return tuple(
        RouteRecord(w.name, "branch", c, m <= 1, m, w.left_out) for w, c, m in zip(route.ways, of_each, margins, strict=True)
    )


def branch_of(program: Program, head: str) -> Branch:
    """The head of an exit, by its path in the graph."""
    found = _marked(program).get_submodule(head)
    assert isinstance(found, Branch)
    return found


def _marked(program: Program) -> fx.GraphModule:
    assert program.marked is not None
    return program.marked
