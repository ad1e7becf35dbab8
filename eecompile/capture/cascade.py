"""Cascades: several models run once to compare them, put in order, and captured into a single graph.

The graph gives the last model's own output, whatever its type, and after it the predictions of the models before it.
What is not asked for is dead code: a model whose prediction is not read does not run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from eecompile.capture.adapter import flatten_call, no_attention_fastpath
from eecompile.capture.axes import BatchAxis, batch_axes, batch_size
from eecompile.capture.composite import Composite, Member, tensors
from eecompile.capture.export import Captured, capture_export
from eecompile.capture.untouched import trial
from eecompile.errors import CaptureError, EecompileError, StrategyError
from eecompile.prediction import find_prediction
from eecompile.signature import Leaf, arguments_by_name, path_of


def ready(
    composite: Composite,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    order: str = "check",
    batch_axis: BatchAxis = 0,
    prediction: str | int | Sequence[str | int | None] | None = None,
    measure: bool = False,
) -> Composite:
    """A composite of models, run once on the example, in the order asked for.

    Raises:
        StrategyError: Predictions that do not agree, or an input that no model takes.
        CaptureError: A model does not run on the example.
    """
    found = examine(composite, args, kwargs, batch_axis, prediction, measure)
    return by_cost(composite, found) if order == "cost" else composite


# ------------------------------------------------------------------------------------------------ examining


@dataclass(frozen=True)
class Examined:
    """What one call of a model showed: its cost for one row, and its prediction."""

    name: str
    flops: float
    seconds: float
    prediction: Leaf


def examine(
    composite: Composite,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch_axis: BatchAxis = 0,
    prediction: str | int | Sequence[str | int | None] | None = None,
    measure: bool = False,
) -> list[Examined]:
    """Runs every model once on the example, and compares their predictions.

    Raises:
        StrategyError: Predictions of another number of classes, another shape or dtype than the last model's.
        CaptureError: A model or its preparation fails, or the preparation changes the batch.
    """
    call = flatten_call(composite, args, kwargs)
    rows = batch_size(call, batch_axes(call, batch_axis))
    wanted = list(prediction) if isinstance(prediction, tuple | list) else None
    if wanted is not None and len(wanted) != len(composite.order):
        raise StrategyError(
            "prediction= has another length than the list of models", got=len(wanted), wanted=len(composite.order)
        )
    found = []
    named = arguments_by_name(call.parameters, args, kwargs)
    for k, name in enumerate(composite.order):
        member = composite.member(name)
        output, flops, seconds = _run(member, named, name, rows, measure, batch_axis == 0)
        leaves = _leaves(output, rows)
        one: Any = wanted[k] if wanted is not None else prediction
        if wanted is None and one is not None and all(one != leaf.path for leaf in leaves) and k < len(composite.order) - 1:
            one = None  # a name of the last model's output; the others have their own
        composite.leaf[name] = at = find_prediction(leaves, one, where=name)
        found.append(Examined(name, flops / rows, seconds / rows, leaves[at]))
    _agree(found)
    return found


def _run(
    member: Member, named: Mapping[str, Any], name: str, rows: int, measure: bool, batch_first: bool
) -> tuple[Any, float, float]:
    found, by_name = member.arguments(named)
    counter = FlopCounterMode(display=False)
    seconds: list[float] = []
    try:
        with trial(member), no_attention_fastpath():
            if member.prepare is not None:
                prepared = member.prepare(*found, **by_name)
                if batch_first:
                    _same_rows(prepared, name, rows)
            with counter:
                output = member(**named)
            for _ in range(5 if measure else 0):
                start = time.perf_counter()
                member(**named)
                seconds.append(time.perf_counter() - start)
    except EecompileError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CaptureError(
            "a model of the cascade does not run on the example",
            where=f"{name} ({type(member.model).__name__})",
            got=f"{type(error).__name__}: {first}",
            wanted=f"arguments {', '.join(p.name for p in member.takes)}",
            hint="give it inputs= or prepare= of its own",
        ) from error
    return output, float(counter.get_total_flops()), sorted(seconds)[len(seconds) // 2] if seconds else 0.0


def _same_rows(prepared: Any, name: str, rows: int) -> None:
    given = [t for t in tensors(prepared) if t.dim()]
    for t in given:
        alone = t.shape[0] == 1 and any(other.shape[0] == rows for other in given)  # one for all rows
        if t.shape[0] != rows and not alone:
            raise CaptureError(
                "the input preparation changes the batch",
                where=name,
                got=f"{list(t.shape)} from {rows} rows",
                wanted=f"{rows} rows on axis 0 of every tensor that it gives",
                hint="prepare each row by itself; keep the batch first",
            )


def _leaves(output: Any, rows: int) -> list[Leaf]:
    found = []
    for keys, t in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(t, Tensor):
            axis = next((i for i, s in enumerate(t.shape) if s == rows), None)
            found.append(Leaf(path_of(keys), tuple(t.shape), t.dtype, axis))
    return found


def _agree(found: Sequence[Examined]) -> None:
    last = found[-1].prediction
    for one in found[:-1]:
        mine = one.prediction
        if mine.shape[-1] != last.shape[-1]:
            raise StrategyError(
                "the models of a cascade must agree in their classes",
                where=f"{one.name}, output {mine.path}",
                got=f"{mine.shape[-1]} classes",
                wanted=f"{last.shape[-1]} classes, as {found[-1].name} gives",
            )
        if (mine.shape, mine.dtype, mine.batch_axis) != (last.shape, last.dtype, last.batch_axis):
            raise StrategyError(
                "the predictions of a cascade's models must be of one shape, dtype and batch axis",
                where=f"{one.name}, output {mine.path}",
                got=f"{mine.describe()}, batch on axis {mine.batch_axis}",
                wanted=f"{last.describe()}, batch on axis {last.batch_axis}, as {found[-1].name} gives",
                hint="change it in a wrapper module around that model",
            )


def by_cost(composite: Composite, found: Sequence[Examined]) -> Composite:
    """The same models, the cheapest first."""
    order = sorted(found, key=lambda e: (e.seconds, e.flops))
    sorted_ = Composite({e.name: composite.member(e.name) for e in order})
    sorted_.leaf.update(composite.leaf)
    return sorted_


# ------------------------------------------------------------------------------------------------ capturing


def capture_cascade(
    composite: Composite,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    batch_axis: BatchAxis = 0,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    training: bool = False,
) -> Captured:
    """The composite as one graph, under the calling convention of a single model.

    The signature has the output of the last model; the graph gives the predictions of the others after it.
    """
    captured = capture_export(composite, args, kwargs, batch_axis=batch_axis, dynamic=dynamic, training=training)
    signature = captured.signature
    count = len(composite.order) - 1
    own = [replace(leaf, path=leaf.path.removeprefix("[0]").lstrip(".") or "output") for leaf in signature.outputs[:-count]]
    whole = pytree.tree_unflatten(list(range(len(signature.out_constants))), signature.out_spec)
    signature = replace(
        signature,
        outputs=tuple(own),
        out_spec=pytree.tree_structure(whole[0]),
        out_constants=signature.out_constants[:-count],
    )
    return replace(captured, signature=signature, models=composite.order)
