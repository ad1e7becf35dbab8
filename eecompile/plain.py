"""Numbers as options take them: those of NumPy and torch become Python's where a user hands them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """A number or array of numbers as Python's, also as the elements of a list, tuple or dict; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple) and any(map(_is_number, value)):
        return type(value)(map(_one, value))
    if isinstance(value, Mapping) and any(map(_is_number, value.values())):
        return {k: _one(v) for k, v in value.items()}
    return _one(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _one(value: Any) -> Any:
    return value.item() if _is_number(value) else value
