"""Segments of the compact executor in ONNX Runtime: one session for each, on the CPU, in float32, without gradients.

A session holds a copy of the weights, packed as its kernels want them, so it is made again once a weight is another tensor
or was written to. torch counts writes, but not those through `.data`: these are seen where one of some values of a weight,
drawn from all of it, has changed. A new session is compared with torch on the rows of its first call.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from eecompile import onnx
from eecompile.errors import EecompileError, ExportError, StrategyError
from eecompile.ir.settings import BUFFERS, Settings
from eecompile.passes import facts
from eecompile.passes.live_positions import LivePositions
from eecompile.passes.lower import Segment, state_shapes, states_of
from eecompile.passes.lower_cond import Whole, example_of, free_axes, traced
from eecompile.passes.settings import with_settings
from eecompile.program import Program
from eecompile.runtime.precision import any_autocast

HINT = 'fast.backend = "eager" runs it'
SAMPLED = 64
"""Values of a weight that are compared before each call: a write to a tenth of them is missed once in a thousand times."""
TOLERANCE = 1e-2
"""Of an output's largest value: rounding stays far below it, an operator that is defined otherwise does not."""

TRACING = threading.Lock()  # torch traces in one thread at a time
VERSION = attrgetter("_version")
Entry = tuple[Mapping[str, Any], str]
Sample = tuple[Any, Any]


def onnx_segments(
    program: Program, segments: Sequence[Segment]
) -> Iterator[tuple[tuple[str, ...], OnnxSegment, OnnxSegment | None]]:
    """Of each segment the settings that it takes first, itself, and its head; sessions are made at the first call.

    Raises:
        StrategyError: The program is not on the CPU, or has a part without an ONNX form.
    """
    device = facts.device_of(program.graph_module)
    if device.type != "cpu":
        raise StrategyError('backend="onnxruntime" runs on the CPU', got=str(device), hint=HINT)
    batch, carried = facts.Batch(program.source, program.signature), state_shapes(program)
    dynamic = program.signature.dynamic

    def made(module: fx.GraphModule, given: Sequence[Tensor], states: int = 0) -> OnnxSegment:
        if any(isinstance(m, LivePositions) for m in module.modules()):
            raise StrategyError(
                'backend="onnxruntime" cannot halt at each position: how many are still active is known on the host only',
                hint=f"{HINT}, or compile with per_token=False",
            )
        inputs = facts.placeholders(module)
        shapes = [batch.sizes(n) for n in inputs[: len(inputs) - states]]
        shapes += [carried[name] for name in states_of(program)[:states]]
        return OnnxSegment(module, given, [free_axes(shape, dynamic) for shape in shapes])

    live: Sequence[Tensor] = example_of(program, dynamic)
    state: Sequence[Tensor] = ()
    for s in segments:
        module, names = with_settings(s.module)
        numbers = [facts.attribute(s.module, name) for name in names]
        given = [*numbers, *live, *state[: s.takes_states]]
        with _plain():
            values = module(*given)
        at = s.decision + len(s.leaves) + len(s.reports)
        live, state = values[at : at + len(s.outputs)], values[2 : s.decision]
        head = None if s.head is None else made(s.head, values[len(values) - len(s.head_axes) :])
        yield names, made(module, given, s.takes_states), head


@dataclass(frozen=True)
class Loaded:
    """A session, and what it was made of."""

    session: Any
    state: object
    samples: Sequence[Sample]
    values: bytes

    def made_of(self, weights: Sequence[Tensor]) -> bool:
        return self.state == _state(weights) and self.values == _values(self.samples)


