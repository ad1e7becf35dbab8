"""The models of a cascade, each compiled by itself first: `Cascade() + Anytime()` has heads inside of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from eecompile.capture.composite import compose
from eecompile.errors import NoPlaceError
from eecompile.module import CompiledModule


def compiled_members(
    models: Mapping[str, nn.Module],
    ways: Sequence[Sequence[Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    compile_one: Callable[..., CompiledModule],
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """The models compiled on what they are called with in the cascade, and what is to be said about them.

    Models that are compiled already stay as they are, and so do those that have no place for anything, if another has.

    Args:
        ways: `prepare` and `inputs` of each model, in two lists.
        compile_one: `(model, example_inputs=..., example_kwargs=...)`.

    Raises:
        NoPlaceError: No model has a place.
    """
    prepare, inputs = ways
    plain = {name: getattr(m, "original", m) if isinstance(m, CompiledModule) else m for name, m in models.items()}
    composite = compose(plain, prepare, inputs, args, kwargs)
    names = [p.name for p in composite.last.names]
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    found: dict[str, nn.Module] = {}
    notes: list[str] = []
    failed: NoPlaceError | None = None
    for name, model in models.items():
        if isinstance(model, CompiledModule):
            found[name] = model
            continue
        member = composite.member(name)
        example, by_name = member.arguments(named)
        if member.prepare is not None:
            with torch.no_grad():
                prepared = member.prepare(*example, **by_name)
            by_name = dict(prepared) if isinstance(prepared, Mapping) else {}
            example = [] if by_name else list(prepared) if isinstance(prepared, tuple | list) else [prepared]
        try:
            found[name] = compile_one(model, example_inputs=tuple(example), example_kwargs=by_name)
        except NoPlaceError as error:
            failed, found[name] = error, model
            notes.append(f"{name}: {error.what}")
    if failed is not None and not any(isinstance(m, CompiledModule) for m in found.values()):
        raise failed
    return found, tuple(notes)
