"""What a row costs that leaves at each exit, for one set of open exits."""

from __future__ import annotations

from collections.abc import Sequence

from eecompile.program import Gate, Halt, Program


def costs_of(program: Program, open_exits: Sequence[bool], scored: Sequence[bool] = (), routed: bool = False) -> list[float]:
    """Fraction of the full model's FLOPs of a row that leaves at each exit and, last, at the model's own end.

    Work runs if the model's own output or an open exit needs it, heads of open exits included. The figure for a closed
    exit is what a row would cost that left there. Every gate counts as open; `scored` says which need a score. Every row
    counts as on the model's own way between branches; `routed` says whether the router runs. Of the heads that a router
    sends rows to, only the row's own counts.
    """
    one_head = any(r.to_exits for r in program.routes)
    total = program.total_flops or 1.0
    spent, found = 0.0, []
    closed: list[tuple[tuple[int, ...], float]] = []  # work that no open exit needs
    for k, stage in enumerate(program.stages):
        spent += stage.flops
        mine = (g for g, s in zip(program.gates, scored, strict=True) if s and g.stage == k)
        spent += sum(g.unit_flops for g in mine if runs(g, open_exits))
        spent += sum(r.unit_flops for r in program.routes if routed and r.stage == k)
        for exits, cost in stage.only_for:
            if any(open_exits[e] for e in exits):
                spent += cost
            else:
                closed.append((exits, cost))
        if k == len(program.exits):
            found.append(spent / total)
            continue
        here = program.exits[k].head_flops
        alone = sum(cost for exits, cost in closed if k in exits)
        found.append((spent + here + alone) / total)
        spent += here if open_exits[k] and not one_head else 0.0
    return found


def runs(record: Gate | Halt, open_exits: Sequence[bool]) -> bool:
    """Whether a gate's region or a chain runs at all: a model of a cascade does not while its exits are closed."""
    return not record.only_for or any(open_exits[e] for e in record.only_for)
