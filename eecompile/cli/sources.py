"""Objects of the user's by name: `file.py:attr` and `package.module:attr`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from eecompile.errors import EecompileError, near


def is_attribute(spec: str) -> bool:
    """Whether the text has the form `file.py:attr` or `package.module:attr`."""
    left, colon, right = spec.rpartition(":")
    return bool(colon and left and right) and all(part.isidentifier() for part in right.split("."))


def attribute(spec: str, what: str) -> Any:
    """The object named by `spec`.

    Args:
        what: What it is for, for error messages: "a model", "a loader".

    Raises:
        EecompileError: No such file, module or attribute, or importing it fails.
    """
    left, _, right = spec.rpartition(":")
    if not is_attribute(spec):
        raise EecompileError(f"this does not name {what}", got=repr(spec), wanted="file.py:attr or package.module:attr")
    module = _file(Path(left), spec) if left.endswith(".py") or os.sep in left else _module(left, spec)
    found: Any = module
    for part in right.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise EecompileError(
                f"there is no {right!r} in {left}",
                where=spec,
                wanted=near(part, _own_names(found)),
            ) from error
    return found


def _own_names(found: Any) -> list[str]:
    """Public names of a module or object, without the modules, classes and functions that it has imported."""

    def imported(value: Any) -> bool:
        other = getattr(value, "__module__", None) != getattr(found, "__name__", None)
        return isinstance(value, ModuleType) or (isinstance(value, type | FunctionType) and other)

    names = [name for name in dir(found) if not name.startswith("_")]
    own = [name for name in names if not imported(getattr(found, name, None))] if isinstance(found, ModuleType) else []
    return own or names


def made(found: Any, spec: str, what: str) -> Any:
    """What a function or class gives when it is called without arguments.

    Raises:
        EecompileError: The call fails.
    """
    try:
        return found()
    except EecompileError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise EecompileError(
            f"calling this to get {what} failed",
            where=spec,
            got=_said(error),
            hint="it is called without arguments; give a function that needs none",
        ) from error


def _file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise EecompileError("there is no such file", where=str(path), got=spec)
    path = path.resolve()
    name = f"eecompile_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:  # as Python does for a script: its neighbours can be imported
        sys.path.insert(0, str(path.parent))
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise EecompileError("this file cannot be imported", where=str(path), wanted="a Python file")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise _failed(str(path), error) from error
    return module


def _module(name: str, spec: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:  # a console script has its own folder there, not the user's
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's code may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
            raise EecompileError(
                "there is no such module",
                where=spec,
                got=error.name,
                hint="for a file write its path with .py; for a data set, one of the built-in names",
            ) from error
        raise _failed(name, error) from error


def _failed(where: str, error: Exception) -> EecompileError:
    return EecompileError("importing this failed", where=where, got=_said(error), hint="--debug shows the traceback")


def _said(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    line = f"{type(error).__name__}: {first}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and trace.tb_frame.f_code.co_filename != __file__:
        line += f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    return line
