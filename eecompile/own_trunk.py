"""A trunk of its own: training the trunk changes copies of the model's weights, and the user's model stays as it was.

Every graph of a program reads the entries of the user's modules (`capture/tensors.py`). Before the trunk is trained for the
first time, the model is copied and all graphs read the entries of the copy. One graph goes on reading the user's: it is what
`fast.full` runs, so that trained exits are compared with the model as it was given.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from eecompile.capture.blocks import BlocksModel
from eecompile.capture.tensors import ENTRIES
from eecompile.errors import EecompileError
from eecompile.passes import facts

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

COPIED = "the trunk is trained in a copy: the model as given is unchanged, and comparisons are with it"
IN_PLACE = "the trunk is trained in place: the model as given changes, and comparisons are with what it becomes"
NOT_SAVED = "the trunk has been trained: comparisons are with what it became, since the model as given is not saved"


def copy_trunk(fast: CompiledModule) -> None:
    """From now on the compiled module has weights of its own; done once, however often it is called.

    Raises:
        EecompileError: The model cannot be trained in a graph, or not be copied.
    """
    origin, graphs = fast.origin, fast.training_graphs
    if origin.given is not None:
        return
    fast.capture_training()  # before anything changes: not every model can be trained
    given = facts.copy(fast.engine.full_graph())
    memo: dict[int, Any] = {}
    for p in fast.head_parameters():  # what was inserted is trained as it is, also where a part of the model reads it
        memo[id(p)] = p
    try:
        found = copy.deepcopy((origin.captured, origin.running, _containers(fast.program.source)), memo)
    except Exception as error:  # the model's own code may raise anything
        raise EecompileError(
            "the model cannot be copied, and training the trunk would change it",
            where=fast.title,
            got=f"{type(error).__name__}: {error}",
            hint="fit(..., train_in_place=True) trains the model itself; trunk=False trains the heads alone",
        ) from error
    origin.captured, origin.running, _ = found
    seen: set[int] = set()
    for graph in (fast.program.source, fast.program.graph_module, fast.graph_module, *graphs.graphs()):
        _reads_copies(graph, memo, seen)
    origin.given = given
    fast.follow_graphs()


def own_trunk(fast: CompiledModule, in_place: bool) -> None:
    """Says whether the trunk is trained in a copy or in place, and makes the copy."""
    if not in_place:
        copy_trunk(fast)
    note = IN_PLACE if fast.given is None else COPIED
    fast.origin.notes = (*(n for n in fast.origin.notes if n not in (IN_PLACE, COPIED)), note)


def _containers(module: nn.Module) -> list[Any]:
    """The entries that a graph reads, as the objects that they stand in."""
    return [m.__dict__[entries] for m in module.modules() for entries in ENTRIES]


def _reads_copies(module: nn.Module, memo: dict[int, Any], seen: set[int]) -> None:
    """Entries of the user's modules, and those modules, become their copies; what was inserted is left as it is."""
    if id(module) in seen:
        return
    seen.add(id(module))
    for entries in ENTRIES:
        held = module.__dict__[entries]
        shared = memo.get(id(held))
        if shared is not None:
            module.__dict__[entries] = shared
        elif isinstance(held, dict):
            held.update({name: memo.get(id(t), t) for name, t in held.items()})
    for name, child in module._modules.items():
        if child is None:
            continue
        if isinstance(child, BlocksModel) and id(child) not in memo:
            memo[id(child)] = child.over(memo[id(child.model)])
        if id(child) in memo:
            module._modules[name] = memo[id(child)]
        else:
            _reads_copies(child, memo, seen)
