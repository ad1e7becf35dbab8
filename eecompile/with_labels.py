"""Calls with `labels`, as training loops of transformers make them: the loss comes first in the output.

`transformers.Trainer` asks a model for three things: that its `forward` names the columns that it takes, that the
class names `labels`, and a loss in the output. So the compiled module stands where the user's model stood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.result import Trace
from eecompile.signature import VAR_KEYWORD, Signature
from eecompile.training.fit import objective_of

LABELS = "labels"


class NamedForward:
    """`forward` of a class whose instances show the arguments of the model that each was compiled from."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, fast: Any, owner: Any = None) -> Any:
        if fast is None:
            return self.function
        if torch.compiler.is_compiling():  # a trace needs no signature, and would follow this object into itself
            return partial(self.function, fast)
        return Named(self.function, fast)


class Named:
    """A bound `forward` with a signature of its own."""

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable[..., Any], fast: Any) -> None:
        self.__func__, self.__self__ = function, fast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(MethodType(self.__func__, self.__self__), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return named(self.__self__.program.signature)


def named(signature: Signature) -> inspect.Signature:
    """The arguments of the model's `forward`, and `labels`."""
    found = [
        inspect.Parameter(p.name, inspect._ParameterKind(p.kind), default=_default(p.kind)) for p in signature.parameters
    ]
    if all(p.name != LABELS for p in found):
        at = next((i for i, p in enumerate(found) if p.kind == VAR_KEYWORD), len(found))
        found.insert(at, inspect.Parameter(LABELS, inspect.Parameter.KEYWORD_ONLY, default=None))
    return inspect.Signature(found)


def _default(kind: int) -> Any:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return inspect.Parameter.empty if kind in several else None


def takes_labels(signature: Signature) -> bool:
    """Whether the model itself was captured with an argument of this name."""
    return any(leaf.path.split(".")[0].split("[")[0] == LABELS for leaf in signature.inputs)


def with_loss(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any) -> Any:
    """The output of a call, with the loss in front.

    In train mode the strategy's objective over all exits, differentiable; in eval mode the loss of the answers as given.

    Args:
        labels: As `fit` takes them.

    Returns:
        An output of the model's class with `loss` set, where it has such a field; a dict with `loss` in front; else a tuple
        `(loss, *output)`.
    """
    result = fast.run(*args, **kwargs)
    if fast.training:
        loss = fast.loss(result, labels)
    else:
        prediction = fast.prediction_of(result.output)
        with torch.set_grad_enabled(torch.is_grad_enabled() and prediction.requires_grad):
            loss = objective_of(fast).final(replace(result, trace=Trace(outputs=(prediction,))), labels)
    return _in_front(loss, result.output)


def _in_front(loss: Tensor, output: Any) -> Any:
    if isinstance(output, Mapping):
        try:
            return type(output)(**{"loss": loss, **{k: v for k, v in output.items() if k != "loss"}})
        except TypeError as error:
            raise EecompileError(
                "the model's output has no place for a loss",
                got=type(output).__name__,
                wanted="a field `loss`, a dict, a tuple or a tensor",
                hint="call without labels=, and fast.loss(fast.run(...), labels) for the loss",
            ) from error
    if isinstance(output, tuple | list):
        return (loss, *output)
    return (loss, output)
