"""Changes of the user's model that a captured graph cannot follow: replaced modules, and whatever else its Python reads.

New weights are seen by every graph (`capture/tensors.py`). An adapter that is merged into the weights, added or switched off
changes what the model's Python does, and the graph still does what it did when it was captured. So do attributes, those of a
class or a config, globals, hooks and weights that were one tensor: after a change of these, graph and model are compared.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter, is_
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.capture.check import LOOSE, difference
from eecompile.capture.tensors import CONSTANTS, ROOT, entry, path_in_model
from eecompile.capture.untouched import trial
from eecompile.errors import CaptureError
from eecompile.program import Program
from eecompile.runtime.precision import few_rows

PLAIN = (bool, int, float, str, type(None))
CONTAINERS = (list, tuple, dict, set, frozenset)
_GONE = object()
MOST_ITEMS = (64, 16, 8, 8)  # of a container that is looked at, of those in it, and so on
MOST_ROWS = 32  # of a call, to compare graph and model on
EQUAL = 3  # comparisons on different calls after which a change has no meaning
OWN = frozenset(nn.Module().__dict__) | {"_flat_weights", "_flat_weight_refs"}  # of recurrent modules: their parameters
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
STATES = ("the class of a module", "the order of modules", "a hook", "weights that a table was computed from")
NOT_RUN = ("__init__", "extra_repr", "__repr__", "reset_parameters")  # functions of torch's modules that no call runs


class Entries:
    """What code reads from owners by name, as it was.

    Args:
        by_value: Equal values are the same; otherwise objects are.
        by_attribute: They may come from a class or a Python module; otherwise they stand in dicts, or in the `__dict__` of
            an owner.
    """

    def __init__(self, by_value: bool = False, by_attribute: bool = False) -> None:
        self.by_value, self.by_attribute = by_value, by_attribute
        self.owners: list[Any] = []
        self.names: list[str] = []
        self.paths: list[str] = []
        self.seen: list[Any] = []
        self.namespaces: list[Any] = []

    def add(self, owner: Any, name: str, path: str, *seen: Any) -> None:
        namespace = owner if self.by_attribute or isinstance(owner, dict) else vars(owner)
        value = seen[0] if seen else self._now(namespace, name)
        for items, item in ((self.owners, owner), (self.names, name), (self.paths, path), (self.namespaces, namespace)):
            items.append(item)
        self.seen.append(_copied(value) if self.by_value else value)

    def _rows(self) -> Iterator[tuple[Any, str, str, Any, Any]]:
        return zip(self.owners, self.names, self.paths, self.seen, self.namespaces, strict=True)

    def _now(self, namespace: Any, name: str) -> Any:
        return getattr(namespace, name, None) if self.by_attribute else namespace.get(name)

    @property
    def same(self) -> bool:
        now = map(getattr if self.by_attribute else dict.get, self.namespaces, self.names)
        try:
            return list(now) == self.seen if self.by_value else all(map(is_, now, self.seen))
        except (AttributeError, TypeError, ValueError, RuntimeError):  # deleted, or an array now
            return False

    def moved(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, present value and the one before."""
        for _, name, path, before, namespace in self._rows():
            now = self._now(namespace, name)
            if not (_alike(now, before) if self.by_value else now is before):
                yield path, now, before

    def follow(self, paths: Collection[str], left: Collection[str]) -> list[tuple[Any, str, str]]:
        """The present values at some paths are the ones to keep; those at others are not looked at again.

        Returns:
            Owner, name and path of values that cannot be compared any more.
        """
        rows, self.__dict__ = list(self._rows()), Entries(self.by_value, self.by_attribute).__dict__
        odd = []
        for owner, name, path, seen, namespace in rows:
            now = self._now(namespace, name) if path in paths else seen
            if path not in left and self.by_value and not _comparable(now):
                odd.append((owner, name, path))
            elif path not in left:
                self.add(owner, name, path, now)
        return odd

    def __deepcopy__(self, memo: dict[int, Any]) -> Entries:
        """The same of copied owners; what has changed here has changed there."""
        new = Entries(self.by_value, self.by_attribute)
        for owner, name, path, seen, namespace in self._rows():
            now = self._now(namespace, name)
            kept = not _alike(now, seen) if self.by_value else now is not seen
            copied = owner if isinstance(owner, ModuleType) else copy.deepcopy(owner, memo)
            new.add(copied, name, path, *([seen] if kept else []))
        return new


