"""Which axis of which input counts samples, and which are lengths that may change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch

from eecompile.capture.adapter import FlatCall
from eecompile.errors import CaptureError

BatchAxis = int | Mapping[str, int | None] | Callable[[str, torch.Tensor], int | None]


def batch_axes(call: FlatCall, batch_axis: BatchAxis) -> tuple[int | None, ...]:
    """Batch axis of each tensor input; None where it has none."""
    if isinstance(batch_axis, Mapping):
        unknown = sorted(set(batch_axis) - set(call.paths))
        if unknown:
            raise CaptureError(
                "batch_axis names an input that the example does not have", got=unknown, wanted=", ".join(call.paths)
            )
        return tuple(batch_axis.get(p, 0) if t.dim() else None for p, t in zip(call.paths, call.tensors, strict=True))
    if callable(batch_axis):
        return tuple(batch_axis(p, t) for p, t in zip(call.paths, call.tensors, strict=True))
    sizes = [t.shape[batch_axis] for t in call.tensors if t.dim() > batch_axis]
    if not sizes:
        raise CaptureError("no input has that batch axis", got=f"batch_axis={batch_axis}", wanted=shapes(call))
    size = max(set(sizes), key=lambda s: (s != 1, sizes.count(s)))
    axes: list[int | None] = []
    for path, t in zip(call.paths, call.tensors, strict=True):
        if t.dim() <= batch_axis or (t.shape[batch_axis] == 1 and size != 1):
            axes.append(None)
        elif t.shape[batch_axis] != size:
            raise CaptureError(
                "the inputs disagree about the batch size",
                where=path,
                got=shapes(call),
                wanted=f"{size} rows on axis {batch_axis} of every input that has a batch",
                hint='pass batch_axis={"name": axis or None, ...}',
            )
        else:
            axes.append(batch_axis)
    return tuple(axes)


def shapes(call: FlatCall) -> str:
    return ", ".join(f"{p}: {list(t.shape)}" for p, t in zip(call.paths, call.tensors, strict=True))


def without_batch(paths: Sequence[str], tensors: Sequence[torch.Tensor], axes: Sequence[int | None]) -> str:
    """The next step where the number of rows turns out to be something else: names inputs that may have no batch."""
    batched = [p for p, a in zip(paths, axes, strict=True) if a is not None]
    square = [
        p
        for p, t, a in zip(paths, tensors, axes, strict=True)
        if a is not None and any(t.shape[a] == s for i, s in enumerate(t.shape) if i != a)
    ]
    named = sorted(square if len(batched) > 1 else [], key=lambda p: tensors[paths.index(p)].dim()) or batched[1:]
    if not named:
        return "rewrite what counts rows: a loop over the rows, or a constant where a view has the number of rows"
    return (
        f"if {named[0]} has no batch (an adjacency, a table), pass batch_axis={{{named[0]!r}: None}}; "
        "give an example whose number of rows is no other size"
    )


def batch_size(call: FlatCall, axes: Sequence[int | None]) -> int:
    sizes = {t.shape[a] for t, a in zip(call.tensors, axes, strict=True) if a is not None}
    if len(sizes) != 1:
        raise CaptureError(
            "the example has no single batch size", got=shapes(call), hint='pass batch_axis={"name": axis or None}'
        )
    size = sizes.pop()
    if size < 2:
        raise CaptureError(
            "the example has a batch of 1, in which a batch axis cannot be recognised",
            got=shapes(call),
            wanted="at least 2 different rows, better 4",
            hint="pass several real inputs at once in example_inputs or example_kwargs",
        )
    return size


def token_axes(call: FlatCall, axes: Sequence[int | None]) -> dict[str, dict[int, str]]:
    """Axes that look like a sequence length: axis 1 of integer inputs `[B, S]`, and the same size elsewhere."""
    lengths = {
        t.shape[1]
        for t, a in zip(call.tensors, axes, strict=True)
        if a == 0 and t.dim() == 2 and not t.is_floating_point() and t.shape[1] > 2
    }
    names = {s: ("seq" if i == 0 else f"seq{i}") for i, s in enumerate(sorted(lengths, reverse=True))}
    found: dict[str, dict[int, str]] = {}
    for path, t, a in zip(call.paths, call.tensors, axes, strict=True):
        if a == 0 and t.dim() >= 2 and t.shape[1] in names and (t.dim() == 2 or not t.is_floating_point()):
            found[path] = {i: names[s] for i, s in enumerate(t.shape) if i > 0 and s in names}
    return found


def integers_only(lengths: Mapping[str, Mapping[int, str]], call: FlatCall) -> dict[str, dict[int, str]]:
    """The free lengths of token ids and masks, without those of floating-point inputs."""
    floating = {p for p, t in zip(call.paths, call.tensors, strict=True) if t.is_floating_point()}
    return {path: dict(axes) for path, axes in lengths.items() if path not in floating}


def counts_rows(e: sympy.Expr, batch: sympy.Expr) -> bool:
    """Whether a size is the batch, also where it is written in another way: `(batch*seq + seq - 1)//seq`."""
    if e == batch or e.free_symbols <= {batch}:
        return bool(e == batch)
    others = sorted(e.free_symbols - {batch}, key=str)
    for rows in (3, 7, 11):  # sizes are sums, products and quotients: equal at nine points, equal
        for start in (2, 5, 13):
            values = {s: start + 2 * k for k, s in enumerate(others)} | {batch: rows}
            if e.subs(values) != rows:
                return False
    return True
