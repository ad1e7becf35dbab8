"""Tensors that a model's own code keeps for its next call: in attributes, globals, closures and `functools.lru_cache`.

While `torch.export` traces, such a tensor is one of the tracer's own, and the next plain call of the model would use it. So
what was kept meanwhile is taken out again, wherever the code that `forward` can reach may have put it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_LIBRARY = frozenset({"torch", "numpy", "eecompile"}) | sys.stdlib_module_names
_ENTRIES = ("_parameters", "_buffers", "_modules")
_LruCache = type(functools.lru_cache(len))
_NAMED = (type, FunctionType, _LruCache)
_PLAIN = (type(None), Tensor, str, bytes, int, float, ModuleType, torch.dtype, torch.device)
_MISSING: Any = object()


class Caches:
    """What the places that a model's code can write to hold at one moment, to be put back later."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # by id; the values keep the ids from being reused
        self._entries: list[tuple[Any, frozenset[str] | None, dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._functions: list[tuple[Any, int]] = []  # with an lru_cache, and how often it was missed
        self._used = {"forward"}  # names in the code seen so far
        self._unused: dict[str, list[Any]] = {}  # attributes by names that no code has used yet
        todo: list[Any] = list(model.modules())
        while todo:
            value = todo.pop()
            if not isinstance(value, _PLAIN) and id(value) not in self._seen:
                self._seen[id(value)] = value
                todo += self._within(value)

    def put_back(self) -> bool:
        """Takes out every tensor that was kept since then; whether there was any."""
        found = False
        for container, names, before in self._entries:
            now = _content(container, names)
            for name in now.keys() | before.keys():
                if now.get(name, _MISSING) is not before.get(name, _MISSING) and _has_tensor(now.get(name)):
                    _set(container, name, before.get(name, _MISSING))
                    found = True
        for held, content in self._lists:
            old = {id(v) for v in content}
            if any(id(v) not in old and _has_tensor(v) for v in held):
                held[:] = content
                found = True
        for function, misses in self._functions:
            if function.cache_info().misses != misses:
                function.cache_clear()
                found = True
        return found

    def _keep(self, container: Any, names: frozenset[str] | None = None) -> dict[Any, Any]:
        content = _content(container, names)
        self._entries.append((container, names, content))
        return content

    def _within(self, value: Any) -> Iterator[Any]:
        """Notes what one object holds, and gives what can be reached from there."""
        if isinstance(value, dict | CellType):
            yield from self._keep(value).values()
        elif isinstance(value, list):
            self._lists.append((value, list(value)))
            yield from value
        elif isinstance(value, tuple | set | frozenset):
            yield from value
        elif (parts := _parts(value)) is not None:
            yield from parts
        elif isinstance(value, nn.Module) or not _library(value if isinstance(value, _NAMED) else type(value)):
            yield from self._own_code(value)

    def _own_code(self, value: Any) -> Iterator[Any]:
        if isinstance(value, _LruCache):
            self._functions.append((value, value.cache_info().misses))
            yield value.__wrapped__
        elif isinstance(value, FunctionType):
            yield from self._function(value)
        elif isinstance(value, type):
            yield from self._attributes(value)
            yield from value.__mro__
        else:
            yield type(value)
            try:
                entries = object.__getattribute__(value, "__dict__")
            except AttributeError:  # slots
                return
            yield from self._attributes(entries)

    def _attributes(self, owner: Any) -> Iterator[Any]:
        """Those that some code uses by name; the others when code turns up that does."""
        for name, value in self._keep(owner).items():
            if isinstance(value, _PLAIN) or name in _ENTRIES:
                continue
            if name in self._used or (name.startswith("__") and isinstance(value, FunctionType) and name != "__init__"):
                yield value
            else:
                self._unused.setdefault(name, []).append(value)

    def _function(self, function: FunctionType) -> Iterator[Any]:
        names = frozenset(_names(function.__code__))
        for name in names - self._used:
            self._used.add(name)
            yield from self._unused.pop(name, ())
        for value in self._keep(function.__globals__, names).values():
            if not isinstance(value, ModuleType):
                yield value
            elif not _library(value):
                yield from self._keep(vars(value), names).values()
        yield from function.__closure__ or ()
        yield from (function.__defaults__, function.__kwdefaults__, vars(function))


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What a wrapper of a function wraps."""
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    return None


def _library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return not isinstance(name, str) or (name != "__main__" and name.partition(".")[0] in _LIBRARY)


def _names(code: CodeType) -> Iterator[str]:
    """The globals that a function reads or writes, with those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _content(container: Any, names: frozenset[str] | None) -> dict[Any, Any]:
    if isinstance(container, CellType):
        try:
            return {"cell_contents": container.cell_contents}
        except ValueError:  # nothing is assigned yet
            return {}
    entries = vars(container) if isinstance(container, type) else container
    if names is not None:
        return {n: entries[n] for n in names if n in entries}
    return dict(dict.items(entries) if isinstance(entries, dict) else entries)  # what it holds, not what it would import


def _set(container: Any, name: Any, value: Any) -> None:
    if isinstance(container, type | CellType):
        delattr(container, name) if value is _MISSING else setattr(container, name, value)
    elif value is _MISSING:
        del container[name]
    else:
        container[name] = value


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
