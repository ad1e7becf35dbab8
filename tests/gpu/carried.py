"""A pytest plugin that runs the interpreter's tests of the kernels on a GPU: `-p tests.gpu.carried`.

The tests in `tests/kernels/interpreted*.py` make their inputs on the CPU and compare with definitions in float64 there. With
this plugin a kernel's launch takes its arguments to the GPU, strides and aliases kept, runs there, and brings back what it
gave and what it wrote. So the same cases are tested, compiled for the card instead of interpreted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eecompile.kernels._triton import LAUNCHES

MODULES = ("clock", "confidence", "decide", "gather", "choose", "halt", "head_confidence", "open_rows")


def carried(launch: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`launch` on another device, for callers on the CPU."""

    @functools.wraps(launch)
    def call(*args: Any, **kwargs: Any) -> Any:
        there: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        results: list[tuple[Tensor, Tensor]] = []

        def taken(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(taken(v) for v in value)
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            key = storage.data_ptr() or id(storage)
            if key not in there:
                there[key] = storage, bytes_of(storage).to(device, copy=True).untyped_storage()
            return like(value, there[key][1])

        def back(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(back(v) for v in value)
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            for here, theirs in there.values():  # an argument that is given back
                if storage.data_ptr() == theirs.data_ptr() and storage.nbytes():
                    return like(value, here)
            results.append((value, value.cpu()))
            return results[-1][1]

        given = launch(*taken(args), **{name: taken(value) for name, value in kwargs.items()})
        for here, theirs in there.values():
            bytes_of(here).copy_(bytes_of(theirs))
        return back(given)

    return call


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def like(value: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """The same view on other memory."""
    made = torch.empty(0, dtype=value.dtype, device=storage.device)
    return made.set_(storage, value.storage_offset(), value.shape, value.stride())


def install(device: torch.device | str) -> dict[str, Callable[..., Any]]:
    """Replaces every launch of the kernels' modules; gives those that were there."""
    before = {}
    for name in MODULES:
        module = importlib.import_module(f"eecompile.kernels.{name}")
        for launch in [
            n for n in vars(module) if n.startswith("launch_") and getattr(module, n).__module__ == module.__name__
        ]:
            before[f"{name}.{launch}"] = getattr(module, launch)
            setattr(module, launch, carried(getattr(module, launch), device))
    return before


@contextlib.contextmanager
def launched(name: str) -> Iterator[None]:
    """Fails unless the kernel was launched meanwhile."""
    before = LAUNCHES[name]
    yield
    assert LAUNCHES[name] > before


def pytest_configure(config: Any) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("tests.gpu.carried needs a CUDA device")
    install("cuda")
    import tests.kernels.interpreting as shared

    shared.launched = launched
