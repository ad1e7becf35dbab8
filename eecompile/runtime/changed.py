"""Changes of the user's model that a captured graph cannot follow: replaced modules, and whatever else its Python reads.

New weights are seen by every graph (`capture/tensors.py`). An adapter that is merged into the weights, added or switched off
changes what the model's Python does, and the graph still does what it did when it was captured. So do attributes, those of a
class or a config, globals, hooks and weights that were one tensor: after a change of these, graph and model are compared.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, is_, itemgetter
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.capture.adapter import FlatCall, mode
from eecompile.capture.check import LOOSE, difference
from eecompile.capture.tensors import CONSTANTS, entry, path_in_model
from eecompile.capture.untouched import untouched
from eecompile.errors import CaptureError
from eecompile.program import Program
from eecompile.runtime.precision import few_rows

PLAIN = (bool, int, float, str, type(None))
MOST_ITEMS = 16  # of a container that is looked at
OWN = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Values:
    """Plain values that code reads, by name, as they were.

    Args:
        path: What error messages call their owner.
        owner: An object.
        names: Those in its `__dict__`; with `by_attribute` those that its class may have.
    """

    def __init__(self, path: str, owner: Any, names: Sequence[str], by_attribute: bool = False) -> None:
        self.path, self.owner, self.names, self.by_attribute = path, owner, tuple(names), by_attribute
        self.get: Callable[[Any], Any] = (attrgetter if by_attribute else itemgetter)(names[0], *names)  # always a tuple
        self.held: Any = owner if by_attribute else vars(owner)
        self.seen = tuple(map(_copied, self.get(self.held)))

    def __reduce__(self) -> Any:  # a copy reads what its own owner has, and the same globals
        owner = self.path if isinstance(self.owner, ModuleType) else self.owner
        return _values_again, (self.path, owner, self.names, self.by_attribute, self.seen)

    def moved(self) -> list[str]:
        """Names whose values are others than before, or gone."""
        now = [getattr(self.owner, n, _GONE) for n in self.names]
        return [n for n, v, old in zip(self.names, now, self.seen[1:], strict=True) if not _plain(v) or v != old]

    def kept(self, names: Sequence[str]) -> Values:
        return Values(self.path, self.owner, names, self.by_attribute)


def _values_again(path: str, owner: Any, names: Sequence[str], by_attribute: bool, seen: Any) -> Values:
    found = object.__new__(Values)
    owner = importlib.import_module(path) if isinstance(owner, str) else owner
    found.path, found.owner, found.names, found.by_attribute = path, owner, tuple(names), by_attribute
    found.get = (attrgetter if by_attribute else itemgetter)(names[0], *names)
    found.held, found.seen = owner if by_attribute else vars(owner), seen
    return found


_GONE = object()


class Objects:
    """Entries of dicts, or of the `__dict__` of modules, that must stay the same objects, or stay away."""

    def __init__(self) -> None:
        self.owners: list[Any] = []
        self.names: list[str] = []
        self.values: list[Any] = []
        self.paths: list[str] = []
        self.dicts: list[dict[str, Any]] = []

    def add(self, owner: Any, name: str, path: str) -> None:
        held = owner if isinstance(owner, dict) else vars(owner)
        for items, item in zip(vars(self).values(), (owner, name, held.get(name), path, held), strict=True):
            items.append(item)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.dicts = [o if isinstance(o, dict) else vars(o) for o in self.owners]  # a copied module has another one

    @property
    def same(self) -> bool:
        return all(map(is_, map(dict.get, self.dicts, self.names), self.values))

    def moved(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, present value and the one before."""
        for held, name, before, path in zip(self.dicts, self.names, self.values, self.paths, strict=True):
            if held.get(name) is not before:
                yield path, held.get(name), before

    def follow(self) -> None:
        self.values = list(map(dict.get, self.dicts, self.names))


