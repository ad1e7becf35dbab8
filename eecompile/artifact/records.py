"""Records from the JSON data of a manifest, by the types of their fields."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def record(kind: type[T], data: dict[str, Any]) -> T:
    """What `dataclasses.asdict` made `data` of.

    Raises:
        KeyError: A field that the record does not have.
        TypeError: A field is missing.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in data.items()})


def records(kind: type[T], data: list[dict[str, Any]]) -> tuple[T, ...]:
    return tuple(record(kind, d) for d in data)


def _value(hint: Any, data: Any) -> Any:
    """A value of a field: JSON has lists for tuples and objects for records."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(data, dict):
        kind = next((k for k in kinds if is_dataclass(k)), None)
        return data if kind is None else record(kind, data)  # type: ignore[arg-type]
    if isinstance(data, list):
        inner = next((get_args(k) for k in kinds if get_origin(k) is tuple), (Any, ...))
        return tuple(_value(inner[0] if inner[-1] is ... else inner[i], d) for i, d in enumerate(data))
    return data
