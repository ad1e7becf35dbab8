"""Sizes of a trace: which are one, how far each may go, and under which conditions the graph is the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.export import ExportedProgram

from eecompile.capture.adapter import FlatCall
from eecompile.capture.axes import shapes, without_batch
from eecompile.capture.source import guard_lines, size_line
from eecompile.errors import CaptureError
from eecompile.guards import Guard, read_guard
from eecompile.signature import Leaf, Signature

MAX_BATCH = 65536
MAX_LENGTH = 1 << 20


def equal_sizes(
    paths: Sequence[str], axes: Sequence[int | None], further: Mapping[str, Mapping[int, str]]
) -> list[list[tuple[int, int]]]:
    """The axes that are one size by its name: groups of (input, axis)."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for i, (path, axis) in enumerate(zip(paths, axes, strict=True)):
        for at, name in {**({} if axis is None else {axis: "batch"}), **further.get(path, {})}.items():
            groups.setdefault(name, []).append((i, at))
    return list(groups.values())


def ranges(exported: ExportedProgram, names: Mapping[Any, str]) -> dict[str, tuple[int, int | None]]:
    found = {}
    for symbol, name in names.items():
        bounds = exported.range_constraints.get(symbol)
        low, high = (int(bounds.lower), bounds.upper) if bounds is not None else (1, MAX_BATCH)
        top = int(high) if str(high).isdigit() and int(high) < MAX_BATCH else None
        found[name] = (low, top)
    return found


def conditions(
    exported: ExportedProgram, inputs: Sequence[Leaf], dynamic: Mapping[str, tuple[int, int | None]]
) -> tuple[dict[str, tuple[int, int | None]], tuple[Guard, ...]]:
    """Ranges of the dynamic sizes and further conditions on them, from the guards of the trace.

    Args:
        inputs: In the order of the program's inputs.

    Raises:
        CaptureError: A condition that cannot be checked at a call.
    """
    at = dict(zip(program_inputs(exported), inputs, strict=True))

    def size(name: str, axis: int) -> int | str:
        name = f"flat_{name.removeprefix('flat_args_')}" if name.startswith("flat_args_") and name not in at else name
        if name not in at:
            raise CaptureError(
                "the model branches on the size of something that is no input", got=name, wanted=", ".join(at)
            )
        return at[name].shape[axis]

    found = dict(dynamic)
    guards: dict[Guard, None] = {}
    for code, line in zip(exported._guards_code, guard_lines(exported), strict=True):
        guard = read_guard(code, size, line)
        if guard is None:
            continue
        if guard.bound is None or guard.bound[0] not in found:
            guards[guard] = None
            continue
        name, low, high = guard.bound
        lowest, highest = found[name]
        found[name] = (
            max(lowest, low or 0),
            highest if high is None or high >= MAX_BATCH else high if highest is None else min(highest, high),
        )
    return found, tuple(guards)


def either(mine: Signature, other: Signature) -> Signature | None:
    """`mine` where its conditions or those of the other one hold, in the range of both; None where other sizes are free."""
    if [leaf.shape for leaf in mine.inputs] != [leaf.shape for leaf in other.inputs]:
        return None
    dynamic = {}
    for name, (low, high) in mine.dynamic.items():
        least, most = other.dynamic.get(name, (low, high))
        dynamic[name] = (max(low, least), min((h for h in (high, most) if h is not None), default=None))
    shared = [g for g in mine.guards if g in other.guards]
    rest = [[g for g in s.guards if g not in shared] for s in (mine, other)]
    where = next((g.where for g in rest[0] if g.where), "")
    both = [("and", *(g.expression for g in guards)) for guards in rest]
    guards = (*shared, Guard(("or", *both), where)) if all(rest) else tuple(shared)
    return replace(mine, dynamic=dynamic, guards=guards)


def program_inputs(exported: ExportedProgram) -> tuple[str, ...]:
    return tuple(s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT")


def batch_fixed(exported: ExportedProgram, call: FlatCall, rows: int, axes: Sequence[int | None]) -> CaptureError:
    """The error for a model that admits one number of rows only."""
    return CaptureError(
        "the model admits one number of rows only",
        where=size_line(exported, rows),
        got=f"a batch of exactly {rows} in the trace ({shapes(call)}, batch on axis {[*axes]})",
        wanted="any number of rows",
        hint=without_batch(call.paths, call.tensors, axes),
    )
