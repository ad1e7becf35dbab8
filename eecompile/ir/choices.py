"""Gates, widths, halting steps and branches as one thing: choices between arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eecompile.ir.records import Arm, Carry, Choice, Gate, Halt, Merge, Route, Width


def choices_of(
    gates: Sequence[Gate], widths: Sequence[Width], halts: Sequence[Halt], routes: Sequence[Route]
) -> tuple[Choice, ...]:
    """All choices: gates and widths in the order of the gates, then halting steps, then branches."""
    by_gate = {name: w for w in widths for name in w.gates}
    found = list[Choice]()
    for i, g in enumerate(gates):
        w = by_gate.get(g.name)
        if w is None:
            found.append(Choice(g.name, g.region, (g.decision,), _skip_or_run(g.carries), _merges(g.carries), (g.name,)))
        elif g.name == w.gates[0]:
            found.append(_width(w, gates[i : i + len(w.gates)]))
    found += [step for h in halts for step in _steps(h)]
    return (*found, *(_branches(r) for r in routes if r.ways))


def _skip_or_run(carries: Sequence[Carry]) -> tuple[Arm, Arm]:
    return Arm("skip", tuple(c.x for c in carries), skips=True), Arm("run", tuple(c.y for c in carries))


def _merges(carries: Sequence[Carry]) -> tuple[Merge, ...]:
    return tuple(Merge(c.node, c.batch_axis) for c in carries)


def _width(w: Width, gates: Sequence[Gate]) -> Choice:
    arms = [Arm(str(k), (value,)) for k, value in enumerate(w.values)]
    if w.skips:
        arms.insert(0, Arm("skip", (w.x,), skips=True))
    return Choice(
        w.name,
        w.region,
        tuple(g.decision for g in gates),
        tuple(arms),
        _merges(gates[-1].carries),
        w.gates,
        reads=(w.x,),
        inner=tuple(g.node for g in gates[:-1]),
    )


def _steps(h: Halt) -> Iterator[Choice]:
    for s in h.steps:
        if s.carries:
            arms, merges = _skip_or_run(s.carries), _merges(s.carries)
            yield Choice(s.name, s.region, (s.decision,), arms, merges, live=s.live, parts=s.parts)


def _branches(r: Route) -> Choice:
    arms = tuple(
        Arm(w.name, (w.value,), module=w.module, inputs=(r.x, *w.sides) if w.module and not w.custom else ()) for w in r.ways
    )
    return Choice(r.name, r.region, (r.choice,), arms, (Merge(r.node, r.batch_axis),), reads=(r.x, r.reads))
