"""Changes of the user's model that a captured graph cannot follow: replaced modules, and Python attributes that it reads.

New weights are seen by every graph (`capture/tensors.py`). An adapter that is merged into the weights, added or switched off
changes what the model's Python does, and the graph still does what it did when it was captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.capture.adapter import FlatCall, mode
from eecompile.capture.check import LOOSE, difference
from eecompile.capture.tensors import entry, path_in_model
from eecompile.capture.untouched import untouched
from eecompile.errors import CaptureError
from eecompile.program import Program
from eecompile.runtime.precision import few_rows

PLAIN = (bool, int, float, str, type(None))
MOST_ITEMS = 16  # of a container that is looked at
OWN = frozenset(nn.Module().__dict__)


class ModelWatch:
    """Refuses calls once the model is another one than was captured.

    Args:
        program: A captured program.
        model: The user's model; None where there is none any more.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._paths: list[str] = []
        self._attributes: list[tuple[str, Any, dict[str, Any], tuple[Any, ...]]] = []
        self._converted: list[tuple[dict[str, Any], str, torch.dtype]] = []
        if model is None or program.capture.front_end != "export" or program.capture.models:
            return
        targets = {path_in_model(str(n.target)).rpartition(".")[0] for n in program.source.graph.nodes if n.op == "get_attr"}
        self._converted = _first_floating(program)
        used = {".".join(t.split(".")[: i + 1]) for t in targets for i in range(t.count(".") + 1)}
        for path, module in model.named_modules(remove_duplicate=False):
            parent, _, name = path.rpartition(".")
            if path and path in used:
                self._dicts.append(model.get_submodule(parent)._modules)
                self._names.append(name)
                self._modules.append(module)
                self._paths.append(path)
            names = [n for n, v in module.__dict__.items() if n not in OWN and _plain(v)]
            if names and not type(module).__module__.startswith("torch."):
                self._look_at(path, module, names)

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Raises `CaptureError` where a module was replaced, or where attributes changed and the graph is not the model."""
        if not all(map(is_, map(dict.get, self._dicts, self._names), self._modules)):
            found = zip(self._paths, map(dict.get, self._dicts, self._names), self._modules, strict=True)
            path, now, before = next((p, a, b) for p, a, b in found if a is not b)
            raise _changed(path, f"{type(now).__name__} in the place of {type(before).__name__}")
        for entries, name, dtype in self._converted:
            if entries[name].dtype != dtype:
                raise _changed(name, f"{entries[name].dtype} in the place of {dtype}: the dtype of capture is kept")
        for _, get, held, seen in self._attributes:
            if get(held) != seen:
                self._compare(flat)
                return

    def _look_at(self, path: str, module: nn.Module, names: Sequence[str]) -> None:
        get = itemgetter(names[0], *names)  # a tuple whatever the number of names
        self._attributes.append((path, get, module.__dict__, tuple(map(_copied, get(module.__dict__)))))

    def _compare(self, flat: Sequence[Tensor]) -> None:
        """Refuses where graph and model differ; attributes that change without a meaning are not looked at again."""
        assert self.model is not None
        signature, model = self.program.signature, self.model
        rows = few_rows(self.program, flat)
        args, kwargs = FlatCall(signature.parameters, (), (), signature.constants, signature.in_spec).arguments(rows)
        kept, moved = [], []
        for path, get, held, seen in self._attributes:
            names = get.__reduce__()[1][1:]
            still = [n for n, v in zip(names, seen[1:], strict=True) if n in held and held[n] == v]
            moved += [f"{path}.{n}".lstrip(".") for n in names if n not in still]
            kept.append((path, still))
        with torch.no_grad(), untouched(model), mode(model, False):
            want = signature.flatten_output(model(*args, **kwargs))
            got = list(self.program.source(*rows))[: len(want)]
        worst = max(difference(a, b) for a, b in zip(got, want, strict=True))
        if worst > LOOSE:
            raise _changed(", ".join(moved[:5]), f"other attributes, and outputs that differ by {worst:.2g}")
        self._attributes = []
        for path, still in kept:
            if still:
                self._look_at(path, model.get_submodule(path), still)


def _first_floating(program: Program) -> list[tuple[dict[str, Any], str, torch.dtype]]:
    """One parameter whose dtype shows that the model was converted (`model.half()` changes parameters where they are)."""
    for target, parameter in program.source.named_parameters():
        if parameter.is_floating_point():
            return [(*entry(program.source, target), parameter.dtype)]
    return []


def _changed(where: str, got: str) -> CaptureError:
    return CaptureError(
        "the model has changed since it was compiled, and the captured graph cannot follow",
        where=where,
        got=got,
        hint="compile it again in its present state (merge or add adapters and quantize first), or undo the change",
    )


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) <= MOST_ITEMS and all(isinstance(v, PLAIN) for v in value)
    if isinstance(value, dict):
        return len(value) <= MOST_ITEMS and all(isinstance(v, PLAIN) for v in value.values())
    return isinstance(value, PLAIN)


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | set | dict) else value
