"""The main front end: `torch.export` (non-strict), one symbol for every batch axis, parameters shared with the model."""

from __future__ import annotations

import itertools
import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn

import sympy
import torch
import torch.fx.experimental._config as fx_config
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from eecompile.capture import check, sequences
from eecompile.capture.adapter import FlatAdapter, FlatCall, flatten_call, mode, no_attention_fastpath
from eecompile.capture.axes import (
    BatchAxis,
    batch_axes,
    batch_size,
    counts_rows,
    integers_only,
    shapes,
    token_axes,
)
from eecompile.capture.caches import Caches
from eecompile.capture.causes import raise_cause
from eecompile.capture.grad_regions import inline_grad_regions
from eecompile.capture.quiet import quiet
from eecompile.capture.sizes import MAX_BATCH, MAX_LENGTH, batch_fixed, conditions, either, equal_sizes, ranges
from eecompile.capture.source import capture_failed, line_of, model_failed, size_line, stack_of, strip
from eecompile.capture.tensors import name_in_graph, share_tensors
from eecompile.capture.train_mode import check_training
from eecompile.capture.untouched import trial, untouched
from eecompile.errors import CaptureError, UnsupportedModelError
from eecompile.guards import Number, read_number
from eecompile.signature import Leaf, Signature, path_of

Numbers = torch.SymInt | torch.SymFloat | torch.SymBool
TRACE_ROWS = 5  # a batch of 1 would be specialised
MOST_STEPS = 130  # how much longer than the example a length of the other branch may be
LENGTHS_COMPARED = 4  # in the other branch


@dataclass(frozen=True)
class Captured:
    """What a front end hands to the passes: a flat graph and its calling convention."""

    graph_module: fx.GraphModule
    signature: Signature
    exported: ExportedProgram | None
    flat_example: tuple[torch.Tensor, ...] | None
    notes: tuple[str, ...] = ()
    front_end: Literal["export", "blocks"] = "export"
    blocks: Any = None  # what the blocks front end measured
    models: tuple[str, ...] = ()  # of a cascade, the full model last


def capture_export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    batch_axis: BatchAxis = 0,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    training: bool = False,
) -> Captured:
    """Captures `model` with a free batch axis and, where it has one, a free sequence axis.

    Args:
        batch_axis: One axis for every tensor input, or per input by name (None: no batch there).
        dynamic: Further free axes, `{"input_ids": {1: "seq"}}`; None finds the sequence axis of token inputs.
        training: Capture the train-mode graph (dropout, batch statistics) instead.

    Raises:
        CaptureError: No graph, or one that computes something else.
        UnsupportedModelError: Samples influence one another.
    """
    call = flatten_call(model, args, kwargs)
    axes = batch_axes(call, batch_axis)
    size = batch_size(call, axes)
    lengths = dict(dynamic) if dynamic is not None else token_axes(call, axes)
    levels = [lengths, {}] if lengths else [{}]
    if dynamic is None and (tokens := integers_only(lengths, call)) != lengths:
        levels.insert(1, tokens)  # features that are as many as the tokens only by chance
    tries = _Tries(model, call, axes, size, training)
    with (
        untouched(model),
        mode(model, training),
        no_attention_fastpath() as fused,
        quiet(),
    ):
        for further in levels:
            # Without it a branch such as `if x.shape[0] > 1` is burned in without a guard: batch 1 is silently wrong.
            for oblivious in (True, False):
                if not tries.whole and not tries.hopeless:
                    tries.one(further, oblivious)
            if tries.best is not None and not tries.best.fixed:
                break
        if tries.best is None:
            tries.fail()
        if training:
            _has_gradients(model, tries.run(call.tensors))
        captured = tries.widened()
        if training and captured.flat_example is not None:
            check_training(model, captured.graph_module, captured.flat_example, tries.run)
        if tries.compares and captured.flat_example is not None:
            check.fused_attention(captured.signature, captured.flat_example, captured.graph_module, tries.run, model, fused)
    return replace(captured, signature=tries.with_fixed(captured.signature, lengths), notes=tries.notes())


@dataclass(frozen=True)
class _Try:
    """One successful capture.

    Attributes:
        fixed: Sizes that were to be free and are not.
        unknown: What could not be checked.
    """

    name: str
    captured: Captured
    further: Mapping[str, Mapping[int, str]]
    fixed: frozenset[str]
    oblivious: bool
    unknown: tuple[str, ...]

    @property
    def lost(self) -> tuple[int, bool, int]:
        """How much of what was asked for is not admitted: fewer free sizes, no single row, conditions."""
        signature = self.captured.signature
        return len(self.fixed), signature.dynamic["batch"][0] > 1, len(signature.guards)


