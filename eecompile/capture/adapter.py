"""The flat-tensor adapter: tensors in, the original call inside.

`torch.export` cannot give dynamic shapes to what lands in `**kwargs`, and burns Python values in anyway; so the
model is exported inside a module that takes tensors only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from eecompile.errors import CaptureError
from eecompile.signature import Convention, Parameter, arguments_by_name, parameters_of, path_of


@dataclass(frozen=True)
class FlatCall(Convention):
    """One call of a model, taken apart.

    Attributes:
        tensors: The tensor leaves, in order.
        paths: Their names, as a user would write them.
    """

    parameters: tuple[Parameter, ...]
    tensors: tuple[torch.Tensor, ...]
    paths: tuple[str, ...]
    constants: tuple[tuple[Any] | None, ...]
    in_spec: Any
    positional: int = 0


def flatten_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatCall:
    """Takes one call apart.

    Raises:
        CaptureError: A TorchScript module, or arguments that do not fit `forward` or hold no tensor.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "a TorchScript module cannot be captured",
            where=type(model).__name__,
            got="a model that went through torch.jit.script or torch.jit.trace: it has no Python code to follow",
            wanted="the Python model, or a program of torch.export",
            hint="compile the model as it was before torch.jit",
        )
    parameters = parameters_of(model.forward)
    named = {name: _plain(value) for name, value in arguments_by_name(parameters, args, kwargs).items()}
    leaves, spec = pytree.tree_flatten_with_path(named)
    tensors = tuple(v for _, v in leaves if isinstance(v, torch.Tensor))
    if not tensors:
        raise CaptureError(
            "the example call holds no tensor",
            got=", ".join(named) or "no arguments",
            hint="pass example_inputs=(x,) or example_kwargs={...} with real tensors",
        )
    if any(t.is_nested for t in tensors):
        raise CaptureError("the example call holds a nested tensor", wanted="dense ones", hint="pad it: to_padded_tensor")
    return FlatCall(
        parameters,
        tensors,
        tuple(path_of(p) for p, v in leaves if isinstance(v, torch.Tensor)),
        tuple(None if isinstance(v, torch.Tensor) else (v,) for _, v in leaves),
        spec,
        len(args),
    )


def _plain(value: Any) -> Any:
    """Mappings that torch cannot take apart (`BatchEncoding`) as dicts."""

    def one(leaf: Any) -> Any:
        return {k: _plain(v) for k, v in leaf.items()} if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(one, value)


class FlatAdapter(nn.Module):
    """Calls `m` with flat tensors put back where they belong."""

    def __init__(self, m: nn.Module, call: FlatCall) -> None:
        super().__init__()
        self.training = m.training  # nn.Module starts in train mode; export reads the flag of the root
        self.m = m
        self.call = call
        self.equal: list[list[tuple[int, int]]] = []  # groups of (input, axis) that are one size
        self.trimmed = False  # whether the longest row of a batch decided a length in the last trace

    def forward(self, *flat: torch.Tensor) -> Any:
        for (first, axis), *others in self.equal:
            for i, a in others:
                torch._check(flat[first].shape[axis] == flat[i].shape[a])  # type: ignore[no-untyped-call]  # one symbol
        args, kwargs = self.call.arguments(flat)
        return self.m(*args, **kwargs)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in one mode, every submodule's own flag restored afterwards.

    Raises:
        CaptureError: Train mode is asked for, and `model` is a graph of `torch.export`, whose mode is fixed in it.
    """
    flags = {m: m.training for m in model.modules()}
    try:
        try:
            model.train(training)
        except NotImplementedError as error:  # how graphs of torch.export and of PT2E refuse
            if training:
                raise CaptureError(
                    "the model has no train mode: it is a graph of torch.export",
                    where=type(model).__name__,
                    got=" ".join(str(error).split())[:200],
                    hint="fit(trunk=False) trains what was inserted; train the model itself before it is exported",
                ) from error
            for m in flags:
                m.training = False
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off on every kind of device: a graph is captured without it, and run under that of the call."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def no_attention_fastpath() -> Iterator[bool]:
    """`nn.TransformerEncoder` takes another, untraceable path in eval mode unless this is off. Gives what was set."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield before
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
