"""Order of keys: whether a model's code sees in which order named arguments, or entries of mappings, come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from eecompile.capture.check import LOOSE, difference
from eecompile.capture.untouched import trial
from eecompile.signature import Parameter


def order_matters(model: nn.Module, parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model answers otherwise, or fails, on the example with all keys the other way round."""
    named = {p.name for p in parameters}
    if len(kwargs.keys() - named) < 2 and not any(_has_order(a) for a in (*args, *kwargs.values())):
        return False
    turned_args, turned = [_turned(a) for a in args], _turned(dict(kwargs))
    with trial(model):
        usual = _tensors(model(*args, **kwargs))
        try:
            other = _tensors(model(*turned_args, **turned))
        except Exception:  # noqa: BLE001 (the user's code may raise anything)
            return True
    if [(t.shape, t.dtype) for t in usual] != [(t.shape, t.dtype) for t in other]:
        return True
    return any(difference(a, b) > LOOSE for a, b in zip(usual, other, strict=True))


def _has_order(value: Any) -> bool:
    if isinstance(value, Mapping):
        return len(value) > 1 or any(map(_has_order, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_order, value))


def _turned(value: Any) -> Any:
    """The same with the keys of all mappings the other way round."""
    if isinstance(value, Mapping):
        items = {key: _turned(value[key]) for key in reversed(list(value))}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:  # a class of the user's with a constructor of its own
            return value
    if type(value) in (list, tuple):
        return type(value)(map(_turned, value))
    return value


def _tensors(output: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