class ModelWatch:
    """Refuses calls once the model is another one than was captured.

    Args:
        program: A captured program.
        model: The user's model; None where there is none any more.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self._modules, self._objects = Objects(), Objects()
        self._values: list[Values] = []
        self._hooks: list[Any] = []
        self._ties: list[tuple[dict[str, Any], str, dict[str, Any], str, str]] = []
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._converted: list[tuple[dict[str, Any], str, torch.dtype]] = []
        self._follow([])
        if model is None or program.capture.front_end != "export" or program.capture.models:
            return
        targets = [str(n.target) for n in program.source.graph.nodes if n.op == "get_attr"]
        paths = {path_in_model(t).rpartition(".")[0] for t in targets}
        self._converted = _first_floating(program)
        used = {".".join(t.split(".")[: i + 1]) for t in paths for i in range(t.count(".") + 1)}
        shared: dict[int, tuple[dict[str, Any], str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            parent, _, name = path.rpartition(".")
            if path and path in used:
                self._modules.add(model.get_submodule(parent)._modules, name, path)
            self._hooks += [getattr(module, hooks) for hooks in HOOKS]
            self._objects.add(module, "forward", f"{path}.forward".lstrip("."))
            self._tied(path, module, shared)
        self._read_values(model)
        if any(f"{CONSTANTS}.{p.replace('.', '_')}" in targets for p in self._objects.paths):
            self._weights = list(shared.values())  # a tensor that a module keeps may have been made of them
        self._follow(self._values)

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Raises `CaptureError` where a module was replaced, or where graph and model differ after another change."""
        if not self._modules.same:
            path, now, before = next(self._modules.moved())
            raise _changed(path, f"{type(now).__name__} in the place of {type(before).__name__}")
        for entries, name, dtype in self._converted:
            if entries[name].dtype != dtype:
                raise _changed(name, f"{entries[name].dtype} in the place of {dtype}: the dtype of capture is kept")
        for one, name, other, alias, path in self._ties:
            if one.get(name) is not other.get(alias):
                raise _changed(path, "a tensor of its own in the place of one that was shared")
        if not self._objects.same or (self._weights and self._versioned() != self._versions) or (
            sum(map(len, self._hooks)) != self._counts or not self._reads_same()
        ):  # fmt: skip
            self._compare(flat)
            return

    def _tied(self, path: str, module: nn.Module, shared: dict[int, tuple[dict[str, Any], str]]) -> None:
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if tensor is None:
                    continue
                first = shared.setdefault(id(tensor), (entries, name))
                if first[0] is not entries:
                    self._ties.append((*first, entries, name, f"{path}.{name}".lstrip(".")))

    def _read_values(self, model: nn.Module) -> None:
        """Attributes of the modules and their classes, of objects that they hold, and globals that their code names."""
        globals_: dict[str, set[str]] = {}
        held: dict[int, tuple[str, Any]] = {}
        for path, module in model.named_modules():
            if type(module).__module__.startswith("torch."):
                continue
            mine = {n: v for n, v in module.__dict__.items() if n not in OWN}
            self._look_at(path, module, [n for n, v in mine.items() if _plain(v)])
            for n, v in mine.items():
                if isinstance(v, Tensor):
                    self._objects.add(module, n, f"{path}.{n}".lstrip("."))
                elif _records(v):
                    held.setdefault(id(v), (f"{path}.{n}".lstrip("."), v))
            of_class: set[str] = set()
            for kind in type(module).__mro__:
                if kind.__module__.startswith("torch.") or kind is object:
                    continue
                for v in vars(kind).values():
                    if isinstance(v, FunctionType):
                        found = globals_.setdefault(v.__globals__.get("__name__", ""), set())
                        found.update(name for name in v.__code__.co_names if _plain(v.__globals__.get(name, _GONE)))
                        of_class.update(name for name in v.__code__.co_names if name not in mine)
            self._look_at(path, module, [n for n in sorted(of_class) if _of_class(module, n)], by_attribute=True)
        for path, owner in held.values():
            self._look_at(path, owner, [n for n, v in vars(owner).items() if _plain(v)])
        for name, names in globals_.items():
            there = [n for n in sorted(names) if not n.startswith("__") and hasattr(sys.modules.get(name), n)]
            self._look_at(name, sys.modules.get(name), there, by_attribute=True)

    def _look_at(self, path: str, owner: Any, names: Sequence[str], by_attribute: bool = False) -> None:
        if names:
            self._values.append(Values(path, owner, names, by_attribute))

    def _reads_same(self) -> bool:
        try:
            return [get(owner) for get, owner in self._reads] == self._seen
        except (KeyError, AttributeError):  # one was deleted
            return False

    def _follow(self, values: list[Values]) -> None:
        """The present state is what later calls are compared with."""
        self._reads_of(values)
        self._objects.follow()
        self._counts, self._versions = self._hooked(), self._versioned()

    def _reads_of(self, values: list[Values]) -> None:
        self._values = values
        self._reads, self._seen = [(v.get, v.held) for v in values], [v.seen for v in values]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_reads", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reads_of(self._values)

    def _hooked(self) -> int:
        return sum(map(len, self._hooks))

    def _versioned(self) -> list[tuple[int, int]]:
        """Which tensors the weights are, and how often each was written to."""
        found = (entries.get(name) for entries, name in self._weights)
        return [(id(t), 0 if t is None or t.is_inference() else t._version) for t in found]

    def _compare(self, flat: Sequence[Tensor]) -> None:
        """Refuses where graph and model differ; what changes without a meaning is not looked at again."""
        assert self.model is not None
        signature, model = self.program.signature, self.model
        rows = few_rows(self.program, flat)
        args, kwargs = FlatCall(signature.parameters, (), (), signature.constants, signature.in_spec).arguments(rows)
        moved = [path for path, _, _ in self._objects.moved()]
        moved += [f"{v.path}.{n}".lstrip(".") for v in self._values for n in v.moved()]
        moved += ["a hook"] if self._hooked() != self._counts else []
        moved += ["weights that a table was computed from"] if self._versioned() != self._versions else []
        with torch.no_grad(), untouched(model), mode(model, False):
            want = signature.flatten_output(model(*args, **kwargs))
            got = list(self.program.source(*rows))[: len(want)]
        worst = max(difference(a, b) for a, b in zip(got, want, strict=True))
        if worst > LOOSE:
            raise _changed(", ".join(moved[:5]), f"other attributes, and outputs that differ by {worst:.2g}")
        still = [(v, v.moved()) for v in self._values]
        self._follow([v.kept([n for n in v.names if n not in gone]) for v, gone in still if len(gone) < len(v.names)])


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


def _of_class(module: nn.Module, name: str) -> bool:
    """Whether a name is a plain attribute of a module's class, which an attribute of the module may hide later."""
    found = getattr(type(module), name, _GONE)
    return not hasattr(nn.Module, name) and not name.startswith("__") and _plain(found)


def _records(value: Any) -> bool:
    """Whether a value is an object with attributes of its own, such as a config."""
    if isinstance(value, nn.Module | Tensor | type | FunctionType | ModuleType) or callable(value):
        return False
    return not type(value).__module__.startswith("torch.") and isinstance(getattr(value, "__dict__", None), dict)


def _copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, list | set | dict) else value
