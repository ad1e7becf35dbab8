"""Values of a call that are not tensors, and which of them count as the same: of one type, and equal, however deep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

ATOMS = (bool, int, float, complex, str, bytes, type(None), range)
ATOMS_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)

BRACKETS: dict[type, tuple[str, str]] = {tuple: ("(", ")"), list: ("[", "]"), dict: ("{", "}")}


def spelling(value: Any) -> str | None:
    """A text that two values share where one can stand for the other; None for objects of which that is not known.

    `1`, `1.0` and `True` differ, since code can tell them apart; NaN is the same as NaN, `np.int64(3)` as `3`, and
    `torch.Size([2, 3])` as `(2, 3)`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if type(value) is int and value.bit_length() > 10_000:
        return hex(value)  # Python refuses decimals of more than 4300 digits
    if type(value) in (*ATOMS, *ATOMS_OF_TORCH):
        return repr(value)
    if type(value) is np.ndarray and value.dtype != object:
        return f"array({value.dtype}, {value.shape}, {value.tobytes()!r})"
    if isinstance(value, torch.Size):
        value = tuple(value)
    if isinstance(value, Mapping):
        entries = [(spelling(k), spelling(v)) for k, v in value.items()]
        return _joined(value, [None if None in e else f"{e[0]}: {e[1]}" for e in entries])
    if isinstance(value, list | tuple):
        return _joined(value, [spelling(v) for v in value])
    if isinstance(value, slice):
        return _joined(value, [spelling(v) for v in (value.start, value.stop, value.step)])
    if isinstance(value, set | frozenset):
        return _joined(value, sorted((spelling(v) for v in value), key=str))
    return None


def same(value: Any, other: Any) -> bool:
    """Whether one value can stand for the other; objects of one type by their own `==`."""
    if value is other:
        return True
    text = spelling(value)
    if text is not None:
        return text == spelling(other)
    try:
        return type(value) is type(other) and (value == other) is True
    except (TypeError, ValueError, RuntimeError):  # of tensors and arrays, `==` has no truth value
        return False


def to_json(value: Any) -> Any:
    """A number, string, boolean or None as JSON, which has no infinity and no NaN.

    Raises:
        TypeError: Another value, such as a member of an enumeration that is a string too.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) not in (bool, int, float, str, type(None)):
        raise TypeError(type(value).__name__)
    return {"float": repr(value)} if type(value) is float and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    return float(value["float"]) if isinstance(value, dict) else value


def _joined(value: Any, parts: list[str | None]) -> str | None:
    known = [p for p in parts if p is not None]
    kind = type(value)
    known_as = f"{kind.__module__}.{kind.__qualname__}{getattr(kind, '_fields', '')}"  # two named tuples may share a name
    left, right = BRACKETS.get(kind, (f"{known_as}{getattr(value, 'default_factory', '')}(", ")"))
    return f"{left}{', '.join(known)}{right}" if len(known) == len(parts) else None
