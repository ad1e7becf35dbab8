"""Changes of the user's model that a captured graph cannot follow: replaced modules, and whatever else its Python reads.

New weights are seen by every graph (`capture/tensors.py`). An adapter that is merged into the weights, added or switched off
changes what the model's Python does, and the graph still does what it did when it was captured. So do attributes, those of a
class or a config, globals, hooks and weights that were one tensor: after a change of these, graph and model are compared.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import attrgetter, is_, itemgetter
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.capture.adapter import mode
from eecompile.capture.check import LOOSE, difference
from eecompile.capture.tensors import CONSTANTS, ROOT, entry, path_in_model
from eecompile.capture.untouched import untouched
from eecompile.errors import CaptureError
from eecompile.program import Program
from eecompile.runtime.precision import few_rows

PLAIN = (bool, int, float, str, type(None))
MOST_ITEMS = 16  # of a container that is looked at
MOST_ROWS = 32  # of a call, to compare graph and model on
EQUAL = 3  # comparisons on different calls after which a change has no meaning
OWN = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOK, TABLE = "a hook", "weights that a table was computed from"


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

    def now(self, name: str) -> Any:
        return getattr(self.owner, name, _GONE) if self.by_attribute else vars(self.owner).get(name, _GONE)

    def path_of(self, name: str) -> str:
        return f"{self.path}.{name}".lstrip(".")

    def moved(self) -> dict[str, Any]:
        """Present values, by path, that are others than before, or gone."""
        now = [(n, self.now(n), old) for n, old in zip(self.names, self.seen[1:], strict=True)]
        return {self.path_of(n): v for n, v, old in now if not _plain(v) or v != old}

    def follow(self, paths: Collection[str], left: Collection[str]) -> Values | None:
        """The same with the present values at some paths and without those at others; None where nothing is left."""
        seen = {
            n: _copied(self.now(n)) if self.path_of(n) in paths else old
            for n, old in zip(self.names, self.seen[1:], strict=True)
            if self.path_of(n) not in left and (self.path_of(n) not in paths or _plain(self.now(n)))
        }
        first = list(seen.values())[:1]
        return (
            _values_again(self.path, self.owner, list(seen), self.by_attribute, (*first, *seen.values())) if seen else None
        )


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

    def follow(self, paths: Collection[str], left: Collection[str]) -> None:
        """The present objects at some paths are the ones to keep; those at others are not looked at again."""
        old, self.__dict__ = self.__dict__, Objects().__dict__
        for owner, name, value, path, held in zip(*old.values(), strict=True):
            if path not in left:
                self.add(owner, name, path)
                self.values[-1] = held.get(name) if path in paths else value


class ModelWatch:
    """Refuses calls once the model is another one than was captured.

    Args:
        program: A captured program.
        model: What was captured: the user's model, or all models of a cascade; None where there is none any more.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self._left: set[str] = set()  # paths of what varies without a meaning
        self._note(None if program.capture.front_end != "export" else model)

    def _note(self, model: nn.Module | None) -> None:
        """The present state is what calls are compared with."""
        self._modules, self._objects = Objects(), Objects()
        self._children: list[tuple[str, dict[str, Any]]] = []
        self._values: list[Values] = []
        self._hooks: list[Any] = []
        self._ties: list[tuple[dict[str, Any], str, dict[str, Any], str, str]] = []
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._used = Used([] if model is None else _tensors_of(self.program))
        self._equal: dict[str, tuple[int, Any, bool]] = {}  # by path: comparisons, the value then, whether it varied
        if model is not None:
            shared: dict[int, tuple[dict[str, Any], str]] = {}
            for path, module in model.named_modules():
                self._children.append((path, module._modules))
                for name in module._modules:
                    self._modules.add(module._modules, name, f"{path}.{name}".lstrip("."))
                self._hooks += [getattr(module, hooks) for hooks in HOOKS]
                self._objects.add(module, "forward", f"{path}.forward".lstrip("."))
            for path, module in model.named_modules(remove_duplicate=False):
                self._tied(path, module, shared)
            self._read_values(model)
            targets = {target for target, _, _ in _tensors_of(self.program)}
            if any(f"{CONSTANTS}.{p.replace('.', '_')}" in targets for p in self._objects.paths):
                self._weights = list(shared.values())  # a tensor that a module keeps may have been made of them
        self._objects.follow((), self._left)
        self._keep()
        self._counts, self._sizes, self._versions = self._hooked(), self._sized(), self._versioned()

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Raises `CaptureError` where weights went, or where graph and model differ after another change."""
        others = self.weights()
        if others or not self._objects.same or (self._weights and self._versioned() != self._versions) or (
            self._hooked() != self._counts or not self._reads_same()
        ):  # fmt: skip
            self._compare(flat, others)

    def weights(self) -> dict[str, Any]:
        """Modules in the place of others, by path.

        Raises:
            CaptureError: These have weights, or weights of the graph went, were converted, or are no longer shared.
        """
        others: dict[str, Any] = {}
        if not self._modules.same or self._sized() != self._sizes:
            for path, now, before in self._replaced():
                if _weighted(now) or _weighted(before):
                    raise _changed(path, f"{_kind(now)} in the place of {_kind(before)}")
                others[path] = now
        if not self._used.same:
            raise _changed(*self._used.moved())
        for one, name, other, alias, path in self._ties:
            if one.get(name) is not other.get(alias):
                raise _changed(path, "a tensor of its own in the place of one that was shared")
        return others

    def _replaced(self) -> Iterator[tuple[str, Any, Any]]:
        """Path of a module, the present one, the one before."""
        yield from self._modules.moved()
        known = {(id(held), name) for held, name in zip(self._modules.dicts, self._modules.names, strict=True)}
        for path, entries in self._children:
            for name, module in entries.items():
                if (id(entries), name) not in known:
                    yield f"{path}.{name}".lstrip("."), module, None

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
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):  # deleted, or an array now
            return False

    def _keep(self, due: Collection[str] = ()) -> None:
        """Follows the present values at some paths, and leaves what varies alone."""
        followed = [values.follow(due, self._left) for values in self._values]
        self._reads_of([values for values in followed if values is not None])

    def _reads_of(self, values: list[Values]) -> None:
        self._values = values
        self._reads, self._seen = [(v.get, v.held) for v in values], [v.seen for v in values]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_reads", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reads_of(self._values)

    def _hooked(self) -> list[int]:
        return list(map(len, self._hooks))

    def _sized(self) -> list[int]:
        return [len(entries) for _, entries in self._children]

    def _versioned(self) -> list[tuple[int, int]]:
        """Which tensors the weights are, and how often each was written to."""
        found = (entries.get(name) for entries, name in self._weights)
        return [(id(t), 0 if t is None or t.is_inference() else t._version) for t in found]

    def _compare(self, flat: Sequence[Tensor], others: dict[str, Any]) -> None:
        """Refuses where graph and model differ; counts where they are equal on rows that could show it."""
        assert self.model is not None
        signature, model = self.program.signature, self.model
        if signature.batch_size(flat) == 0:
            return
        rows = few_rows(self.program, flat, MOST_ROWS)
        args, kwargs = signature.arguments(rows)
        moved = others | {path: now for path, now, _ in self._objects.moved()}
        for values in self._values:
            moved |= values.moved()
        moved |= {} if self._hooked() == self._counts else {HOOK: self._hooked()}
        moved |= {} if self._versioned() == self._versions else {TABLE: self._versioned()}
        where = ", ".join(list(moved)[:5])
        with torch.no_grad(), untouched(model), mode(model, False):
            got = list(self.program.source(*rows))
            got = got if self.program.capture.models else got[: len(signature.outputs)]  # a cascade's, of every model
            try:
                want = signature.flatten_output(model(*args, **kwargs))
            except Exception as error:  # the user's code may raise anything
                raise _changed(where, f"a model that fails: {type(error).__name__}: {_first_line(error)}") from error
        if len(got) != len(want):
            raise _changed(where, f"{len(want)} tensors in its output in the place of {len(got)}")
        worst = max(difference(a, b) for a, b in zip(got, want, strict=True))
        if worst > LOOSE:
            raise _changed(where, f"other attributes, and outputs that differ by {worst:.2g}")
        batched = [
            (t, leaf.batch_axis) for t, leaf in zip(rows, signature.inputs, strict=True) if leaf.batch_axis is not None
        ]
        if all(bool(t.isfinite().all()) for t in (*rows, *got)) and _rows_differ(batched):
            self._count(moved, others)

    def _count(self, moved: dict[str, Any], others: dict[str, Any]) -> None:
        """Follows what was equal often enough: a value that stays is the one to keep, one that varies is left alone."""
        due = set()
        for path, value in moved.items():
            times, last, varied = self._equal.get(path, (0, value, False))
            varied = varied or not _alike(value, last)
            self._equal[path] = (times + 1, _copied(value) if _plain(value) else value, varied)
            if times + 1 >= EQUAL:
                due.add(path)
                self._left |= {path} if varied else set()
        if others:
            if len(due) == len(moved):
                self._note(self.model)
            due -= others.keys()
        for path in due:
            self._equal.pop(path, None)
        self._objects.follow(due, self._left)
        for values in self._values:
            for n in values.names:
                path = values.path_of(n)
                if isinstance(values.owner, ModuleType) or path not in due - self._left or _plain(values.now(n)):
                    continue
                if n in vars(values.owner):
                    self._objects.add(values.owner, n, path)  # an array or object now, which must stay the same one
        self._keep(due)
        self._counts = self._hooked() if HOOK in due else self._counts
        self._versions = self._versioned() if TABLE in due else self._versions


class Used:
    """The parameters and buffers that a graph reads: they must be there, in the dtypes of capture.

    Args:
        tensors: Names in the graph, the entries that each stands in, and its name there.
    """

    def __init__(self, tensors: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        self.targets = [target for target, _, _ in tensors]
        self.entries, self.names = [held for _, held, _ in tensors], [name for _, _, name in tensors]
        self.dtypes = [held[name].dtype for _, held, name in tensors]

    @property
    def same(self) -> bool:
        try:
            return list(map(_DTYPE, map(dict.get, self.entries, self.names))) == self.dtypes
        except AttributeError:  # there is none
            return False

    def moved(self) -> tuple[str, str]:
        """The first one that is not as it was, and what it is now."""
        for target, held, name, dtype in zip(self.targets, self.entries, self.names, self.dtypes, strict=True):
            path, now = path_in_model(target).removeprefix(f"{ROOT}."), held.get(name)
            if now is None:
                return path, "no such parameter or buffer: it was removed, pruned or parametrized"
            if now.dtype != dtype:
                return path, f"{now.dtype} in the place of {dtype}: the dtype of capture is kept"
        raise AssertionError("every tensor is as it was")


_DTYPE = attrgetter("dtype")


def _tensors_of(program: Program) -> list[tuple[str, dict[str, Any], str]]:
    targets = dict.fromkeys(str(n.target) for n in program.source.graph.find_nodes(op="get_attr"))
    found = [(target, *entry(program.source, target)) for target in targets]
    return [(target, held, name) for target, held, name in found if held.get(name) is not None]


def _weighted(module: Any) -> bool:
    return module is not None and any(True for kind in (module.parameters(), module.buffers()) for _ in kind)


def _kind(module: Any) -> str:
    return "no module" if module is None else type(module).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _alike(a: Any, b: Any) -> bool:
    return bool(a == b) if _plain(a) and _plain(b) else a is b


def _rows_differ(batched: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether rows could show a change: two at least, and not all the same."""
    return any(t.shape[axis] > 1 and not torch.equal(t, t.narrow(axis, 0, 1).expand_as(t)) for t, axis in batched)


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
