"""Whether a train-mode graph trains what the model trains: compared with the model itself, before any step is taken.

Tracing keeps tensor operations and loses the rest: the backward of a custom `autograd.Function`, counters and schedules in
Python, Python's and NumPy's random numbers. Each would be another training, in silence; so it is refused by name.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from eecompile.errors import CaptureError

LATER = 100_000  # calls that a counter is moved on by, to see whether anything depends on it
WAY_ROUND = 'train the heads alone (trunk=False), or compile with capture="blocks", which runs the Python model itself'


def check_training(model: nn.Module, graph: Callable[..., Any], flat: Sequence[Tensor], run: Callable[..., Any]) -> None:
    """Compares one step of the graph with one of the model, both in train mode; attributes are the caller's to put back.

    Args:
        graph: The captured graph; gives a flat tuple.
        flat: Its inputs.
        run: The model on the same inputs.

    Raises:
        CaptureError: They train different things, or the model's own calls differ in a way that no graph has.
    """
    name = type(model).__name__
    with torch.enable_grad():
        with _seeded() as numbers, _own_buffers(model):
            before = _counters(model)
            first = _floats(run(flat))
            used = numbers()
        if used:
            raise _lost(name, f"{used} decides what a training step computes", "torch's random numbers")
        changed = [(m, key) for (m, key), value in before.items() if m.__dict__.get(key) != value]
        with _seeded(), _own_buffers(model):
            second = _floats(run(flat))
        for module, key in changed:
            module.__dict__[key] += LATER
        with _seeded(), _own_buffers(model):
            third = _floats(run(flat))
        if not _same(first, second) or not _same(first, third):
            what = ", ".join(sorted({key for _, key in changed})) or "something outside of its tensors"
            raise _lost(name, f"its output changes with every call: {what} is counted in Python", "a buffer, or a constant")
        with _seeded(), _own_buffers(model):
            traced = _floats(graph(*flat))
        parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        if not parameters or not _same(first, traced[: len(first)]) or not any(t.requires_grad for t in first):
            return  # other random numbers are drawn: nothing to compare
        functions = sorted({type(f).__name__.removesuffix("Backward") for f in _functions(first)})
        for want, got in zip(_gradients(first, parameters), _gradients(traced[: len(first)], parameters), strict=True):
            if not _same([want], [got]):
                custom = f" (custom autograd.Function: {', '.join(functions)})" if functions else ""
                got_text = f"gradients that differ by up to {float((want - got).abs().max()):.3g}{custom}"
                raise _lost(name, got_text, "the gradients that the model itself has")


def _lost(name: str, got: str, wanted: str) -> CaptureError:
    return CaptureError(
        "the model's training step cannot be kept in a graph", where=name, got=got, wanted=wanted, hint=WAY_ROUND
    )


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Every run begins with the same buffers and writes to copies: gradients are taken after the next run has begun."""
    kept = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in kept}
    for buffers, name, b in kept:
        buffers[name] = copies[id(b)]
    try:
        yield
    finally:
        for buffers, name, b in kept:
            buffers[name] = b


@contextmanager
def _seeded() -> Iterator[Callable[[], str]]:
    """The same random numbers each time, put back afterwards; names what other than torch was drawn from."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    random.seed(0)
    started = random.getstate(), None if numpy is None else numpy.random.get_state()[1].copy().tolist()
    at = None if numpy is None else numpy.random.get_state()[2]

    def used() -> str:
        if random.getstate() != started[0]:
            return "Python's random"
        now = None if numpy is None else numpy.random.get_state()
        moved = now is not None and (now[2] != at or now[1].tolist() != started[1])
        return "NumPy's random" if moved else ""

    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield used
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _counters(model: nn.Module) -> dict[tuple[nn.Module, str], int | float]:
    return {
        (m, key): value
        for m in model.modules()
        for key, value in m.__dict__.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _floats(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().double(), y.detach().double()
        scale = float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()) if x.numel() else 0.0
        if not torch.allclose(x, y, rtol=1e-2, atol=1e-3 * scale + 1e-9, equal_nan=True):
            return False
    return True


def _gradients(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    total = [
        (t.double() * torch.cos(torch.arange(t.numel(), device=t.device, dtype=torch.float64)).view(t.shape)).sum()
        for t in outputs
        if t.requires_grad
    ]
    loss = torch.stack(total).sum()
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _functions(outputs: Sequence[Tensor]) -> list[Any]:
    """The custom functions that the outputs were computed by."""
    todo: list[Any] = [t.grad_fn for t in outputs if t.requires_grad]
    seen: set[Any] = set()
    found: list[Any] = []
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.append(node)
        todo += [n for n, _ in node.next_functions]
    return found
