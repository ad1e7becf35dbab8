"""The fallback front end, without a trace: exits at the boundaries of repeated modules of a model that runs as Python.

The model is one node of the graph; its blocks are tapped with hooks. Nothing between the blocks is seen, so nothing there
can be cut: rows are gathered when a block is entered and scattered back when it is left (`runtime/blocks.py`), and Python
between the blocks goes on with the full batch.
"""

from __future__ import annotations

import contextlib
import operator
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from eecompile.capture import check
from eecompile.capture.adapter import FlatCall, flatten_call, mode, no_attention_fastpath
from eecompile.capture.axes import BatchAxis, batch_axes, batch_size, token_axes
from eecompile.capture.export import Captured
from eecompile.capture.untouched import trial
from eecompile.errors import CaptureError, near
from eecompile.signature import Leaf, Signature, path_of

Axis = tuple[int, int] | None  # (axis, rows of the value per row of the batch); None: no batch
FEW, MORE = 5, 7  # rows of the two runs that show which axes grow with the batch


@dataclass(frozen=True)
class Tap:
    """One call of one block.

    Attributes:
        name: Module path, `path@k` for the k-th further call.
        inputs: Batch axis of each tensor leaf of its arguments.
        outputs: The same for what it returns.
        primary: Index of the output leaf that a head reads.
        sizes: Shape of that leaf; a string is a dynamic size.
        flops: FLOPs of one row since the previous block.
    """

    name: str
    kind: str
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]
    primary: int
    sizes: tuple[int | str, ...]
    batch_axis: int
    dtype: str
    flops: float
    given: tuple[bool, ...]  # which leaves of its arguments were tensors at capture


@dataclass(frozen=True)
class BlocksFound:
    """What the front end measured, for the passes."""

    taps: tuple[Tap, ...]
    rest_flops: float
    modules: tuple[str, ...] = field(default=())


@dataclass
class Call:
    """One observed call of a block."""

    name: str
    inputs: list[tuple[int, ...] | None]
    outputs: list[Tensor | None]
    flops: float


def shapes(leaves: Sequence[Any]) -> list[tuple[int, ...] | None]:
    return [tuple(v.shape) if isinstance(v, Tensor) else None for v in leaves]


