"""Parameters and buffers of a graph are those of its model: one entry for each, wherever it is replaced.

Every graph of a program reads the same entries as the user's modules. So weights that are loaded with `assign=True`, swapped
by `torch.func.functional_call`, moved or quantized are seen by the next call, in whichever of them they were replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from eecompile.errors import CaptureError

ROOT = "eecompile_root"  # buffers of the model itself: those of a graph itself are settings of its own
MODEL = "eecompile_model"  # where what has a name that a graph needs for itself stands under its own path
CONSTANTS = "eecompile_constants"  # tensors that are neither parameters nor buffers
TAKEN = {n for n in dir(fx.GraphModule) if not hasattr(nn.Module, n) and n[0] != "_"} | {"_graph", "meta"}
ENTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def name_in_graph(target: str, value: Any, model: nn.Module) -> str:
    """What a graph calls an attribute of the model: its own path, or one within `MODEL`, `CONSTANTS` or `ROOT`.

    Raises:
        CaptureError: A parameter of the model itself has a name that the graph needs for itself.
    """
    path, _, name = target.rpartition(".")
    first = target.partition(".")[0]
    if first.startswith("eecompile_") or first in TAKEN:
        if path:
            return f"{MODEL}.{target}"
        if isinstance(value, nn.Parameter):
            raise CaptureError(
                "a parameter of the model itself has a name that the captured graph needs for itself",
                where=first,
                wanted=f"another name than eecompile_*, {', '.join(sorted(TAKEN))}",
                hint="rename it, or put the model into another module: its parameters then have a path of their own",
            )
    if not isinstance(value, Tensor):
        return target
    owner = _submodule(model, path)
    if owner is None or not any(getattr(owner, entries).get(name) is value for entries in ENTRIES[:2]):
        return f"{CONSTANTS}.{target.replace('.', '_')}"
    return f"{ROOT}.{name}" if not path and name in owner._buffers else target


def share_tensors(graph_module: fx.GraphModule, source: nn.Module) -> None:
    """Makes a graph read the entries of `source`, another graph of the same model or the model itself."""
    constants = _submodule(graph_module, CONSTANTS)
    if constants is not None:
        constants._non_persistent_buffers_set.update(constants._buffers)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        own = _submodule(graph_module, path)
        theirs = _submodule(source, path)
        shared: tuple[str, ...] = ENTRIES
        if theirs is None and path == ROOT:
            theirs, shared = source, ENTRIES[1:]
        elif theirs is None and path.startswith(f"{MODEL}."):
            theirs = _submodule(source, path_in_model(path))
        if own is None or theirs is None or own is theirs:
            continue
        if not path:  # the buffers of a graph itself are settings
            if name in theirs._parameters:
                own.__dict__["_parameters"] = theirs._parameters
        elif any(name in getattr(theirs, entries) for entries in ENTRIES[:2]):
            for entries in shared:
                own.__dict__[entries] = getattr(theirs, entries)


def path_in_model(path: str) -> str:
    """The model's own path of what a graph calls so."""
    return path.removeprefix(f"{MODEL}.")


def entry(graph_module: nn.Module, target: str) -> tuple[dict[str, Any], str]:
    """Where a parameter or buffer stands: `entries[name]` is the present one."""
    path, _, name = target.rpartition(".")
    owner = graph_module.get_submodule(path)
    return (owner._parameters if name in owner._parameters else owner._buffers), name


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path, None where there is none with entries of the usual kind."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if all(isinstance(found.__dict__.get(entries), dict) for entries in ENTRIES[:2]) else None
