"""Arguments that users give, checked in one place: names, numbers, switches, functions and paths.

Numbers of NumPy and torch become Python's where a user hands them in.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eecompile.errors import EecompileError, near, shown

LARGEST = 2**63 - 1
"""Of whole numbers, as tensors and generators take them."""


def plain(value: Any, name: str = "this number") -> Any:
    """A number or array of numbers as Python's, also as the elements of a list, tuple or dict; anything else as it is.

    Args:
        name: Of the option, for errors.

    Raises:
        EecompileError: A whole number that does not fit into 64 bits.
    """
    if isinstance(value, np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple):
        found = type(value)(_one(v, name) for v in value)
        return found if any(map(_is_number, value)) else value
    if isinstance(value, Mapping):
        named = {k: _one(v, name) for k, v in value.items()}
        return named if any(map(_is_number, value.values())) else value
    return _one(value, name)


def arguments(
    verb: str, takes: Callable[..., Any], given: Mapping[str, Any], error: type[EecompileError] = EecompileError
) -> dict[str, Any]:
    """Keyword arguments that a user gave, with plain numbers, and with their names and switches checked.

    Args:
        verb: What they are for.
        takes: A function or dataclass with these arguments; further names pass where it takes `**options`.
        error: The class to raise.

    Raises:
        EecompileError: An unknown name, or a switch that is no bool.
    """
    parameters = inspect.signature(takes).parameters
    valid = [name for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY or inspect.isclass(takes)]
    for name in given:
        if name not in valid and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise error(f"{verb} has no such option", got=f"{name}=", wanted=near(name, valid))
    found = {name: plain(value, name) for name, value in given.items()}
    check_switches(takes, found, error)
    return found


def check_switches(
    takes: Callable[..., Any], given: Mapping[str, Any], error: type[EecompileError] = EecompileError
) -> None:
    """Checks what is annotated as a bool: text such as "no" counts as true in Python.

    Raises:
        EecompileError: It is neither True nor False, nor None where that may be.
    """
    for name, parameter in inspect.signature(takes).parameters.items():
        if name in given and parameter.annotation in SWITCHES:
            valid = SWITCHES[parameter.annotation]
            if not any(given[name] is value for value in valid):
                raise error(f"{name}= is a switch", got=shown(given[name]), wanted=" or ".join(map(str, valid)))


SWITCHES = {"bool": (True, False), "bool | None": (True, False, None)}


CALL = re.compile(r"\(([^()]*)\) ->")
"""Arguments in a description of how a function is called."""


def check_kind(
    name: str, value: Any, kinds: type | tuple[type, ...], wanted: str, error: type[EecompileError] = EecompileError
) -> None:
    """Checks that what a user gave is of one of these types."""
    if not isinstance(value, kinds):
        raise error(f"{name} is of another type", got=shown(value)[:80], wanted=wanted)


def check_callable(name: str, value: Any, wanted: str, error: type[EecompileError] = EecompileError) -> None:
    """Checks a function that a user gave; None is none given.

    Args:
        wanted: How it is called, such as "(prediction, labels) -> [B]": it must take so many arguments.
    """
    if value is None:
        return
    if not callable(value):
        raise error(f"{name}= is a function", got=shown(value)[:80], wanted=wanted)
    taken = CALL.search(wanted)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of functions written in C nothing is known
        return
    try:
        signature.bind(*([None] * len([name for name in taken[1].split(",") if name])) if taken else ())
    except TypeError as problem:
        raise error(f"{name}= takes other arguments", got=f"{signature}: {problem}"[:120], wanted=wanted) from problem


def as_path(name: str, value: Any, error: type[EecompileError] = EecompileError) -> Path:
    """A path that a user gave, checked."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise error(f"{name}= is a path", got=shown(value)[:80], wanted="a str or pathlib.Path")
    return Path(text)


def check_numbers(name: str, values: Any, **bounds: Any) -> None:
    """Checks a list of numbers that a user gave, each as `check_number` does."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise bounds.get("error", EecompileError)(f"{name} are numbers", got=shown(values)[:80], wanted="a list of numbers")
    for value in values:
        check_number(f"one of {name}", value, **bounds)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
    error: type[EecompileError] = EecompileError,
) -> None:
    """Checks a number that a user gave, an int, or a float that is no NaN; bools and text are none.

    Args:
        above, least, below, most: Bounds, the first and third exclusive; without `below` and `most` it must be finite.
        whole: Whether it must be an int.
        error: The class to raise.

    Raises:
        EecompileError: It is none, or out of its bounds; the message names both.
    """
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    asked = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    wanted = f"a {'whole ' if whole else ''}number {' and '.join(asked)}".rstrip()
    valid = not isinstance(value, bool) and isinstance(value, int if whole else int | float) and value == value
    if not valid:
        raise error(f"{name} is not a {'whole ' if whole else ''}number", got=shown(value), wanted=wanted)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise error(f"{name} is out of range", got=_size(value), wanted=f"{wanted}, in 64 bits")
    fits = (above is None or value > above) and (least is None or value >= least)
    fits = fits and (below is None or value < below) and (most is None or value <= most)
    if not fits or (below is None and most is None and math.isinf(value)):
        raise error(f"{name} is out of range", got=value, wanted=wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _one(value: Any, name: str) -> Any:
    found = value.item() if _is_number(value) else value
    if type(found) is int and abs(found) > LARGEST:
        raise EecompileError(f"{name} is out of range", got=_size(found), wanted="a whole number in 64 bits")
    return found


def _size(value: int) -> str:
    return f"a whole number of {value.bit_length()} bits"