class OnnxSegment:
    """One graph in ONNX Runtime.

    Args:
        module: It reads no settings.
        example: Inputs to trace it with; their values are never read.
        free: Of each input, its dynamic axes.
    """

    def __init__(self, module: fx.GraphModule, example: Sequence[Tensor], free: Sequence[Mapping[int, Any]]) -> None:
        inputs, outputs = facts.placeholders(module), facts.output_leaves(module)
        computed = list(dict.fromkeys(n for n in outputs if n not in inputs))
        self.where, self.module = module.__class__.__name__, facts.graph_of(module, computed)
        self.names, self.outputs = [f"input_{i}" for i in range(len(inputs))], [f"output_{i}" for i in range(len(computed))]
        self.places = [[*computed, *inputs].index(n) for n in outputs]  # what passes through is no output of the session
        self.example, self.free = dict(zip(self.names, example, strict=True)), dict(zip(self.names, free, strict=True))
        self.entries = _entries(self.module)
        self._loaded: Loaded | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights = [entries[name] for entries, name in self.entries]
        self._check_mode((*inputs, *weights))
        found = self._run(self._current(weights, inputs).session, inputs)
        pool = [*map(torch.from_numpy, found), *inputs]
        return tuple(pool[i] for i in self.places)

    def _check_mode(self, tensors: Sequence[Tensor]) -> None:
        if any_autocast():
            raise StrategyError(
                'backend="onnxruntime" computes in float32, and this call is under autocast',
                hint='leave autocast, or set fast.backend = "eager" first',
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise StrategyError(
                'backend="onnxruntime" takes ordinary tensors, and this call is under vmap or the like (torch.func)',
                hint='set fast.backend = "eager" first',
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise StrategyError(
                'backend="onnxruntime" has no gradients, and this call would need them',
                got="gradients enabled, an input or a weight with requires_grad=True",
                hint='call it under torch.no_grad(), or set fast.backend = "eager" first',
            )

    def _run(self, session: Any, inputs: Sequence[Tensor]) -> list[Any]:
        try:
            given = {name: t.detach().resolve_neg().numpy() for name, t in zip(self.names, inputs, strict=True)}
            found: list[Any] = session.run(self.outputs, given)
        except Exception as error:  # the runtime has errors of its own
            got = " ".join(str(error).split())[:400]
            raise EecompileError("ONNX Runtime could not run a segment", where=self.where, got=got, hint=HINT) from error
        return found

    def _compare(self, session: Any, inputs: Sequence[Tensor]) -> None:
        with _plain():
            wanted = self.module(*(t.detach() for t in inputs))
        for found, value in zip(map(torch.from_numpy, self._run(session, inputs)), wanted, strict=True):
            if not value.is_floating_point() or not value.numel():
                continue
            allowed = TOLERANCE * max(1e-3, float(value.nan_to_num(0, 0, 0).abs().max()))
            if not torch.allclose(found, value, rtol=0, atol=allowed, equal_nan=True):
                raise StrategyError(
                    "ONNX Runtime computes something else than torch on these rows",
                    where=self.where,
                    got=f"a difference of {float((found - value).abs().max()):g}",
                    wanted=f"at most {allowed:g}",
                    hint=HINT,
                )

    def _current(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Loaded:
        loaded = self._loaded
        if loaded is None or not loaded.made_of(weights):
            with TRACING:
                loaded = self._loaded
                if loaded is None or not loaded.made_of(weights):
                    session = self._session(weights)
                    self._compare(session, inputs)
                    samples = [_sample(t) for t in weights]
                    loaded = self._loaded = Loaded(session, _state(weights), samples, _values(samples))
        return loaded

    def _session(self, weights: Sequence[Tensor]) -> Any:
        tensors: list[Any] = [*self.example.values(), *weights]
        for t in tensors:
            what = type(t).__name__ if is_traceable_wrapper_subclass(t) else t.dtype
            if what != torch.float32 and (t.is_floating_point() or t.is_complex()):
                raise StrategyError('backend="onnxruntime" computes in float32', where=self.where, got=what, hint=HINT)
        try:
            with tempfile.TemporaryDirectory() as folder, _plain():
                exported = traced(Whole(self.module, Settings(), self.names), self.example, self.free)
                onnx.convert(exported, path := Path(folder) / "segment.onnx", self.names, self.outputs)
                return onnx.session(path)
        except ExportError as error:
            raise StrategyError(
                'backend="onnxruntime" cannot run this program', where=self.where, got=error.got or error.what, hint=HINT
            ) from error


@contextmanager
def _plain() -> Iterator[None]:
    """Whatever mode the first call is made in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _entries(module: fx.GraphModule) -> list[Entry]:
    """Where the weights of a graph and of its regions stand; settings are inputs."""
    found: dict[tuple[int, str], Entry] = {}
    for part in module.modules():
        for entries in (part._parameters, part._buffers):
            for name, tensor in entries.items():
                if tensor is not None and name not in BUFFERS:
                    found[id(entries), name] = entries, name
    return list(found.values())


def _state(weights: Sequence[Tensor]) -> object:
    try:
        return (torch.get_num_threads(), *map(Tensor.data_ptr, weights), *map(VERSION, weights))
    except RuntimeError:  # tensors of inference mode count no writes
        return (torch.get_num_threads(), *map(Tensor.data_ptr, weights))


def _sample(t: Tensor) -> Sample:
    """The memory of a weight and places in it, all of them where they are few."""
    count = int(min(t.numel(), t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()))
    places = np.random.default_rng(0).integers(count, size=SAMPLED) if count > SAMPLED else np.arange(count)
    return t.detach().as_strided((count,), (1,)).numpy(), places


def _values(samples: Sequence[Sample]) -> bytes:
    return b"".join(memory[places].tobytes() for memory, places in samples)
