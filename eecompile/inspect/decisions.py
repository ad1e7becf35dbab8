"""What decides inside a model, for every format: gates, widths, chains that halt, a router's routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eecompile.inspect.text import percent
from eecompile.ir.settings import HALTING
from eecompile.public_records import GateRecord, HaltRecord, RouteRecord, WidthRecord, router_record

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


@dataclass(frozen=True)
class Entry:
    """A gate, a width, a chain or a route.

    Attributes:
        name: `gate_0`, ...
        place: What it decides about; empty where the name says it.
        state: What it does under the present settings.
        rows: Its rows in a table.
        more: Further facts, for a line.
        steps: Lines about its parts.
        fixed: Whether it does the same for every row.
        trained: Whether what decides has learnt anything.
    """

    name: str
    place: str
    state: str
    rows: tuple[tuple[str, ...], ...]
    more: str = ""
    steps: tuple[str, ...] = ()
    fixed: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Section:
    """Everything of one kind.

    Attributes:
        kind: "gate", "width", "chain" or "route".
        about: What is to be said of all of them.
        columns: Headings of the entries' rows.
    """

    kind: str
    about: str
    columns: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def count(self) -> str:
        return f"{len(self.entries)} {self.kind}{'' if len(self.entries) == 1 else 's'}"


def sections(fast: CompiledModule) -> list[Section]:
    """A section for each kind that the module has."""
    return [s for s in (_gates(fast), _widths(fast), _chains(fast), _routes(fast)) if s.entries]


def _gates(fast: CompiledModule) -> Section:
    def entry(g: GateRecord) -> Entry:
        fixed = not 0 < g.threshold <= 1
        state = f"always {'open' if g.threshold <= 0 else 'closed'}" if fixed else f"opens from {g.threshold:.4g}"
        cost, saves, place = percent(g.head_cost), percent(g.saves), f"{g.region} ({g.kind})"
        more = f"{g.head_kind} unit of {cost}, saves {saves} when closed"
        row = (g.name, place, state, g.head_kind, cost, saves)
        return Entry(g.name, place, state, (row,), more, fixed=fixed, trained=g.trained)

    saves = percent(sum(g.saves for g in fast.gates))
    columns = ("gate", "region", "state", "unit", "unit cost", "saves when closed")
    return Section("gate", f"all closed save {saves}", columns, tuple(map(entry, fast.gates)))


def _widths(fast: CompiledModule) -> Section:
    def entry(w: WidthRecord) -> Entry:
        shares = "/".join([*(["skip"] if w.skips else []), *(f"{100 * f:g}" for f in w.fractions)]) + "%"
        state = f"{shares} of {', '.join(str(sizes[-1]) for sizes in w.channels)} channels"
        gates, channels = f"{w.gates[0]} to {w.gates[-1]}", ", ".join("/".join(map(str, sizes)) for sizes in w.channels)
        return Entry(w.name, w.region, state, ((w.name, w.region, shares, channels, gates, percent(w.saves)),), gates)

    columns = ("width", "region", "shares", "channels", "gates", "saves at most")
    return Section("width", "regions that run with some of their channels", columns, tuple(map(entry, fast.widths)))


def _chains(fast: CompiledModule) -> Section:
    def entry(h: HaltRecord) -> Entry:
        state = halting(h)
        rows = tuple((s.name, s.region, state, s.unit, percent(s.cost), percent(s.unit_cost)) for s in h.steps)
        steps = []
        for times, s in [(f"up to {len(h.steps)} times ", h.steps[0])] if h.repeated else [("", s) for s in h.steps]:
            live = f", {percent(s.live_cost)} of it at live positions only" if s.live_cost else ""
            steps.append(f"{times}{s.region}: {percent(s.cost)} a step{live}, {s.unit} unit of {percent(s.unit_cost)}")
        return Entry(h.name, "", state, rows, "", tuple(steps), h.threshold > 1, HALTING not in fast.untrained)

    most = sum(len(h.steps) for h in fast.halts)
    seen = "" if fast.seen.steps is None else f"{fast.seen.steps:.3g} of {most} steps on average in the last evaluation"
    columns = ("step", "block", "state", "unit", "cost", "unit cost")
    return Section("halting chain", seen or f"up to {most} steps", columns, tuple(map(entry, fast.halts)))


def halting(h: HaltRecord) -> str:
    """When rows halt in a chain, and what goes on."""
    if h.threshold > 1:
        return f"never halts, {'one step' if h.repeated else 'every step is taken'}"
    what = "positions" if h.per_token else "rows"
    says = "scores add up to" if h.rule == "mean" else "they have stopped with probability"
    given = "the mean of the states" if h.rule == "mean" else "the state there"
    return f"{what} halt once {says} {h.threshold:.4g}, and {given} goes on"


def _routes(fast: CompiledModule) -> Section:
    columns = ("route", "blocks left out", "state", "cost", "rows", "accuracy")
    router = router_record(fast.program)
    if router is None:
        return Section("route", "", columns, ())
    seen = {share["name"]: share for share in fast.seen.routes}

    def entry(r: RouteRecord) -> Entry:
        state = "closed" if not r.is_open else "open" if not r.margin else f"open, margin {r.margin:.4g}"
        share = seen.get(r.name, {})
        rows, right = ("-" if share.get(key) is None else percent(share[key]) for key in ("share", "accuracy"))
        row = (r.name, str(len(r.left_out) or ""), state, percent(r.cost), rows, right)
        more = f"a row costs {percent(r.cost)}" + (f"; {rows} of the rows evaluated last" if share else "")
        place = f"without {', '.join(r.left_out)}" if r.left_out else ""
        trained = router.over is None or r.name not in fast.untrained
        return Entry(r.name, place, state, (row,), more, fixed=not r.is_open, trained=trained)

    unit = f"{router.unit} unit of {percent(router.unit_cost)}"
    to = "exits" if router.over is None else f"branches over {' to '.join(router.over)}"
    return Section("route", f"to {to}, by a router at {router.at}, {unit}", columns, tuple(map(entry, fast.routes)))
