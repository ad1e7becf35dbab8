"""Several models in one module: which inputs each takes, what prepares them, and the module that runs them in turn."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eecompile.errors import CaptureError, StrategyError, near
from eecompile.signature import (
    POSITIONAL,
    POSITIONAL_ONLY,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Parameter,
    arguments_by_name,
    parameters_of,
)

Prepare = Callable[..., Any]
Inputs = Sequence[str] | Mapping[str, str]


class Member(nn.Module):
    """One model of a cascade, called with the inputs of all of them.

    Args:
        model: As the user gave it; shared, not copied.
        prepare: Makes the model's arguments (a tensor, a tuple, or a dict of keyword arguments) from the inputs.
        parameters: What a call of the cascade names.
        positional: Inputs that are passed on by position.
        inputs: The only inputs that it takes: names, or `{argument: name}`. None: those that its `forward`, or that of
            its preparation, names.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Prepare | None,
        parameters: tuple[Parameter, ...],
        positional: tuple[str, ...],
        inputs: Inputs | None,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.prepare = prepare
        self.takes = parameters_of(target(model, prepare))
        self.names, self.positional, self.inputs = parameters, positional, inputs
        self.forward = _named(self._forward, parameters)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        found, named = self.arguments(arguments_by_name(self.names, args, kwargs))
        if self.prepare is None:
            return self.model(*found, **named)
        return self.after(self.prepare(*found, **named))

    def after(self, prepared: Any) -> Any:
        """The model on what its preparation gave."""
        if isinstance(prepared, Mapping):
            return self.model(**prepared)
        return self.model(*prepared) if isinstance(prepared, tuple | list) else self.model(prepared)

    def arguments(self, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Which of the cascade's inputs this model takes, and how."""
        if isinstance(self.inputs, Mapping):
            return [], {own: given[name] for own, name in self.inputs.items() if name in given}
        if self.inputs is not None:
            return [], {name: given[name] for name in self.inputs if name in given}
        known = {p.name for p in self.takes}
        if any(p.kind == VAR_KEYWORD for p in self.takes):
            known |= set(given)
        named = {k: v for k, v in given.items() if k in known and k not in self.positional}
        return [given.get(n) for n in self.positional], named

    @property
    def alone(self) -> nn.Module:
        """The user's model where a call of the cascade is a call of it, else this module."""
        named = {p.name for p in self.takes}
        plain = self.prepare is None and self.inputs is None and {p.name for p in self.names} <= named
        return self.model if plain else self


class Composite(nn.Module):
    """The models of a cascade, one after the other.

    Gives `(output of the last, prediction of the first, ..., prediction of the last but one)`.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        super().__init__()
        for name, member in members.items():
            self.add_module(name, member)
        self.order = tuple(members)
        self.leaf = dict.fromkeys(members, 0)  # which output leaf of each is its prediction
        self.training = next(iter(members.values())).training
        self.forward = _named(self._forward, next(iter(members.values())).names)

    @property
    def last(self) -> Member:
        return self.member(self.order[-1])

    def member(self, name: str) -> Member:
        found = self.get_submodule(name)
        assert isinstance(found, Member)
        return found

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        predictions = []
        for name in self.order[:-1]:
            output = self.member(name)(*args, **kwargs)
            predictions.append(tensors(output)[self.leaf[name]])
        return (self.last(*args, **kwargs), *predictions)


def _named(call: Callable[..., Any], parameters: Sequence[Parameter]) -> Callable[..., Any]:
    """`call` under the arguments of the cascade, for code that inspects `forward`."""
    bound = functools.partial(call)
    kinds = [inspect.Parameter(p.name, inspect._ParameterKind(p.kind), default=None) for p in parameters]
    bound.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return bound


def tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def target(model: nn.Module, prepare: Prepare | None) -> Callable[..., Any]:
    """What a stage's inputs go to first."""
    if prepare is None:
        return model.forward
    return prepare.forward if isinstance(prepare, nn.Module) else prepare


# ------------------------------------------------------------------------------------------------ building


def several(model: Any) -> dict[str, nn.Module] | None:
    """The models of a list, tuple or mapping by name, in order; None for a single model.

    Raises:
        CaptureError: Fewer than two, something that is no module, or a name that no module can have.
    """
    if not isinstance(model, list | tuple | Mapping | nn.ModuleList | nn.ModuleDict):
        return None
    found = list(model.values() if isinstance(model, Mapping | nn.ModuleDict) else model)
    if len(found) < 2:
        raise CaptureError("a cascade takes two models or more", got=len(found), hint="pass a single model by itself")
    for one in found:
        if not isinstance(one, nn.Module):
            raise CaptureError("a cascade takes modules", got=type(one).__name__, wanted="torch.nn.Module")
    if isinstance(model, Mapping | nn.ModuleDict):
        names = [str(n) for n in model]
    else:
        kinds = [type(m).__name__.lower() for m in found]
        names = [f"{n}_{kinds[:i].count(n)}" if kinds.count(n) > 1 else n for i, n in enumerate(kinds)]
    taken = set(dir(nn.Module())) | {"order", "leaf", "member"}
    for name in names:
        if not name.isidentifier() or name in taken:
            raise CaptureError(
                "a model of a cascade cannot have this name", got=repr(name), wanted="an identifier of its own"
            )
    return dict(zip(names, found, strict=True))


def compose(
    models: Mapping[str, nn.Module],
    prepare: Sequence[Prepare | None],
    inputs: Sequence[Inputs | None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Composite:
    """The composite of models under one call.

    Positional arguments go to every model as they are, named after those of the last one; a keyword argument goes to
    those that name it.

    Raises:
        StrategyError: An input that no model takes.
    """
    last = target(list(models.values())[-1], prepare[-1])
    positional = [p.name for p in parameters_of(last) if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
    if len(positional) < len(args):
        several = any(p.kind == VAR_POSITIONAL for p in parameters_of(last))
        if not several:
            raise StrategyError(
                "the last model takes fewer positional arguments than the example has",
                got=len(args),
                wanted=", ".join(positional) or "none",
                hint="pass example_kwargs=, and inputs= or prepare= to say who takes what",
            )
        positional += [f"input_{i}" for i in range(len(positional), len(args))]
    names = positional[: len(args)]
    parameters = tuple(Parameter(n, POSITIONAL) for n in dict.fromkeys([*names, *kwargs]))
    members = {
        name: Member(model, prepare[k], parameters, tuple(names), inputs[k])
        for k, (name, model) in enumerate(models.items())
    }
    given = {p.name: object() for p in parameters}
    for name, member in members.items():
        wanted = list(member.inputs.values() if isinstance(member.inputs, Mapping) else member.inputs or ())
        for one in wanted:
            if one not in given:
                raise StrategyError("inputs= names no input of the example", where=name, got=one, wanted=near(one, given))
    taken = {id(v) for m in members.values() for part in m.arguments(given) for v in _values(part)}
    for name, value in given.items():
        if id(value) not in taken:
            raise StrategyError(
                "no model of the cascade takes this input",
                got=name,
                wanted="; ".join(f"{n}: {', '.join(p.name for p in m.takes)}" for n, m in members.items()),
                hint="pass inputs= or prepare= to say who takes what",
            )
    return Composite(members)


def _values(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else list(part)
