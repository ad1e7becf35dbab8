"""Copies, moves, traces and replicas of a compiled module: what torch does to it as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from eecompile.capture.tensors import share_tensors
from eecompile.errors import EecompileError
from eecompile.passes import facts
from eecompile.program import Program
from eecompile.runtime.devices import move_constants

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def shallow_copy(fast: CompiledModule) -> CompiledModule:
    """Another module object over everything that this one holds, as of any `nn.Module`."""
    new = object.__new__(type(fast))
    new.__dict__.update(fast.__dict__)
    return new


def deep_copy(fast: CompiledModule, memo: dict[int, Any]) -> CompiledModule:
    """A compiled module of its own, over a copy of the user's model where there is one."""
    new = memo[id(fast)] = object.__new__(type(fast))
    origin = fast.origin
    graphs = fast.training_graphs
    constant = (fast.program.signature, graphs.signature, fast.program.history, origin.example, origin.exported)
    for shared in (*constant, graphs.exported):
        memo[id(shared)] = shared  # never changed
    new.__dict__.update(copy.deepcopy(fast.__dict__, memo))
    _share_again(new.program, None if new.program.capture.models else new.running)
    if new.given is not None and new.original is not None and not new.program.capture.models:
        share_tensors(new.given, new.original)
    new.live.publish()
    return new


def keeps_dtypes(fast: CompiledModule, fn: Callable[[Tensor], Tensor]) -> None:
    """Refuses a conversion of parameters to another dtype.

    Args:
        fn: What `nn.Module._apply` does to each tensor.

    Raises:
        EecompileError: It changes a dtype.
    """
    for dtype in {t.dtype for t in (*fast.parameters(), *fast.buffers()) if t.is_floating_point()}:
        probe = fn(torch.zeros(1, dtype=dtype, device=fast.thresholds.device))
        if probe.dtype != dtype:
            raise EecompileError(
                "a compiled module keeps the dtype that it was captured in",
                got=str(probe.dtype),
                wanted=f"{dtype}: a move to another device only",
                hint=f"convert the model first, then compile it: eecompile(model.to({probe.dtype}), ...)",
            )


def moved(fast: CompiledModule) -> None:
    """Follows a move of the module's tensors: other graphs read the same ones, constants go along, plans are dropped."""
    graph, program = fast.graph_module, fast.program
    for other in (program.source, program.graph_module, *fast.training_graphs.graphs()):
        _rebind(other, graph)
    for part in (graph, program.source, program.graph_module):
        move_constants(part, facts.device_of(graph))
    fast.training_graphs.clear()
    fast.live.publish()
    fast.engine.reset()


def _rebind(gm: fx.GraphModule, source: fx.GraphModule) -> None:
    """Buffers of `gm` are those of `source` again, by name: moving a module replaces buffers."""
    for name, tensor in source.named_buffers():
        parent, _, leaf = name.rpartition(".")
        try:
            owner = gm.get_submodule(parent)
        except AttributeError:
            continue
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor


def _share_again(program: Program, model: nn.Module | None) -> None:
    """Makes the graphs of a copy read the same entries: a copied graph module has containers of its own."""
    if model is not None:
        share_tensors(program.source, model)
    for graph in (program.marked, program.graph_module):
        assert graph is not None
        for part in graph.modules():
            if isinstance(part, fx.GraphModule):
                share_tensors(part, program.source)
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule) and program.marked is not None and part is not program.marked:
            share_tensors(part, program.marked)


def traced(by: str) -> EecompileError:
    """The error for a trace of a compiled module: which rows go on is decided while it runs."""
    return EecompileError(
        f"a compiled module cannot be exported by {by}: what runs depends on the rows",
        hint="fast.save(path) writes a program that eecompile.load runs; torch.export.export(fast.original, ...) gives "
        "the model without exits",
    )


def _untraced(fast: CompiledModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_exporting():
        raise traced("torch.export")
    return fast.forward(*args, **kwargs)


WHOLE = (
    "a compiled module decides while it runs which rows go on, so torch.compile cannot take it as one graph: leave out "
    "fullgraph=True, or compile its stages: fast.backend = 'inductor'"
)
untraced = torch.compiler.disable(_untraced, reason=WHOLE)  # type: ignore[no-untyped-call]


def no_replicas() -> EecompileError:
    """The error for `nn.DataParallel`, whose copies share graphs and executors with the module that they are made of."""
    return EecompileError(
        "nn.DataParallel cannot copy a compiled module",
        wanted="one process for each device",
        hint="use torch.nn.parallel.DistributedDataParallel(fast), or accelerate",
    )