class ModelWatch:
    """Refuses calls once the model is another one than was captured.

    Args:
        program: A captured program.
        model: What was captured: the user's model, or all models of a cascade; None where there is none any more.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self._left: set[str] = set()  # paths of what varies without a meaning
        self._row: list[Tensor] | None = None  # of the last call of one row that was compared
        self._note(None if program.capture.front_end != "export" else model)

    def _note(self, model: nn.Module | None) -> None:
        """The present state is what calls are compared with."""
        self._modules, self._objects, self._plain = Entries(), Entries(), Entries(by_value=True)
        self._attributes = Entries(by_value=True, by_attribute=True)
        self._children: list[tuple[str, dict[str, Any]]] = []
        self._all: list[nn.Module] = [] if model is None else list(model.modules())
        self._ordered = [module._modules for module in self._all if len(module._modules) > 1]
        self._hooks = [getattr(module, hooks) for module in self._all for hooks in HOOKS]
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
            for path, module in model.named_modules(remove_duplicate=False):
                self._tied(path, module, shared)
            self._read(model)
            targets = {target for target, _, _ in _tensors_of(self.program)}
            if any(f"{CONSTANTS}.{p.replace('.', '_')}" in targets for p in self._objects.paths):
                self._weights = list(shared.values())  # a tensor that a module keeps may have been made of them
        for entries in self._entries:
            entries.follow((), self._left)
        self._entries_of = [entries for _, entries in self._children]
        self._sized, self._state = self._sizes(), self._states()

    @property
    def _entries(self) -> tuple[Entries, ...]:
        return self._objects, self._plain, self._attributes

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Raises `CaptureError` where weights went, or where graph and model differ after another change."""
        others = self.weights()
        same = self._objects.same and self._plain.same and self._attributes.same
        if others or not same or self._states() != self._state:
            self._compare(flat, others)

    def weights(self) -> dict[str, Any]:
        """Modules in the place of others, by path.

        Raises:
            CaptureError: These have weights, or weights of the graph went, were converted, or are no longer shared.
        """
        others: dict[str, Any] = {}
        if not self._modules.same or self._sizes() != self._sized:
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
        known = set(zip(map(id, self._modules.namespaces), self._modules.names, strict=True))
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

    def _read(self, model: nn.Module) -> None:
        """What is in the modules and in objects that they hold, functions and attributes of their classes, and globals that
        their code names.
        """
        functions = {kind: _functions(kind) for kind in map(type, self._all)}
        for kind, of_kind in functions.items():
            for n in of_kind:
                self._attributes.add(kind, n, f"{kind.__qualname__}.{n}")
        objects: dict[int, tuple[str, Any]] = {}
        for path, module in model.named_modules():
            for n in functions[type(module)]:
                if n == "forward" or not (n.startswith("__") or n in module.__dict__):
                    self._objects.add(module, n, f"{path}.{n}".lstrip("."))
            mine = {n for n in module.__dict__ if n not in OWN and n not in functions[type(module)]}
            self._look_at(path, module, sorted(mine & _read_by(type(module)) if _of_torch(type(module)) else mine))
            for n in sorted(mine):
                v, at = module.__dict__[n], f"{path}.{n}".lstrip(".")
                if isinstance(v, Tensor) and not v.is_inference():
                    self._attributes.add(v, "_version", at)  # it may be changed in place
                if _records(v):
                    objects.setdefault(id(v), (at, v))
        for path, owner in objects.values():
            self._look_at(path, owner, list(getattr(owner, "__dict__", ())))
            for n in _slots(owner):
                if _comparable(getattr(owner, n, _GONE)):
                    self._attributes.add(owner, n, f"{path}.{n}")
        self._read_code(model)

    def _read_code(self, model: nn.Module) -> None:
        """Attributes of classes and globals that the code of the modules names."""
        globals_: dict[str, set[str]] = {}
        for path, module in model.named_modules():
            of_class: set[str] = set()
            for kind in type(module).__mro__:
                for v in () if _of_torch(kind) else map(_function, vars(kind).values()):
                    if isinstance(v, FunctionType):
                        names = _names(v.__code__)
                        there = {n for n in names if not n.startswith("__") and _fixed(v.__globals__.get(n, _GONE))}
                        globals_.setdefault(v.__globals__.get("__name__", ""), set()).update(there)
                        of_class.update(n for n in names if n not in module.__dict__)
            for n in sorted(of_class):
                if _of_class(module, n):
                    self._attributes.add(module, n, f"{path}.{n}".lstrip("."))
        for name, names in globals_.items():
            owner = sys.modules.get(name)
            for n in (n for n in sorted(names) if hasattr(owner, n)):
                self._attributes.add(owner, n, f"{name}.{n}")

    def _look_at(self, path: str, owner: Any, names: Sequence[str]) -> None:
        for n in names:
            entries = self._plain if _comparable(vars(owner)[n]) else self._objects
            entries.add(owner, n, f"{path}.{n}".lstrip("."))

    def _sizes(self) -> list[int]:
        return list(map(len, self._entries_of))

    def _states(self) -> tuple[list[Any], ...]:
        """Classes of all modules, the names of their modules in order, their hooks, and the versions of the tensors that a
        table was computed from.
        """
        return (
            list(map(type, self._all)),
            list(map(tuple, self._ordered)),
            [(*hooks,) for hooks in filter(None, self._hooks)],  # ids, of which no two are the same
            list(map(_version, self._weights)),
        )

    def _compare(self, flat: Sequence[Tensor], others: dict[str, Any]) -> None:
        """Refuses where graph and model differ; counts where they are equal on rows that could show it."""
        assert self.model is not None
        signature, model = self.program.signature, self.model
        if signature.batch_size(flat) == 0:
            return
        rows = few_rows(self.program, flat, MOST_ROWS)
        args, kwargs = signature.arguments(rows)
        moved = others | {path: now for entries in self._entries for path, now, _ in entries.moved()}
        states = dict(zip(STATES, self._states(), strict=True))
        moved |= {name: state for name, state in states.items() if state != self._state[STATES.index(name)]}
        where = ", ".join(list(moved)[:5])
        with trial(model):
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
        if all(bool(t.isfinite().all()) for t in (*rows, *got)) and (_rows_differ(batched) or self._other_row(rows)):
            self._count(moved, others)

    def _other_row(self, rows: Sequence[Tensor]) -> bool:
        """Whether a call of a single row has another one than the call that was compared before."""
        if self.program.signature.batch_size(rows) != 1:
            return False
        before, self._row = self._row, [t.clone() for t in rows]
        return before is not None and not all(map(torch.equal, before, self._row))

    def _count(self, moved: dict[str, Any], others: dict[str, Any]) -> None:
        """Follows what was equal often enough: a value that stays is the one to keep, one that varies is left alone."""
        due = set()
        for path, value in moved.items():
            times, last, varied = self._equal.get(path, (0, value, False))
            varied = varied or not _alike(value, last)
            self._equal[path] = (times + 1, _copied(value), varied)
            if times + 1 >= EQUAL:
                due.add(path)
                self._left |= {path} if varied else set()
        if others:
            if len(due) == len(moved):
                self._note(self.model)
            due -= others.keys()
        for path in due:
            self._equal.pop(path, None)
        odd = [entry for entries in self._entries for entry in entries.follow(due, self._left)]
        for owner, name, path in odd:
            if not isinstance(owner, ModuleType | type) and name in getattr(owner, "__dict__", ()):
                self._objects.add(owner, name, path)  # an array or object now, which must stay the same one
        now = zip(STATES, self._states(), self._state, strict=True)
        self._state = tuple(state if name in due else before for name, state, before in now)


