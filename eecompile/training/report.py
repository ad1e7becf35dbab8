"""Reports: what an operation found, as a dict that JSON takes and as a table for people."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from io import StringIO
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


class Report(ABC):
    """Base of the reports of fit, evaluate and calibrate."""

    title: ClassVar[str] = ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as dicts, lists, strings, numbers, booleans and None; no NaN, no inf."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=110, force_terminal=False, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def json_safe(value: Any) -> Any:
    """`value` with non-finite floats as None, tuples as lists and keys as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """First column to the left, the others to the right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def stacked(*parts: RenderableType) -> RenderableType:
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))
