"""The user's model as it was: whatever tracing and trial runs change on its modules is put back.

`torch.export` replaces containers among the attributes by equal copies, and a model's own forward may set attributes
and install hooks at its first call. Both are undone, by identity: the same objects with the same contents. So are tensors
that the model's code keeps outside its modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.capture.adapter import mode
from eecompile.capture.caches import Caches


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Caches]:
    """Attributes, hooks, containers, buffers and caches of every submodule are the same afterwards, also after an error.

    A module that changes its own class meanwhile (a lazy layer that meets its first input) keeps what it became.

    Yields:
        What the model's code can keep tensors in.
    """
    modules = {m: type(m) for m in model.modules()}
    attributes = {m: dict(m.__dict__) for m in modules}
    contents: dict[int, tuple[Any, Any]] = {}
    for kept in attributes.values():
        for value in kept.values():
            _remember(value, contents)
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    caches = Caches(model)
    try:
        yield caches
    finally:
        caches.put_back()
        if all(type(m) is kind for m, kind in modules.items()):
            for module, kept in attributes.items():
                module.__dict__.clear()
                module.__dict__.update(kept)
            for container, content in contents.values():
                _refill(container, content)
        with torch.no_grad():
            for buffer, version, value in buffers:
                # batch norm moves its running statistics without a new version
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def trial(model: nn.Module, training: bool = False) -> Iterator[None]:
    """For calls of the user's model that leave nothing behind: in one mode, without gradients, `untouched`."""
    with torch.no_grad(), untouched(model), mode(model, training):
        yield


def _remember(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Notes what a container holds, and the containers within."""
    if not isinstance(value, dict | list | set) or id(value) in contents:
        return
    contents[id(value)] = (value, list(value.items()) if isinstance(value, dict) else list(value))
    for inner in value.values() if isinstance(value, dict) else value:
        if not isinstance(inner, Tensor | nn.Module):
            _remember(inner, contents)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    container.update(content)