@contextlib.contextmanager
def observed(model: nn.Module, names: Sequence[str], seen: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Calls `seen(name, module, inputs, output)` after each call of the named modules by this thread."""
    thread = threading.get_ident()
    counts: dict[str, int] = defaultdict(int)

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                k = counts[name]
                counts[name] += 1
                seen(name if k == 0 else f"{name}@{k}", module, (args, kwargs), output)

        return after

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


class BlocksModel(nn.Module):
    """The user's model with flat tensors in, and out: its output leaves, then what each tapped block gave.

    Its `train()` does not reach the user's model: that one runs in this module's mode and gets its own back.
    """

    def __init__(self, model: nn.Module, call: FlatCall, found: BlocksFound, frozen: bool = False) -> None:
        super().__init__()
        self.model = model
        self.call, self.found, self.frozen = call, found, frozen
        self.training = False

    def train(self, mode: bool = True) -> BlocksModel:
        self.training = mode
        return self

    def freeze(self) -> BlocksModel:
        """The same model for training heads only: eval mode, no gradients."""
        return BlocksModel(self.model, self.call, self.found, frozen=True)

    def over(self, model: nn.Module) -> BlocksModel:
        """The same around a copy of the model."""
        return BlocksModel(model, self.call, self.found, self.frozen)

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        taps: list[Tensor] = []
        by_name = {t.name: t for t in self.found.taps}

        def seen(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if name in by_name:
                # A clone: the model may overwrite it in place before the heads read it.
                taps.append(pytree.tree_leaves(output)[by_name[name].primary].clone())

        grad = torch.no_grad() if self.frozen else contextlib.nullcontext()
        with grad, mode(self.model, self.training and not self.frozen), observed(self.model, self.found.modules, seen):
            output = self.invoke(flat)
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if len(taps) != len(by_name):
            raise CaptureError(
                "a block did not run",
                where=type(self.model).__name__,
                got=f"{len(taps)} of {len(by_name)} calls of {', '.join(self.found.modules)}",
                wanted="every block at every call, as when the model was captured",
                hint="switch LayerDrop or stochastic depth off (in train mode too), or train the heads alone (trunk=False)",
            )
        return (*leaves, *taps)

    def invoke(self, flat: Sequence[Tensor]) -> Any:
        args, kwargs = self.call.arguments(flat)
        return self.model(*args, **kwargs)


def capture_blocks(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    batch_axis: BatchAxis = 0,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    pattern: str | None = None,
) -> Captured:
    """Captures a model as its blocks.

    Args:
        pattern: Module path of the repeated unit with `*` for its numbers; the best group is found where None.

    Raises:
        CaptureError: No repeated module, or calls whose number depends on the batch.
        UnsupportedModelError: Samples influence one another.
    """
    call = flatten_call(model, args, kwargs)
    axes = batch_axes(call, batch_axis)
    size = batch_size(call, axes)
    lengths = dict(dynamic) if dynamic is not None else token_axes(call, axes)

    def rows(n: int, shorter: bool = False) -> list[Tensor]:
        out = []
        for t, a, p in zip(call.tensors, axes, call.paths, strict=True):
            t = t if a is None else t.index_select(a, torch.arange(n, device=t.device) % size)
            for i in lengths.get(p, {}) if shorter else ():
                t = t.narrow(i, 0, max(2, t.shape[i] * 2 // 3))
            out.append(t)
        return out

    with trial(model), no_attention_fastpath():
        names = repeated(model, call, rows(FEW), pattern)
        few, few_out = record(model, call, names, rows(FEW))
        more, more_out = record(model, call, names, rows(MORE))
        short = None
        if lengths:
            try:
                short, short_out = record(model, call, names, rows(FEW, True))
            except (RuntimeError, ValueError, IndexError):  # the model has one length only
                lengths = {}
            if short is not None and len(short) != len(few):  # one block per position: the length is fixed
                short, lengths = None, {}
        if [c.name for c in few] != [c.name for c in more]:
            raise CaptureError(
                "which blocks run depends on the number of rows",
                where=type(model).__name__,
                got=f"{len(few)} against {len(more)} calls",
            )
        known = {
            (t.shape[i], s.shape[i]): n
            for t, s, p in zip(rows(FEW), rows(FEW, True), call.paths, strict=True)
            for i, n in lengths.get(p, {}).items()
        }
        taps = tuple(_tap(model, a, b, c, known) for a, b, c in zip(few, more, short or few, strict=True))
        few_leaves, more_leaves = (pytree.tree_leaves(o) for o in (few_out, more_out))
        inputs = tuple(
            Leaf(p, _named_sizes(t, a, lengths.get(p, {})), t.dtype, a)
            for p, t, a in zip(call.paths, call.tensors, axes, strict=True)
        )
        outputs: list[Leaf] = []
        paths = [path_of(p) for p, _ in pytree.tree_flatten_with_path(few_out)[0]]
        other = pytree.tree_leaves(short_out) if short is not None else few_leaves
        for path, a, b, c in zip(paths, few_leaves, more_leaves, other, strict=True):
            if isinstance(a, Tensor):
                axis = batch_of(tuple(a.shape), tuple(b.shape))
                sizes = [
                    "batch" if axis and axis[0] == i else "seq" if s != c.shape[i] else s for i, s in enumerate(a.shape)
                ]
                outputs.append(Leaf(path, tuple(sizes), a.dtype, axis[0] if axis and axis[1] == 1 else None))
        signature = Signature(
            parameters=call.parameters,
            inputs=inputs,
            outputs=tuple(outputs),
            in_spec=call.in_spec,
            positional=call.positional,
            out_spec=pytree.tree_structure(few_out),
            constants=call.constants,
            out_constants=tuple(None if isinstance(v, Tensor) else (v,) for v in few_leaves),
            dynamic={"batch": (1, None), **{n: (2, None) for spec in lengths.values() for n in spec.values()}},
        )

        def invoke(flat: Sequence[Tensor]) -> Any:
            a, k = call.arguments(flat)
            return model(*a, **k)

        flat = tuple(rows(size))
        unknown = check.independent(signature, flat, invoke, type(model).__name__, model)
        total = _total_flops(invoke, rows(FEW)) / FEW
    found = BlocksFound(taps, max(0.0, total - sum(t.flops for t in taps)), tuple(names))
    graph_module = _graph(BlocksModel(model, call, found), signature)
    notes = (f"captured as {len(taps)} blocks, without a trace", *unknown)
    return Captured(graph_module, signature, None, flat, notes, "blocks", found)


def repeated(model: nn.Module, call: FlatCall, flat: Sequence[Tensor], pattern: str | None) -> list[str]:
    """Paths of the repeated unit: modules with children whose paths agree but for numbers, most FLOPs first."""
    groups: dict[tuple[str, type], list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        cell = type(module).__name__.endswith("Cell")
        if re.search(r"\d", name) and (cell or any(True for _ in module.children())):
            groups[(re.sub(r"\d+", "*", name), type(module))].append(name)
        elif cell and name:
            groups[(name, type(module))].append(name)
    if pattern is not None:
        chosen = [n for (p, _), members in groups.items() if p == pattern for n in members]
        if not chosen:
            raise CaptureError(
                "no repeated module has this path",
                where=type(model).__name__,
                got=pattern,
                wanted=near(pattern, [p for p, _ in groups]) if groups else "the model has none",
            )
        return chosen
    counter = FlopCounterMode(display=False)
    with counter:
        args, kwargs = call.arguments(flat)
        model(*args, **kwargs)
    counts = counter.get_flop_counts()
    root = type(model).__name__

    def flops(name: str) -> int:
        return sum(counts.get(f"{root}.{name}", {}).values())

    total = max(1, counter.get_total_flops())
    runs: dict[str, int] = defaultdict(int)  # a shared module is one module that is called again

    def count(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        runs[name.partition("@")[0]] += 1

    with observed(model, [n for members in groups.values() for n in members], count):
        args, kwargs = call.arguments(flat)
        model(*args, **kwargs)
    ranked = sorted(
        (m for m in groups.values() if sum(runs[n] for n in m) > 1),
        key=lambda m: (-min(3, int(4 * sum(map(flops, m)) / total)), -sum(runs[n] for n in m)),
    )
    if not ranked:
        raise CaptureError(
            'capture="blocks" needs repeated modules',
            where=type(model).__name__,
            got="no two modules with the same class under a numbered path",
            hint='name the unit with blocks="path.*", or use capture="export"',
        )
    return ranked[0]


def record(model: nn.Module, call: FlatCall, names: Sequence[str], flat: Sequence[Tensor]) -> tuple[list[Call], Any]:
    """Every call of the named modules in one run, in order, and the run's output."""
    calls: list[Call] = []
    counter = FlopCounterMode(display=False)

    def seen(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        leaves = [t if isinstance(t, Tensor) else None for t in pytree.tree_leaves(output)]
        calls.append(Call(name, shapes(pytree.tree_leaves(inputs)), leaves, float(counter.get_total_flops())))

    args, kwargs = call.arguments(flat)
    with observed(model, names, seen), counter:
        output = model(*args, **kwargs)
    before = 0.0
    for c in calls:
        before, c.flops = c.flops, c.flops - before
    return calls, output


def batch_of(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> Axis:
    """The axis that grows with the batch, from the shapes of `FEW` and `MORE` rows."""
    if a is None or b is None or a == b or len(a) != len(b):
        return None
    grown = [i for i, (p, q) in enumerate(zip(a, b, strict=True)) if p != q]
    if len(grown) != 1 or a[grown[0]] * MORE != b[grown[0]] * FEW:
        return None
    return grown[0], a[grown[0]] // FEW


def _tap(model: nn.Module, a: Call, b: Call, short: Call, known: Mapping[tuple[int, int], str]) -> Tap:
    inputs = tuple(batch_of(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    outputs = tuple(batch_of(x, y) for x, y in zip(shapes(a.outputs), shapes(b.outputs), strict=True))
    primary = next(
        (
            i
            for i, (t, axis) in enumerate(zip(a.outputs, outputs, strict=True))
            if t is not None and axis is not None and axis[1] == 1 and t.is_floating_point()
        ),
        None,
    )
    if primary is None:
        raise CaptureError("a block gives no floating-point tensor of the batch", where=a.name, got=shapes(a.outputs))
    t, axis = a.outputs[primary], outputs[primary]
    other = short.outputs[primary]
    assert t is not None and axis is not None and other is not None
    sizes: list[int | str] = [
        s if s == other.shape[i] else known.get((s, other.shape[i]), f"length{s}") for i, s in enumerate(t.shape)
    ]
    sizes[axis[0]] = "batch"
    kind = type(model.get_submodule(a.name.partition("@")[0])).__name__
    dtype = str(t.dtype).removeprefix("torch.")
    given = tuple(shape is not None for shape in a.inputs)
    return Tap(a.name, kind, inputs, outputs, primary, tuple(sizes), axis[0], dtype, a.flops / FEW, given)


def _total_flops(invoke: Callable[[Sequence[Tensor]], Any], flat: Sequence[Tensor]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        invoke(flat)
    return float(counter.get_total_flops())


def _named_sizes(t: Tensor, axis: int | None, names: Mapping[int, str]) -> tuple[int | str, ...]:
    return tuple("batch" if i == axis else names.get(i, s) for i, s in enumerate(t.shape))


def _graph(tapped: BlocksModel, signature: Signature) -> fx.GraphModule:
    """One node for the model, one for each tap, one for each output."""
    graph = fx.Graph()
    inputs = [graph.placeholder(re.sub(r"\W+", "_", leaf.path).strip("_")) for leaf in signature.inputs]
    model = graph.call_module("model", tuple(inputs))
    count = len(signature.outputs)
    for i, tap in enumerate(tapped.found.taps):
        node = graph.call_function(operator.getitem, (model, count + i))
        node._rename(re.sub(r"\W+", "_", tap.name).strip("_"))
        node.meta["stack"] = ((tap.name.partition("@")[0], 0, tap.kind),)
    leaves = []
    for i, leaf in enumerate(signature.outputs):
        leaves.append(graph.call_function(operator.getitem, (model, i)))
        leaves[-1]._rename(re.sub(r"\W+", "_", leaf.path).strip("_"))
    graph.output(tuple(leaves))
    root = nn.Module()
    root.add_module("model", tapped)
    return fx.GraphModule(root, graph, class_name="Blocks")