class Used:
    """The parameters and buffers that a graph reads: they must be there, in the dtypes of capture.

    Args:
        tensors: Names in the graph, the entries that each stands in, and its name there.
    """

    def __init__(self, tensors: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        self.targets = [target for target, _, _ in tensors]
        self.entries, self.names = [entries for _, entries, _ in tensors], [name for _, _, name in tensors]
        self.dtypes = [entries[name].dtype for _, entries, name in tensors]

    @property
    def same(self) -> bool:
        try:
            return list(map(_DTYPE, map(dict.get, self.entries, self.names))) == self.dtypes
        except AttributeError:  # there is none
            return False

    def moved(self) -> tuple[str, str]:
        """The first one that is not as it was, and what it is now."""
        for target, entries, name, dtype in zip(self.targets, self.entries, self.names, self.dtypes, strict=True):
            path, now = path_in_model(target).removeprefix(f"{ROOT}."), entries.get(name)
            if now is None:
                return path, "no such parameter or buffer: it was removed, pruned or parametrized"
            if now.dtype != dtype:
                return path, f"{now.dtype} in the place of {dtype}: the dtype of capture is kept"
        raise AssertionError("every tensor is as it was")


_DTYPE = attrgetter("dtype")


def _tensors_of(program: Program) -> list[tuple[str, dict[str, Any], str]]:
    targets = dict.fromkeys(str(n.target) for n in program.source.graph.find_nodes(op="get_attr"))
    found = [(target, *entry(program.source, target)) for target in targets]
    return [(target, entries, name) for target, entries, name in found if entries.get(name) is not None]


def _weighted(module: Any) -> bool:
    return module is not None and any(True for kind in (module.parameters(), module.buffers()) for _ in kind)


def _kind(module: Any) -> str:
    return "no module" if module is None else type(module).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _alike(a: Any, b: Any) -> bool:
    try:
        return a is b or (_comparable(a) and _comparable(b) and bool(a == b))
    except (TypeError, ValueError, RuntimeError):  # tensors or arrays in a container, and not the same ones
        return False


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


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is compared as such: a number, a text, None, or a small container, whose other items stay the same."""
    if isinstance(value, dict) and type(value).__getitem__ is not dict.__getitem__:  # it may make what it gives
        return False
    few = depth < len(MOST_ITEMS) and isinstance(value, CONTAINERS) and len(value) <= MOST_ITEMS[depth]
    return few or isinstance(value, PLAIN)


def _comparable(value: Any) -> bool:
    return _plain(value) or isinstance(value, FunctionType | MethodType | property)


def _fixed(value: Any) -> bool:
    """Whether a global is compared: what holds classes or other objects is a registry, which grows with what is imported."""
    if isinstance(value, CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
        return _plain(value) and all(isinstance(v, FunctionType | BuiltinFunctionType) or _fixed(v) for v in items)
    return _comparable(value)


def _of_torch(kind: type) -> bool:
    return kind is object or kind.__module__.startswith("torch.")


def _function(value: Any) -> Any:
    """What a property, a class method, a static method or a function with a decorator runs."""
    return inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))


def _names(code: CodeType) -> set[str]:
    """Names that code reads, in what is written within it too."""
    return {*code.co_names, *(n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c))}


def _functions(kind: type) -> list[str]:
    """Names of functions and properties that a call of a module of some class may run: all that stand in a class with a
    `forward`, and of the classes without one (mixins, bases) what these name.
    """
    if _of_torch(kind):
        return ["forward"]
    own = [vars(k) for k in kind.__mro__ if not _of_torch(k)]
    names = {n: None for of_kind in own if "forward" in of_kind for n, v in of_kind.items() if _runs(v)}
    names["forward"] = None
    due = list(names)
    while due:
        found = (_function(of_kind[n]) for n in [due.pop()] for of_kind in own if n in of_kind)
        named = {n for f in found if isinstance(f, FunctionType) for n in _names(f.__code__)}
        new = [n for n in sorted(named - names.keys()) if any(n in of_kind and _runs(of_kind[n]) for of_kind in own)]
        names |= dict.fromkeys(new)
        due += new
    return list(names)


def _runs(value: Any) -> bool:
    return isinstance(value, FunctionType | property | classmethod | staticmethod)


def _read_by(kind: type) -> set[str]:
    """Names that a call of a module of torch reads: not those that are for `repr` alone."""
    kinds = [k for k in reversed(kind.__mro__) if k is not nn.Module]  # the function of a derived class counts
    functions = {n: v for k in kinds for n, v in vars(k).items() if isinstance(v, FunctionType)}
    return {n for name, f in functions.items() if name not in NOT_RUN for n in _names(f.__code__)}


def _version(weight: tuple[dict[str, Any], str]) -> tuple[int, int]:
    """Which tensor a weight is, and how often it was written to."""
    t = weight[0].get(weight[1])
    return id(t), 0 if t is None or t.is_inference() else t._version


def _of_class(module: nn.Module, name: str) -> bool:
    """Whether a name is a plain attribute of a module's class, which an attribute of the module may hide later."""
    found = getattr(type(module), name, _GONE)
    return not hasattr(nn.Module, name) and not name.startswith("__") and _plain(found)


def _records(value: Any) -> bool:
    """Whether a value is an object with attributes of its own, such as a config."""
    if isinstance(value, nn.Module | Tensor | type | FunctionType | ModuleType) or callable(value):
        return False
    return not type(value).__module__.startswith("torch.") and bool(
        isinstance(getattr(value, "__dict__", None), dict) or _slots(value)
    )


def _slots(value: Any) -> list[str]:
    """Names of attributes that have no `__dict__` to stand in, as a dataclass with `slots=True` has them."""
    kinds = (k for k in type(value).__mro__ if isinstance(vars(k).get("__slots__"), tuple | list))
    return [n for k in kinds for n in vars(k)["__slots__"] if not n.startswith("__")]


def _copied(value: Any, depth: int = 0) -> Any:
    """A container with its containers, to compare with later; everything else is itself."""
    if not _plain(value, depth) or isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return {k: _copied(v, depth + 1) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return set(value)
    return (tuple if isinstance(value, tuple) else list)(_copied(v, depth + 1) for v in value)
