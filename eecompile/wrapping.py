"""What torch does to a compiled module as a whole: copies, traces, replicas."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import torch
from torch import fx, nn

from eecompile.capture.tensors import share_tensors
from eecompile.errors import EecompileError
from eecompile.program import Program


def shallow_copy(fast: Any) -> Any:
    """Another module object over everything that this one holds, as of any `nn.Module`."""
    new = object.__new__(type(fast))
    new.__dict__.update(fast.__dict__)
    return new


def deep_copy(fast: Any, memo: dict[int, Any]) -> Any:
    """A compiled module of its own, over a copy of the user's model where there is one."""
    new = memo[id(fast)] = object.__new__(type(fast))
    constant = (fast.program.signature, fast.train_signature, fast.program.history, fast.example, *fast.artifact.values())
    for shared in constant:
        memo[id(shared)] = shared  # never changed
    derived: dict[str, Any] = {"_training_graphs": {}, "_executors": {}, "_full": []}
    fresh = {**derived, "_lock": threading.RLock(), "_references": weakref.WeakKeyDictionary()}
    state = {name: value for name, value in fast.__dict__.items() if name not in (*fresh, "_chosen")}
    new.__dict__.update(copy.deepcopy(state, memo) | fresh)
    _share_again(new.program, None if new.program.models else new.running)
    if new.given is not None and new.original is not None and not new.program.models:
        share_tensors(new.given, new.original)
    new.settings = fast.settings
    new.executor = fast.__dict__["_asked"]
    return new


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


def _untraced(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_exporting():
        raise traced("torch.export")
    return fast.forward(*args, **kwargs)


untraced = torch.compiler.disable(_untraced)  # type: ignore[no-untyped-call]


def no_replicas() -> EecompileError:
    """The error for `nn.DataParallel`, whose copies share graphs and executors with the module that they are made of."""
    return EecompileError(
        "nn.DataParallel cannot copy a compiled module",
        wanted="one process for each device",
        hint="use torch.nn.parallel.DistributedDataParallel(fast), or accelerate",
    )
