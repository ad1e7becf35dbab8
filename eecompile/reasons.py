"""Why a call was stopped: a word, or one that holds unless every row turned out to be final, which the device knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Unless:
    """`reason`, unless every row was final all the same.

    Attributes:
        final: [B] bool, on any device.
    """

    reason: str
    final: Tensor


class Reason:
    """An attribute of a result. The device is asked when it is first read, so that a call waits for nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, obj: Any, owner: type | None = None) -> str | None:
        if obj is None:  # what a dataclass takes as the default
            return None
        found: str | Unless | None = obj.__dict__[self.name]
        if isinstance(found, Unless):
            found = None if bool(found.final.all()) else found.reason
            obj.__dict__[self.name] = found
        return found

    def __set__(self, obj: Any, value: str | Unless | None) -> None:
        obj.__dict__[self.name] = value
