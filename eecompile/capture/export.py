"""The main front end: `torch.export` (non-strict), one symbol for every batch axis, parameters shared with the model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx.experimental._config as fx_config
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from eecompile.capture import check
from eecompile.capture.adapter import FlatAdapter, FlatCall, flatten_call, mode, no_attention_fastpath
from eecompile.capture.axes import BatchAxis, batch_axes, batch_size, counts_rows, integers_only, shapes, token_axes
from eecompile.capture.quiet import quiet
from eecompile.capture.source import capture_failed, model_failed
from eecompile.capture.tensors import name_in_graph, share_tensors
from eecompile.capture.untouched import untouched
from eecompile.errors import CaptureError
from eecompile.signature import Leaf, Signature, path_of

MAX_BATCH = 65536
MAX_LENGTH = 1 << 20
TRACE_ROWS = 5  # a batch of 1 would be specialised


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
    verify: bool = True,
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
    traced = tuple(
        t if a is None else t.index_select(a, torch.arange(max(TRACE_ROWS, size), device=t.device) % size)
        for t, a in zip(call.tensors, axes, strict=True)
    )
    adapter = FlatAdapter(model, call)
    attempts: list[str] = []
    failures: list[BaseException] = []
    problems: list[str] = []
    free = [lengths, {}] if lengths else [{}]
    if dynamic is None and (tokens := integers_only(lengths, call)) != lengths:
        free.insert(1, tokens)  # features that are as many as the tokens only by chance
    options = [(d, o) for d in free for o in (True, False)]
    with (
        untouched(model),
        mode(model, training),
        _on_adapter(adapter, training),
        no_attention_fastpath() as fused,
        quiet(),
    ):
        for further, oblivious in options:
            name = "a free batch" + (" and sequence length" if further else "")
            attempts.append(name + ("" if oblivious else ", branches on batch 1 not guarded"))
            try:
                exported = _export(adapter, traced, call, axes, further, oblivious)
            except Exception as error:  # noqa: BLE001 - torch.export raises many unrelated types
                failures.append(error)
                if _data_dependent(error):
                    break
                continue
            captured = from_exported(exported, call, axes, further, size, training, model)
            if not verify or training:  # dropout and batch statistics are not comparable run to run
                return _with_notes(captured, attempts)
            flat = captured.flat_example or ()

            def run(tensors: Sequence[torch.Tensor]) -> Any:
                a, k = call.arguments(tensors)
                return model(*a, **k)

            module = exported.module()
            try:
                problems, unknown = check.verify(
                    captured.signature,
                    flat,
                    lambda *t, m=module, s=captured.signature: s.flatten_output(m(*t)),
                    run,
                    type(model).__name__,
                )
            except (RuntimeError, TypeError, ValueError, IndexError):
                _try_model(model, call, training)
                raise
            if not problems:
                check.fused_attention(captured.signature, flat, module, run, model, fused)
                return _with_notes(captured, attempts, unknown)
    if failures and not problems:
        _try_model(model, call, training)
        raise capture_failed(model, failures[0], attempts) from failures[0]
    check.raise_problems(problems, type(model).__name__)
    raise CaptureError("capture failed", where=type(model).__name__)


def _try_model(model: nn.Module, call: FlatCall, training: bool) -> None:
    """Runs the model on the example as it is: an error of its own is not one of tracing.

    Raises:
        CaptureError: It fails.
    """
    args, kwargs = call.arguments(call.tensors)
    try:
        with torch.no_grad(), untouched(model), mode(model, training):
            model(*args, **kwargs)
    except Exception as error:  # the user's code may raise anything
        raise model_failed(model, error, shapes(call)) from error


def _with_notes(captured: Captured, attempts: list[str], unknown: tuple[str, ...] = ()) -> Captured:
    failed = (f"not possible: {'; '.join(attempts[:-1])}",) if len(attempts) > 1 else ()
    notes = (f"captured with {attempts[-1]}", *failed, *unknown)
    return Captured(captured.graph_module, captured.signature, captured.exported, captured.flat_example, notes)


@contextlib.contextmanager
def _on_adapter(adapter: FlatAdapter, training: bool) -> Iterator[None]:
    adapter.training = training
    yield


def _export(
    adapter: FlatAdapter,
    tensors: Sequence[torch.Tensor],
    call: FlatCall,
    axes: Sequence[int | None],
    further: Mapping[str, Mapping[int, str]],
    oblivious: bool,
) -> ExportedProgram:
    batch = Dim("batch", min=1, max=MAX_BATCH)
    dims = {n: Dim(n, min=2, max=MAX_LENGTH) for spec in further.values() for n in spec.values()}

    def spec(path: str, axis: int | None) -> dict[int, Any] | None:
        out: dict[int, Any] = {} if axis is None else {axis: batch}
        out |= {i: dims[n] for i, n in further.get(path, {}).items()}
        return out or None

    while True:
        shapes = tuple(spec(p, a) for p, a in zip(call.paths, axes, strict=True))
        try:
            # Without it a branch such as `if x.shape[0] > 1` is burned in without a guard: batch 1 is silently wrong.
            with fx_config.patch(  # type: ignore[attr-defined]
                backed_size_oblivious=oblivious
            ):
                return export(adapter, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            narrower = _narrower(str(error), dims)
            if narrower is None:
                raise
            dims = narrower


def _narrower(message: str, dims: Mapping[str, Any]) -> dict[str, Any] | None:
    """Smaller ranges where torch names the bound that the model has (a position table, a window), else None."""
    changed = dict(dims)
    for name in re.findall(r"values of (\w+) = ", message):
        if name not in dims:
            continue
        low, high = int(dims[name].min), int(dims[name].max)
        line = "\n".join(x for x in message.splitlines() if f"values of {name} = " in x)
        tops = [int(n) for n in re.findall(r"min\((\d+),", line)] + [int(n) for n in re.findall(r"guard .* <= (\d+)", line)]
        high = min([high, *tops])
        if re.search(r"!= 1\b", line):
            low = max(low, 4)  # below that the model takes a branch of its own
        if (low, high) != (int(dims[name].min), int(dims[name].max)) and low < high:
            changed[name] = Dim(name, min=low, max=high)
    return changed if any(changed[n] is not dims[n] for n in dims) else None


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
    """A captured graph from a program that was exported behind the flat adapter."""
    graph_module = flat_graph(exported, "m", call.paths, model)
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
    outputs, out_constants, out_spec = _outputs(exported, graph_module, names)
    signature = Signature(
        parameters=call.parameters,
        inputs=inputs,
        outputs=outputs,
        in_spec=call.spec,
        out_spec=out_spec,
        constants=call.constants,
        out_constants=out_constants,
        dynamic=ranges(exported, names),
        training=training,
    )
    example = tuple(t if a is None else t.narrow(a, 0, size) for t, a in zip(call.tensors, axes, strict=True))
    return Captured(graph_module, signature, exported, example)


def ranges(exported: ExportedProgram, names: Mapping[Any, str]) -> dict[str, tuple[int, int | None]]:
    found = {}
    for symbol, name in names.items():
        bounds = exported.range_constraints.get(symbol)
        low, high = (int(bounds.lower), bounds.upper) if bounds is not None else (1, MAX_BATCH)
        top = int(high) if str(high).isdigit() and int(high) < MAX_BATCH else None
        found[name] = (low, top)
    return found


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
        if not isinstance(v, fx.Node):
            continue
        sizes = _sizes(v.meta["val"], names)
        axis = next((a for a, s in enumerate(sizes) if s == "batch"), None)
        leaves.append(Leaf(paths.get(i, f"output[{i}]"), sizes, v.meta["val"].dtype, axis))
    if not leaves:
        raise CaptureError("the model returns no tensor", where=str(node))
    return tuple(leaves), tuple(None if isinstance(v, fx.Node) else (v,) for v in values), out_spec


@dataclass(frozen=True)
class _Slot:
    index: int


def flat_graph(
    exported: ExportedProgram, prefix: str, paths: Sequence[str], model: nn.Module | None = None
) -> fx.GraphModule:
    """The exported graph as a plain FX graph: flat tensors in, a flat tuple out, parameters by the model's own names.

    Parameters and buffers are those of `model`, by default of the exported program itself. Guards were checked once by
    `check.verify`; sizes are checked by `Signature` at every new shape.
    """
    module = exported.module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    _drop_dtype_checks(module)
    graph.graph_copy(module.graph, env)
    output = module.graph.output_node()
    values = [env.get(v, v) if isinstance(v, fx.Node) else v for v in pytree.tree_leaves(output.args[0])]
    root: dict[str, Any] = {}
    owner = module.get_submodule(prefix) if model is None else model
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, path in zip(placeholders, paths, strict=True):
        name = re.sub(r"\W+", "_", path).strip("_")
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
    graph.output(tuple(v for v in values if isinstance(v, fx.Node)))
    graph_module = fx.GraphModule(root, graph, class_name="Captured")
    share_tensors(graph_module, owner)
    graph_module.meta["out_leaves"] = values
    graph_module.train(False)
    return graph_module


def _drop_dtype_checks(module: fx.GraphModule) -> None:
    """Takes out the checks that a value has the dtype of capture, in autocast regions too: under autocast it has another."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
                part.graph.erase_node(node)
            part.recompile()


def strip(name: str, prefix: str) -> str:
    """`m.bert.weight` as `bert.weight`: the adapter is nobody's business."""
    if not prefix:
        return name
    return "" if name == prefix else name.removeprefix(prefix + ".")


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def stack_of(node: fx.Node, prefix: str) -> tuple[tuple[str, int, str], ...]:
    """Modules around a node, outermost first: (path, number of the call, class name).

    A shared module that is called again carries `@k`; the path is the one of its first name.
    """
    out = []
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        found = re.search(r"@(\d+)$", key) or re.search(r"@(\d+)$", path)
        plain = strip(re.sub(r"@\d+$", "", path), prefix)
        if not plain or plain.startswith("_empty"):
            continue
        kind = cls if isinstance(cls, str) else getattr(cls, "__qualname__", str(cls))
        out.append((plain, int(found.group(1)) if found else 0, kind.rsplit(".", 1)[-1]))
    return tuple(out)
