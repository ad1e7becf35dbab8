"""A program of `torch.export` as the model: the user's own export, or a `.pt2` file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from eecompile.capture import check
from eecompile.capture.adapter import FlatCall
from eecompile.capture.axes import batch_size
from eecompile.capture.export import Captured, _outputs, _sizes, _Slot, flat_graph
from eecompile.capture.sizes import conditions, program_inputs, ranges
from eecompile.constants import spelling
from eecompile.errors import CaptureError
from eecompile.signature import POSITIONAL, Leaf, Parameter, Signature


def capture_program(
    exported: ExportedProgram, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """A program that the user exported, or read from a `.pt2` file, as the model.

    Args:
        args: Positional arguments of an example call; by default the example that the program was exported with.
        kwargs: Keyword arguments of that call.

    Raises:
        CaptureError: Its batch axis is fixed, or the example does not fit.
        UnsupportedModelError: Samples influence one another.
    """
    spec = exported.call_spec.in_spec
    graph_module, paths = program_graph(exported)
    check.writes_nothing(graph_module)
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    symbols = [d.node.expr for n in inputs for d in getattr(n.meta["val"], "shape", ())[:1] if isinstance(d, torch.SymInt)]
    if not symbols:
        raise CaptureError(
            "the exported program has a fixed batch",
            got=", ".join(f"{n.name}: {list(n.meta['val'].shape)}" for n in inputs),
            hint='export it with dynamic_shapes, for example {0: torch.export.Dim("batch", min=1)} for every input',
        )
    batch = symbols[0]
    axes: list[int | None] = []
    further: dict[str, dict[int, str]] = {}
    free: dict[Any, str] = {}
    for n, path in zip(inputs, paths, strict=True):
        exprs = [d.node.expr if isinstance(d, torch.SymInt) else None for d in n.meta["val"].shape]
        axes.append(next((i for i, e in enumerate(exprs) if e == batch), None))
        for i, e in enumerate(exprs):
            if e is not None and e != batch and e.is_Symbol:
                further.setdefault(path, {})[i] = free.setdefault(e, f"seq{len(free) or ''}")
    parameters, constants, arguments = _program_call(exported, paths)
    call = FlatCall(parameters, tuple(n.meta["val"] for n in inputs), paths, constants, arguments)
    names: dict[Any, str] = {batch: "batch", **free}
    leaves = tuple(
        Leaf(p, _sizes(n.meta["val"], names), n.meta["val"].dtype, a) for n, p, a in zip(inputs, paths, axes, strict=True)
    )
    outputs, out_constants, out_spec = _outputs(exported, graph_module, names)
    by_path = {leaf.path: leaf for leaf in leaves}
    dynamic, guards = conditions(exported, [by_path[p] for p in program_inputs(exported)], ranges(exported, names))
    signature = Signature(parameters, leaves, outputs, call.in_spec, out_spec, constants, out_constants, dynamic, guards)
    given = bool(args or kwargs)
    if not given and exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
    if not args and not kwargs:
        unknown: tuple[str, ...] = ("not checked: whether samples influence one another, since there is no example",)
        return Captured(graph_module, signature, exported, None, ("an exported program", *unknown))
    flat = tuple(signature.flatten(args, kwargs or {}))
    if given:
        batch_size(FlatCall(parameters, flat, paths, constants, arguments), axes)
    elif signature.batch_size(flat) < 2:
        flat = tuple(check.rows(signature, flat, [0, 0, 0]))
    order = [paths.index(p) for p in program_inputs(exported)]
    module = exported.module()

    def run(tensors: Sequence[torch.Tensor]) -> Any:
        positional, named = pytree.tree_unflatten([tensors[i] for i in order], spec)
        return module(*positional, **named)

    unknown = check.independent(signature, flat, run, "exported program", module)
    return Captured(graph_module, signature, exported, flat, ("an exported program", *unknown))


def program_graph(exported: ExportedProgram) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The program as a flat graph, and the names of its inputs; both in the order that calls are flattened in, by name."""
    graph_module = flat_graph(exported, "", program_inputs(exported))
    paths = tuple(sorted(program_inputs(exported)))
    by_path = dict(
        zip(program_inputs(exported), (n for n in graph_module.graph.nodes if n.op == "placeholder"), strict=True)
    )
    for path in reversed(paths):
        first = next(iter(graph_module.graph.nodes))
        if by_path[path] is not first:
            first.prepend(by_path[path])
    graph_module.recompile()
    return graph_module, paths


def _program_call(
    exported: ExportedProgram, paths: Sequence[str]
) -> tuple[tuple[Parameter, ...], tuple[tuple[Any] | None, ...], Any]:
    """Arguments of an exported program, which are named after its inputs, and how a call of them is flattened."""
    slots = [_Slot(i) for i in range(len(paths))]
    args, kwargs = pytree.tree_unflatten(list(slots), exported.call_spec.in_spec)
    if any(not isinstance(a, _Slot) for a in (*args, *kwargs.values())):
        raise CaptureError(
            "the exported program takes containers of tensors",
            wanted="plain tensor arguments",
            hint="pass the model itself instead of its export",
        )
    parameters = tuple(Parameter(n, POSITIONAL, spelling(None)) for n in program_inputs(exported))
    _, tree = pytree.tree_flatten(dict.fromkeys(paths, slots[0]))
    return parameters, (None,) * len(paths), tree