class _Tries:
    """Captures of one call with more and fewer free sizes; the one that admits the most inputs is taken."""

    def __init__(self, model: nn.Module, call: FlatCall, axes: Sequence[int | None], size: int, training: bool) -> None:
        self.model, self.call, self.axes, self.size, self.training = model, call, axes, size, training
        self.adapter = FlatAdapter(model, call)
        self.adapter.training = training
        self.compares = not training  # dropout and batch statistics are not comparable run to run
        self.best: _Try | None = None
        self.hopeless = False
        self.attempts: list[str] = []
        self.lines: dict[str, str] = {}  # of the model, that fix a size
        self.failures: list[BaseException] = []
        self.problems: list[str] = []

    @property
    def whole(self) -> bool:
        """Whether every size that was to be free is; conditions on sizes are the model's own, and checked at every call."""
        return self.best is not None and not any(self.best.lost[:2])

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = self.call.arguments(tensors)
        return self.model(*args, **kwargs)

    def one(self, further: Mapping[str, Mapping[int, str]], oblivious: bool) -> None:
        name = "a free batch" + (" and sequence length" if further else "")
        name += "" if oblivious else ", branches on batch 1 not guarded"
        self.attempts.append(name)
        try:
            captured = self._captured(further, oblivious, max(TRACE_ROWS, self.size))
            if not captured.signature.admits(captured.flat_example or ()):
                captured = self._captured(further, oblivious, self.size)  # the branch that the example itself takes
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 - torch.export raises many unrelated types
            self.failures.append(error)
            self.hopeless = _data_dependent(error)
            return
        unknown: tuple[str, ...] = ()
        if self.compares:
            signature, graph = captured.signature, captured.graph_module
            if self.adapter.trimmed:
                sequences.check_trimmed(self.run, graph, signature, captured.flat_example or (), type(self.model).__name__)
            try:
                signature, problems, unknown = check.verify(
                    signature, captured.flat_example or (), graph, self.run, self.model, oblivious
                )
            except (CaptureError, RuntimeError, TypeError, ValueError, IndexError):
                _try_model(self.model, self.call, self.training)
                raise
            captured = replace(captured, signature=signature)
            if problems:
                self.problems = problems
                return
        captured = self._at_size_one(captured)
        wanted = {n for spec in further.values() for n in spec.values()}
        free = {n for n, (low, high) in captured.signature.dynamic.items() if low != high}
        found = _Try(name, captured, further, frozenset(wanted - free), oblivious, unknown)
        for n in found.fixed & captured.signature.dynamic.keys():
            line = size_line(captured.exported, captured.signature.dynamic[n][0]) if captured.exported is not None else None
            self.lines[n] = self.lines.get(n) or line or ""
        if self.best is None or found.lost < self.best.lost:
            self.best = found

    def _captured(self, further: Mapping[str, Mapping[int, str]], oblivious: bool, count: int) -> Captured:
        traced = tuple(
            t if a is None else t.index_select(a, torch.arange(count, device=t.device) % self.size)
            for t, a in zip(self.call.tensors, self.axes, strict=True)
        )
        exported = self._exported(traced, further, oblivious)
        captured = from_exported(exported, self.call, self.axes, further, self.size, self.training, self.model)
        if oblivious:
            return captured
        # torch takes sizes of 0 and 1 for impossible here; whether the graph is right for them is found by numbers
        dynamic = {n: (1 if low <= 2 else low, high) for n, (low, high) in captured.signature.dynamic.items()}
        return replace(captured, signature=replace(captured.signature, dynamic=dynamic))

    def _exported(
        self, tensors: Sequence[torch.Tensor], further: Mapping[str, Mapping[int, str]], oblivious: bool
    ) -> ExportedProgram:
        """Traces; once more after a plain run where the model's code keeps tensors, which must be real ones in the trace."""
        caches = Caches(self.model)
        try:
            exported = _export(self.adapter, tensors, self.call, self.axes, further, oblivious)
        except Exception:  # torch.export raises many unrelated types
            if not caches.put_back():
                raise
        else:
            kept = caches.put_back()
            if not (kept and any(isinstance(c, FakeTensor) for c in exported.constants.values())):
                return exported
        with torch.no_grad():
            self.run(tensors)
        try:
            return _export(self.adapter, tensors, self.call, self.axes, further, oblivious)
        finally:
            caches.put_back()

    def with_fixed(self, signature: Signature, lengths: Mapping[str, Mapping[int, str]]) -> Signature:
        """Says of which lengths the model admits one only."""
        failed = next((line for e in self.failures if (line := line_of(self.model, e))), "")
        fixed = tuple(
            (leaf.path, axis, self.lines.get(name, "") or failed)
            for leaf in signature.inputs
            for axis, name in lengths.get(leaf.path, {}).items()
            if isinstance(leaf.shape[axis], int)
        )
        return replace(signature, fixed=fixed)

    def _at_size_one(self, captured: Captured) -> Captured:
        """Without conditions that operators make of themselves (broadcasting) and that fail only where a size is 1, where
        the graph is right at 1.

        A branch of the model's own code has a line, and keeps its condition.
        """
        flat = captured.flat_example or ()
        for guard in captured.signature.guards:
            if guard.where or not guard.fails_at_one:
                continue
            wider = replace(captured.signature, guards=tuple(g for g in captured.signature.guards if g != guard))
            every = [check.at_lengths(wider, flat, length) for length in (abs, lambda n: n + 3, lambda n: 1)]
            every += [check.rows(wider, t, range(n)) for t in every for n in (1, 2, 3)]
            beyond = [t for t in every if wider.admits(t) and not captured.signature.admits(t)]
            if beyond and all(self.agrees(captured, t) for t in beyond):
                captured = replace(captured, signature=wider)
        return captured

    def widened(self) -> Captured:
        """The best capture, or the one of the other branch where its graph is the model in both: where a model pads its
        input to a multiple, padding by nothing is no padding.

        Both captures have conditions of their own, under one of which every call has to be.
        """
        assert self.best is not None
        mine = self.best.captured
        steps = self._longer(mine.signature, None, 1) if mine.signature.guards else []
        if not steps:
            return mine
        other = check.at_lengths(mine.signature, self.call.tensors, partial(operator.add, steps[0]))
        call = replace(self.call, tensors=tuple(other))
        tries = _Tries(self.model, call, self.axes, self.size, self.training)
        tries.one(self.best.further, self.best.oblivious)
        if tries.best is None:
            return mine
        theirs = tries.best.captured
        for graph, branch in ((mine, theirs), (theirs, mine)):
            signature = either(graph.signature, branch.signature)
            if signature is None or not signature.admits(self.call.tensors) or not signature.admits(other):
                continue
            steps = self._longer(graph.signature, signature, LENGTHS_COMPARED)
            beyond = [check.at_lengths(signature, self.call.tensors, partial(operator.add, k)) for k in steps]
            beyond += [one for t in beyond[:1] if signature.admits(one := check.rows(signature, t, [0]))]
            if beyond and all(self.agrees(graph, t) for t in beyond):
                self.best = replace(self.best, captured=replace(graph, signature=signature, flat_example=mine.flat_example))
                return self.best.captured
        return mine

    def _longer(self, beyond: Signature, within: Signature | None, count: int) -> list[int]:
        """By how much the example has to be longer to lie beyond what a signature admits: the first `count` numbers."""
        sizes = [t.to("meta") for t in self.call.tensors]
        every = ((k, check.at_lengths(beyond, sizes, partial(operator.add, k))) for k in range(MOST_STEPS))
        steps = (k for k, t in every if not beyond.admits(t) and (within is None or within.admits(t)))
        return list(itertools.islice(steps, count))

    def agrees(self, captured: Captured, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether graph and model give the same, drawing the same random numbers."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                want = captured.signature.flatten_output(self.run(tensors))
            except Exception:  # noqa: BLE001 - the user's code may raise anything
                return False
            torch.manual_seed(0)
            return not check.compare(captured.graph_module, tensors, want, "the other branch")

    def notes(self) -> tuple[str, ...]:
        assert self.best is not None
        failed = [a for a in self.attempts if a != self.best.name]
        fixed = [f"{n} is fixed by the model" for n in sorted(self.best.fixed)]
        guards = [f"only where {g}" for g in self.best.captured.signature.guards]
        tried = [f"not possible: {'; '.join(failed)}"] if failed else []
        return (f"captured with {self.best.name}", *tried, *fixed, *guards, *self.best.unknown)

    def fail(self) -> NoReturn:
        """Raises the error that says why none of the captures is the model.

        Raises:
            CaptureError: Always.
        """
        if self.failures and not self.problems:
            _try_model(self.model, self.call, self.training)
            if isinstance(self.failures[0], CaptureError):
                raise self.failures[0]
            raise capture_failed(self.model, self.failures[0], self.attempts) from self.failures[0]
        if self.problems:
            raise_cause(self.run, self.call.tensors, self.call.paths, self.model, type(self.model).__name__)
        check.raise_problems(self.problems, type(self.model).__name__)
        raise CaptureError("capture failed", where=type(self.model).__name__)


def _has_gradients(model: nn.Module, output: Any) -> None:
    """Refuses to train a model whose forward cuts gradients off.

    Raises:
        UnsupportedModelError: It has parameters to train, and no output has a gradient.
    """
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    wanted = any(p.requires_grad for p in model.parameters())
    if torch.is_grad_enabled() and wanted and not any(t.requires_grad for t in leaves):
        raise UnsupportedModelError(
            "the model cannot be trained: its forward runs without gradients",
            where=type(model).__name__,
            got="no output that requires a gradient, in train mode",
            wanted="a forward without torch.no_grad() or torch.inference_mode() around all of it",
            hint="take it out of forward and put it around the calls, or train the heads alone: fit(trunk=False)",
        )


def _try_model(model: nn.Module, call: FlatCall, training: bool) -> None:
    """Runs the model on the example as it is: an error of its own is not one of tracing.

    Raises:
        CaptureError: It fails.
    """
    args, kwargs = call.arguments(call.tensors)
    try:
        with trial(model, training):
            model(*args, **kwargs)
    except Exception as error:  # the user's code may raise anything
        raise model_failed(model, error, shapes(call)) from error


def _export(
    adapter: FlatAdapter,
    tensors: Sequence[torch.Tensor],
    call: FlatCall,
    axes: Sequence[int | None],
    further: Mapping[str, Mapping[int, str]],
    oblivious: bool,
) -> ExportedProgram:
    """Every free size as torch finds it: narrowed, related to others, or fixed, with a guard for each branch on it."""
    batch = Dim.AUTO(min=1, max=MAX_BATCH)
    length = Dim.AUTO(min=1, max=MAX_LENGTH)

    def spec(path: str, axis: int | None) -> dict[int, Any] | None:
        out: dict[int, Any] = {} if axis is None else {axis: batch}
        return out | dict.fromkeys(further.get(path, {}), length) or None

    adapter.equal = equal_sizes(call.paths, axes, further)
    shapes = tuple(spec(p, a) for p, a in zip(call.paths, axes, strict=True))
    # With gradients, whatever the caller has, so that the model's own regions without are seen.
    with (
        torch.enable_grad(),
        fx_config.patch(backed_size_oblivious=oblivious),  # type: ignore[attr-defined]
        sequences.padded() as trimmed,
    ):
        exported = export(adapter, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    adapter.trimmed = bool(trimmed)
    return exported


def _data_dependent(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}"
    return any(s in text for s in ("data-dependent", "DataDependent", "unbacked", "PendingUnbacked"))


def from_exported(
    exported: ExportedProgram,
    call: FlatCall,
    axes: Sequence[int | None],
    further: Mapping[str, Mapping[int, str]],
    size: int,
    training: bool,
    model: nn.Module | None = None,
) -> Captured:
    """A captured graph from a program that was exported through the flat adapter."""
    graph_module = flat_graph(exported, "m", call.paths, model, training)
    if not training:
        check.writes_nothing(graph_module)
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    names: dict[Any, str] = {}
    for node, path, axis in zip(placeholders, call.paths, axes, strict=True):
        value = node.meta["val"]
        for i, n in {**({} if axis is None else {axis: "batch"}), **further.get(path, {})}.items():
            if isinstance(value.shape[i], torch.SymInt):
                names.setdefault(value.shape[i].node.expr, n)
    inputs = tuple(
        Leaf(path, _sizes(n.meta["val"], names), n.meta["val"].dtype, axis)
        for n, path, axis in zip(placeholders, call.paths, axes, strict=True)
    )
    dynamic, guards = conditions(exported, inputs, ranges(exported, names))
    sizes = {leaf.shape[leaf.batch_axis] for leaf in inputs if leaf.batch_axis is not None}
    low, high = dynamic.get("batch", (0, 0))
    if sizes != {"batch"} or low == high:
        raise batch_fixed(exported, call, next((s for s in sizes if isinstance(s, int)), low), axes)
    outputs, out_constants, out_spec = _outputs(exported, graph_module, names)
    signature = Signature(
        parameters=call.parameters,
        inputs=inputs,
        outputs=outputs,
        in_spec=call.in_spec,
        positional=call.positional,
        out_spec=out_spec,
        constants=call.constants,
        out_constants=out_constants,
        dynamic=dynamic,
        guards=guards,
        training=training,
    )
    example = tuple(t if a is None else t.narrow(a, 0, size) for t, a in zip(call.tensors, axes, strict=True))
    return Captured(graph_module, signature, exported, example)


def _sizes(value: torch.Tensor, names: Mapping[Any, str]) -> tuple[int | str, ...]:
    def one(d: Any) -> int | str:
        if not isinstance(d, torch.SymInt):
            return int(d)
        expr = d.node.expr
        batch = next((s for s, n in names.items() if n == "batch"), None)
        if batch is not None and batch in expr.free_symbols and counts_rows(expr, batch):
            return "batch"
        return names.get(expr, str(expr.subs({s: n for s, n in names.items() if s.is_Symbol})))

    return tuple(one(d) for d in value.shape)


def _outputs(
    exported: ExportedProgram, graph_module: fx.GraphModule, names: Mapping[Any, str]
) -> tuple[tuple[Leaf, ...], tuple[tuple[Any] | None, ...], Any]:
    node = graph_module.graph.output_node()
    out_spec = exported.call_spec.out_spec
    values = graph_module.meta.pop("out_leaves")
    dummy = pytree.tree_unflatten([_Slot(i) for i in range(len(values))], out_spec)
    paths = {v.index: path_of(p) for p, v in pytree.tree_flatten_with_path(dummy)[0]}
    leaves = []
    for i, v in enumerate(values):
        if isinstance(v, fx.Node) and isinstance(v.meta["val"], Numbers):
            values[i] = _number(v.meta["val"], names, paths.get(i, f"output[{i}]"))
        if not isinstance(values[i], fx.Node):
            continue
        sizes = _sizes(v.meta["val"], names)
        axis = next((a for a, s in enumerate(sizes) if s == "batch"), None)
        leaves.append(Leaf(paths.get(i, f"output[{i}]"), sizes, v.meta["val"].dtype, axis))
    if not leaves:
        raise CaptureError("the model returns no tensor", where=str(node))
    return tuple(leaves), tuple(None if isinstance(v, fx.Node) else (v,) for v in values), out_spec


def _number(value: Any, names: Mapping[Any, str], path: str) -> Number:
    """An output that is a number computed from sizes."""
    e = value.node.expr
    found = e.xreplace({s: sympy.Symbol(n, integer=True, positive=True) for s, n in names.items() if s.is_Symbol})
    if any(s.name not in names.values() for s in found.free_symbols):
        raise CaptureError(
            "the model gives out a number that depends on data, or on a size of no input",
            where=path,
            got=str(e),
            wanted="tensors, and numbers computed from sizes of the inputs",
            hint="leave it out of what the model returns, or return a tensor",
        )
    return read_number(PythonPrinter().doprint(found))


@dataclass(frozen=True)
class _Slot:
    index: int


def flat_graph(
    exported: ExportedProgram,
    prefix: str,
    paths: Sequence[str],
    model: nn.Module | None = None,
    training: bool = False,
) -> fx.GraphModule:
    """The exported graph as a plain FX graph: flat tensors in, a flat tuple out, parameters by the model's own names.

    Parameters and buffers are those of `model`, by default of the exported program itself. Guards are left out here:
    `conditions` reads them, and `Signature` checks them at every new shape.
    """
    module = exported.module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    _drop_dtype_checks(module)
    inline_grad_regions(module, training)
    graph.graph_copy(module.graph, env)
    output = module.graph.output_node()
    values = [env.get(v, v) if isinstance(v, fx.Node) else v for v in pytree.tree_leaves(output.args[0])]
    root: dict[str, Any] = {}
    owner = module.get_submodule(prefix) if model is None else model
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, path in zip(placeholders, paths, strict=True):
        name = re.sub(r"\W+", "_", path).strip("_")
        name += "_" * keyword.iskeyword(name)
        node._rename(name)
        node.target = node.name
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
            continue
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            node.target = name_in_graph(strip(str(node.target), prefix), value, owner)
            root[node.target] = value
        node.meta["stack"] = stack_of(node, prefix)
    graph.output(tuple(v for v in values if isinstance(v, fx.Node) and not isinstance(v.meta["val"], Numbers)))
    graph_module = fx.GraphModule(root, graph, class_name="Captured")
    share_tensors(graph_module, owner)
    graph_module.meta["out_leaves"] = values
    graph_module.train(False)
    return graph_module


def _drop_dtype_checks(module: fx.GraphModule) -> None:
    """Takes out the checks that a value has the dtype of capture, in autocast regions too: under autocast it has another."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            checks = part.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
            for node in checks:
                part.graph.erase_node(node)
            if checks:
                part.recompile()


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
