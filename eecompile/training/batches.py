"""Batches from whatever a loader yields: `(inputs, labels)`, or a Hugging Face batch with `labels` in it.

A loader is anything that can be iterated again and again: a `DataLoader`, a list of pairs, an object with
`__iter__`. Inputs are a tensor, a tuple (or list) of positional arguments, or a dict of keyword arguments; arrays of
NumPy become tensors of their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from eecompile.errors import EecompileError

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

WANTED = "(inputs, labels) with inputs a tensor, a tuple or a dict of keyword arguments; or a dict with 'labels'"


@dataclass(frozen=True)
class Batch:
    """One call of the model, and what it should have said.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        labels: What the loader gave as labels, moved to the device; None where it gives none.
        index: Position in the loader, from 0.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    index: int

    @property
    def where(self) -> str:
        return f"batch {self.index} of the loader"


def batches(loader: Iterable[Any], device: torch.device | None = None) -> Iterator[Batch]:
    """The batches of one pass over `loader`, on `device` (None: where they are).

    Raises:
        EecompileError: An item is not of a known form, or the loader is not iterable.
    """
    for index, item in enumerate(iterate(loader)):
        yield split(item, index, device)


def alike(stream: Iterable[Batch], error: type[EecompileError] = EecompileError) -> Iterator[Batch]:
    """The batches as they are.

    Raises:
        EecompileError: Some have labels and others do not.
    """
    first = None
    for batch in stream:
        has = batch.labels is not None
        first = has if first is None else first
        if has != first:
            raise error(
                "some batches have labels and others do not",
                where=batch.where,
                got="labels" if has else "no labels",
                wanted="labels in all of them or in none",
            )
        yield batch


def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """`iter(loader)` with an error of this package where that is impossible."""
    try:
        return iter(loader)
    except TypeError as error:
        raise EecompileError(
            "the loader cannot be iterated", got=type(loader).__name__, wanted=f"an iterable of {WANTED}"
        ) from error


def split(item: Any, index: int, device: torch.device | None = None) -> Batch:
    """One item of a loader as a `Batch`."""
    labels: Any = None
    if isinstance(item, Mapping):
        inputs: Any = {str(key): value for key, value in item.items() if key != "labels"}
        labels = item.get("labels")
    elif isinstance(item, torch.Tensor | np.ndarray):
        inputs = item
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, labels = item
    else:
        length = f" of length {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise EecompileError(
            "the loader yields something that is not a batch",
            where=f"batch {index} of the loader",
            got=f"{type(item).__name__}{length}",
            wanted=WANTED,
            hint="wrap several inputs in a tuple: ((a, b), labels)" if length else None,
        )
    inputs = move(inputs, device)
    _check_rows(inputs, index)
    labels = move(_tensor(labels), device)
    if isinstance(inputs, Mapping):
        return Batch((), {str(key): value for key, value in inputs.items()}, labels, index)
    if isinstance(inputs, (tuple, list)):
        return Batch(tuple(inputs), {}, labels, index)
    return Batch((inputs,), {}, labels, index)


def _check_rows(inputs: Any, index: int) -> None:
    first = next((t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim and not t.is_nested), None)
    if first is not None and len(first) == 0:
        raise EecompileError(
            "the loader yields a batch without rows",
            where=f"batch {index} of the loader",
            got=list(first.shape),
            wanted="one row or more",
            hint="leave such batches out",
        )


def _tensor(value: Any) -> Any:
    """An array of NumPy (or pandas) as a tensor; others as they are."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__array__"):
        return value
    array = value.__array__()
    try:
        usual = array.flags.writeable and not any(step < 0 for step in array.strides)
        return torch.as_tensor(array if usual else array.copy())
    except (TypeError, ValueError):  # strings and objects; the byte order of another machine
        return value


def move(value: Any, device: torch.device | None) -> Any:
    """`value` with every tensor in it on `device`, arrays of NumPy too; containers are rebuilt, other values kept."""
    if isinstance(value, np.ndarray):
        value = _tensor(value)
    if isinstance(value, torch.Tensor):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device) for item in value)
    return value


def require_repeatable(loader: Iterable[Any], reason: str, name: str = "the loader") -> None:
    """Refuses a generator or other one-shot iterator where a second pass over the data is needed."""
    if iter(iterate(loader)) is loader:
        raise EecompileError(
            f"{name} can be read only once, but {reason}",
            got=type(loader).__name__,
            wanted="something that can be iterated again and again, such as a DataLoader or a list",
            hint="pass list(loader), or a class whose __iter__ starts from the beginning",
        )


def length_of(loader: Iterable[Any]) -> int | None:
    """Number of batches where the loader knows it."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def device_of(fast: CompiledModule) -> torch.device:
    """Where the compiled module lives: the device of its thresholds."""
    return fast.thresholds.device


def no_labels(name: str = "the loader") -> EecompileError:
    return EecompileError(
        f"no row of {name} has a label",
        got="-100 for every row",
        wanted="rows with labels",
        hint="check how labels are made",
    )


def empty_loader(name: str = "the loader") -> EecompileError:
    return EecompileError(
        f"{name} is empty",
        got="no batch",
        wanted="at least one batch of (inputs, labels)",
        hint="check the data set's size and `drop_last`; a generator that was already used up yields nothing",
    )
