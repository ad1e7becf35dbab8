"""What several test files need: comparing outputs, thresholds that no rounding can flip, and what a model looks like."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eecompile import CompiledModule, eecompile
from eecompile.capture.export import Captured
from eecompile.module import Origin
from eecompile.passes import analysis, insertion, run_passes
from eecompile.program import Prediction, Program
from eecompile.result import Result
from eecompile.strategies import Strategy

CLOSED = 2.0
GAP = 2e-5  # a hundred times what rounding moves a confidence when a smaller batch is summed in another order


def nightly(*values: Any, **options: Any) -> Any:
    """Parameters that `make test` leaves to `make test-all`: slow, or close to others."""
    return pytest.param(*values, marks=pytest.mark.nightly, **options)


# ------------------------------------------------------------------------------------------------ outputs


def tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def equal_bits(got: Any, want: Any) -> None:
    """Same type, same shapes, same bits; NaN equals NaN."""
    assert type(got) is type(want)
    a, b = tensors(got), tensors(want)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)), float((x - y).abs().max())


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value, and NaN in the same places."""
    assert type(got) is type(want)
    a, b = tensors(got), tensors(want)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert torch.equal(x.isnan(), y.isnan()), "NaN in other places"
        x, y = torch.nan_to_num(x.double()), torch.nan_to_num(y.double())
        off = float((x - y).abs().max()) if x.numel() else 0.0
        assert off <= tolerance * (1 + float(y.abs().max()) if y.numel() else 1), off


def same_result(got: Result, want: Result) -> None:
    """Everything that two runs report is the same: indices and choices exactly, numbers up to rounding."""
    assert torch.equal(got.exit_index, want.exit_index)
    assert got.exit_index.dtype == torch.int64
    assert got.confidence.dtype == torch.float32
    torch.testing.assert_close(got.confidence, want.confidence, atol=1e-5, rtol=0)
    exact = want.gates is want.steps is want.route is None
    torch.testing.assert_close(got.cost, want.cost, atol=0 if exact else 1e-6, rtol=0)
    close(got.output, want.output)
    same_choices(got, want)
    for name in ("final", "stopped", "late"):
        a, b = getattr(got, name), getattr(want, name)
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, name


