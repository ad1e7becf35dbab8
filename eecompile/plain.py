"""Numbers as options take them: those of NumPy and torch become Python's where a user hands them in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from eecompile.errors import EecompileError


def plain(value: Any) -> Any:
    """A number or array of numbers as Python's, also as the elements of a list, tuple or dict; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple) and any(map(_is_number, value)):
        return type(value)(map(_one, value))
    if isinstance(value, Mapping) and any(map(_is_number, value.values())):
        return {k: _one(v) for k, v in value.items()}
    return _one(value)


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
    valid = not isinstance(value, bool) and isinstance(value, int if whole else int | float) and not math.isnan(value)
    if not valid:
        raise error(f"{name} is not a {'whole ' if whole else ''}number", got=repr(value), wanted=wanted)
    fits = (above is None or value > above) and (least is None or value >= least)
    fits = fits and (below is None or value < below) and (most is None or value <= most)
    if not fits or (below is None and most is None and math.isinf(value)):
        raise error(f"{name} is out of range", got=value, wanted=wanted)


def _is_number(value: Any) -> bool:
    return isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _one(value: Any) -> Any:
    return value.item() if _is_number(value) else value
