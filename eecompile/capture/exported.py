"""A program of `torch.export` as the model: the user's own export, or a `.pt2` file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from eecompile.capture import check
from eecompile.capture.adapter import FlatCall
from eecompile.capture.export import Captured, _batch_size, _outputs, _sizes, _Slot, flat_graph, ranges
from eecompile.errors import CaptureError, EecompileError
from eecompile.signature import POSITIONAL, Leaf, Parameter, Signature


def capture_program(exported: ExportedProgram, example: Sequence[torch.Tensor] | None = None) -> Captured:
    """A program that the user exported, or read from a `.pt2` file, as the model.

    Raises:
        CaptureError: Its batch axis is fixed.
    """
    spec = exported.call_spec.in_spec
    inputs = [n for n in flat_graph(exported, "", _program_paths(exported)).graph.nodes if n.op == "placeholder"]
    symbols = [d.node.expr for n in inputs for d in getattr(n.meta["val"], "shape", ())[:1] if isinstance(d, torch.SymInt)]
    if not symbols:
        raise CaptureError(
            "the exported program has a fixed batch",
            got=", ".join(f"{n.name}: {list(n.meta['val'].shape)}" for n in inputs),
            hint='export it with dynamic_shapes, for example {0: torch.export.Dim("batch", min=1)} for every input',
        )
    batch = symbols[0]
    paths = _program_paths(exported)
    axes: list[int | None] = []
    further: dict[str, dict[int, str]] = {}
    free: dict[Any, str] = {}
    for n, path in zip(inputs, paths, strict=True):
        exprs = [d.node.expr if isinstance(d, torch.SymInt) else None for d in n.meta["val"].shape]
        axes.append(next((i for i, e in enumerate(exprs) if e == batch), None))
        for i, e in enumerate(exprs):
            if e is not None and e != batch and e.is_Symbol:
                further.setdefault(path, {})[i] = free.setdefault(e, f"seq{len(free) or ''}")
    parameters, constants, arguments = _program_call(spec, paths, len(inputs))
    tensors = tuple(example) if example is not None else tuple(n.meta["val"] for n in inputs)
    call = FlatCall(parameters, tensors, paths, constants, arguments)
    graph_module = flat_graph(exported, "", paths)
    names: dict[Any, str] = {batch: "batch", **free}
    leaves = tuple(
        Leaf(p, _sizes(n.meta["val"], names), n.meta["val"].dtype, a)
        for n, p, a in zip([n for n in graph_module.graph.nodes if n.op == "placeholder"], paths, axes, strict=True)
    )
    outputs, out_constants, out_spec = _outputs(exported, graph_module, names)
    signature = Signature(
        parameters, leaves, outputs, call.spec, out_spec, constants, out_constants, ranges(exported, names)
    )
    if example is not None:
        flat = tuple(example)
        _batch_size(call, axes)
        module = exported.module()
        check.independent(
            signature,
            signature.flatten_output(_call_program(module, spec, flat)),
            signature.flatten_output(_call_program(module, spec, check.rows(signature, flat, [1]))),
            1,
            "exported program",
        )
        return Captured(graph_module, signature, exported, flat, ("an exported program",))
    return Captured(graph_module, signature, exported, None, ("an exported program",))


def _call_program(module: nn.Module, spec: Any, flat: Sequence[torch.Tensor]) -> Any:
    args, kwargs = pytree.tree_unflatten(list(flat), spec)
    with torch.no_grad():
        return module(*args, **kwargs)


def _program_paths(exported: ExportedProgram) -> tuple[str, ...]:
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    return tuple(names)


def _program_call(spec: Any, paths: Sequence[str], count: int) -> tuple[tuple[Any, ...], tuple[tuple[Any] | None, ...], Any]:
    """Argument names of an exported program: positional ones are named after its inputs."""
    args, kwargs = pytree.tree_unflatten([_Slot(i) for i in range(count)], spec)
    if any(not isinstance(a, _Slot) for a in (*args, *kwargs.values())):
        raise CaptureError(
            "the exported program takes containers of tensors",
            wanted="plain tensor arguments",
            hint="pass the model itself instead of its export",
        )
    named = {paths[a.index]: a for a in args} | dict(kwargs)
    positional = POSITIONAL
    parameters = tuple(Parameter(n, positional) for n in named)
    leaves, tree = pytree.tree_flatten(dict(sorted(named.items())))
    if [s.index for s in leaves] != list(range(count)):
        raise EecompileError(
            "the exported program's inputs are not in the order of their names",
            got=", ".join(paths),
            hint="pass the model itself instead of its export",
        )
    return parameters, (None,) * count, tree