def same_choices(got: Result, want: Result) -> None:
    """Gates, widths, route and steps are there in both or in neither, and the same."""
    for name in ("gates", "widths", "route", "steps"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if b is not None:
            # steps and ponder are [B, 1] where no row reached the end of a chain in which every position halts by itself
            assert a.dtype == b.dtype, name
            assert torch.equal(a.expand_as(b), b), name
    if want.trace.ponder is not None:
        assert got.trace.ponder is not None
        torch.testing.assert_close(got.trace.ponder.expand_as(want.trace.ponder), want.trace.ponder)


# ------------------------------------------------------------------------------------------------ settings


def neutral(fast: CompiledModule) -> None:
    """The model as it was: every exit closed, every gate open, every row on the model's own branch, halting off."""
    fast.set_thresholds(CLOSED)
    if fast.gates:
        fast.set_gate_thresholds(0.0)
    if fast.program.choices.chains:
        fast.set_halting_threshold(CLOSED)
    if len(fast.route_margins):
        fast.set_route_margins(CLOSED)


def random_settings(fast: CompiledModule, args: Any, kwargs: Any, rng: random.Random) -> None:
    """Settings of every kind that the program has, in gaps of what these inputs give, so that rounding decides nothing."""
    neutral(fast)
    if fast.program.choices.chains:
        fast.set_halting_threshold(rng.choice([1.0, 0.7, 0.4, CLOSED]))
    if fast.gates:
        scores = fast.observe(*args, **kwargs).trace.gate_scores
        assert scores is not None
        fast.set_gate_thresholds([rng.choice([0.0, CLOSED, *[separating(s, rng)] * 4]) for s in scores.T])
    if len(fast.route_margins):
        fast.set_route_margins(random_margins(fast.observe(*args, **kwargs).trace.route_weights, rng))
    if fast.exits and fast.exits[0].criterion.stateful:
        fast.set_thresholds(patience_thresholds(len(fast.exits), fast.exits[0].criterion.patience, rng))
    elif fast.exits:  # which exits are open moves the confidences of an ensemble
        closed = [rng.random() < 0.3 for _ in fast.exits]
        fast.set_thresholds([CLOSED if c else 1.0 for c in closed])
        confidences = fast.observe(*args, **kwargs).confidences
        assert confidences is not None
        values = random_thresholds(confidences[:-1], rng, closed=0.0)
        fast.set_thresholds([CLOSED if c else v for c, v in zip(closed, values, strict=True)])


def random_margins(weights: Tensor | None, rng: random.Random) -> list[float]:
    """One margin for each branch, in a gap of the lead of the likeliest one over the model's own; `weights` [B, K]."""
    assert weights is not None
    lead = weights[:, :-1].max(1).values - weights[:, -1]
    at = 2 * separating((lead + 1) / 2, rng) - 1
    return [max(at, 0.0)] * (weights.shape[1] - 1) + [max(-at, 0.0)]


def separating(confidences: Tensor, rng: random.Random) -> float:
    """A threshold in the middle of a gap between the confidences `[B]` of one exit.

    The survivors of an earlier exit are computed in a smaller batch, where sums run in another order and a confidence
    moves by some 1e-7. A threshold equal to a confidence, or next to it, would let rounding decide, and executors could
    then rightly disagree. In the middle of a gap of 2e-5 or more none can.
    """
    points = sorted({0.0, 1.0 + 4 * GAP, *(c for c in confidences.tolist() if c == c)})
    gaps = [(a, b) for a, b in zip(points, points[1:], strict=False) if b - a >= GAP]
    low, high = rng.choice(gaps)
    return min((low + high) / 2, 1.0 + GAP)


def random_thresholds(confidences: Sequence[Tensor], rng: random.Random, closed: float = 0.25) -> list[float]:
    """One threshold for each exit; each is closed with the given probability."""
    return [CLOSED if rng.random() < closed else separating(c, rng) for c in confidences]


def spreading_thresholds(confidences: Sequence[Tensor]) -> list[float]:
    """Thresholds at which every exit takes about the same number of rows, and the model's own end the rest.

    Args:
        confidences: `[B]` of every exit, B > number of exits; the rows must differ by `GAP` or more somewhere.
    """
    left = torch.arange(len(confidences[0]))
    found = []
    for k, c in enumerate(confidences):
        ranked = c[left].sort().values
        share = len(left) / (len(confidences) - k + 1)
        gaps = [i for i in range(1, len(left)) if ranked[i] - ranked[i - 1] >= GAP]
        assert gaps, f"exit {k} cannot separate {len(left)} rows: {ranked.tolist()}"
        at = min(gaps, key=lambda i: (abs(len(left) - i - share), i))
        found.append(float((ranked[at] + ranked[at - 1]) / 2))
        left = left[c[left] < found[-1]]
    return found


def patience_thresholds(exits: int, patience: int, rng: random.Random) -> list[float]:
    """Between the values that a count over `patience` can take."""
    return [rng.choice([CLOSED, *((k + 0.5) / patience for k in range(patience))]) for _ in range(exits)]


# ------------------------------------------------------------------------------------------------ the user's model


@dataclass(frozen=True)
class Fingerprint:
    """Everything about a model that compiling and running may not change: values, objects, attributes, hooks, flags.

    Attributes:
        values: Copies of parameters and buffers.
        attributes: Of every module by path: its class, and each attribute as what `_seen` makes of it.
        alive: The objects themselves, so that none of their addresses is given to another one.
    """

    values: dict[str, Tensor]
    attributes: dict[str, dict[str, Any]]
    alive: list[Any]

    @staticmethod
    def of(model: nn.Module) -> Fingerprint:
        alive: list[Any] = []
        attributes = {
            path: {"class": type(m), **{name: _seen(value, alive) for name, value in m.__dict__.items()}}
            for path, m in model.named_modules(remove_duplicate=False)
        }
        for path, p in model.named_parameters(remove_duplicate=False):
            attributes[path] = {"requires_grad": p.requires_grad, "grad": _seen(p.grad, alive)}
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return Fingerprint({n: t.detach().clone() for n, t in named.items()}, attributes, alive)

    def changes(self, model: nn.Module) -> list[str]:
        """What is another value or another object now, by path; nothing where the model is untouched."""
        now = Fingerprint.of(model)
        found = [f"{path} came or went" for path in self.attributes.keys() ^ now.attributes.keys()]
        for path in self.attributes.keys() & now.attributes.keys():
            a, b = self.attributes[path], now.attributes[path]
            found += [f"{path}.{n}: {a.get(n)} -> {b.get(n)}" for n in a.keys() | b.keys() if a.get(n) != b.get(n)]
        found += [f"{n} has other values" for n, t in self.values.items() if not torch.equal(t, now.values[n])]
        return sorted(found)

    def check(self, model: nn.Module) -> None:
        assert self.changes(model) == []


def _seen(value: Any, alive: list[Any]) -> Any:
    """Numbers and strings by value; anything else by identity, containers with what they hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    alive.append(value)
    held: Any = None
    if isinstance(value, dict):
        held = [(k, _seen(v, alive)) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        held = [_seen(v, alive) for v in value]
    return type(value).__name__, id(value), held


def shares_parameters(fast: CompiledModule, model: nn.Module) -> None:
    """No parameter of the trunk is there twice: the compiled module holds the model's own objects, and the heads'."""
    own = {id(p) for p in model.parameters()}
    storages = {p.data_ptr() for p in model.parameters() if p.numel()}
    new = [p for p in fast.parameters() if id(p) not in own]
    assert {id(p) for p in fast.program.source.parameters()} <= own
    assert {id(p) for p in new} == {id(p) for p in fast.head_parameters()}
    assert not [p for p in new if p.data_ptr() in storages]


# ------------------------------------------------------------------------------------------------ compiling


def again(fast: CompiledModule, strategy: Strategy, prediction: int | None = None) -> CompiledModule:
    """Another strategy on what was captured before: capture is what takes the time."""
    source = fast.source_graph
    captured = Captured(source, fast.program.signature, fast.origin.exported, fast.example)
    at = fast.program.prediction.index if prediction is None else prediction
    program = Program(source, source, captured.signature, prediction=Prediction(at))
    program = run_passes(program, [*analysis(captured), *insertion(strategy.recipe(), captured, seed=0)])
    return CompiledModule(program, strategy, origin=Origin(fast.original, example=fast.example))


@contextmanager
def executor(fast: CompiledModule, name: str) -> Iterator[CompiledModule]:
    before = fast.executor
    fast.executor = name
    try:
        yield fast
    finally:
        fast.executor = before


def run_by(name: str, fast: CompiledModule, *args: Any, **kwargs: Any) -> Result:
    """A call by one executor."""
    with torch.no_grad(), executor(fast, name):
        return fast.run(*args, **kwargs)


def both(fast: CompiledModule, *args: Any, **kwargs: Any) -> tuple[Result, Result]:
    """The same call by `compact` and by `reference`."""
    return run_by("compact", fast, *args, **kwargs), run_by("reference", fast, *args, **kwargs)


def agree(fast: CompiledModule, args: Any, kwargs: Any) -> Result:
    """Compact reports what the reference reports, called plainly too; gives the compact result."""
    compact, reference = both(fast, *args, **kwargs)
    same_result(compact, reference)
    with torch.no_grad():
        close(fast(*args, **kwargs), reference.output)
    return compact


# ------------------------------------------------------------------------------------------------ what runs


class Watch(TorchDispatchMode):
    """Counts the operators that run, and sees the shape of every tensor that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        self.shapes.setdefault(name, []).extend(tuple(t.shape) for t in tensors(out))
        return out


def watch(call: Callable[[], Any]) -> Watch:
    with torch.no_grad(), Watch() as seen:
        call()
    return seen


def gelu_of(seen: Watch) -> list[tuple[int, ...]]:
    """Shapes of every GELU that ran, in order; a block has one. Written in place where nothing needs its input."""
    return seen.shapes.get("gelu", []) + seen.shapes.get("gelu_", [])


# ------------------------------------------------------------------------------------------------ untrained exits


def opened(fast: CompiledModule) -> CompiledModule:
    """Sets what waits for training, as if all that was inserted were trained: exits open at the strategy's thresholds."""
    fast.live.open_all()
    return fast


def compiled(*args: Any, **kwargs: Any) -> CompiledModule:
    """`eecompile(...)` with everything open that waits to be trained: most tests are about rows that leave."""
    return opened(eecompile(*args, **kwargs))
