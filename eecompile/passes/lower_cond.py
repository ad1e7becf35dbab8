"""Lowers the schedule to one exported program of plain ATen: savings that survive outside of Python.

Before each stage after the first stands `torch.cond(is a row left, deeper, stop)`. Inside `deeper` the surviving rows are
found and gathered, the stage runs, its exit decides, and results are scattered back to `[B, ...]`, so that no data-dependent
size leaves a branch. The condition is one scalar: an exit saves at every batch size, not at batch 1 alone. Gates, widths,
halting steps and branches have the same form, "does a row take this arm".

The conditions of the stages stand one after the other. Nested, they would spare the scatter, but torch's tracers, and the
ONNX exporter most of all, go through a nested branch two times or more at every level: eleven exits would take hours.

Both sides of a condition give equal ranks and dtypes, and neither gives an input back as it is: what passes through is
cloned. Weights are operands of the conditions, not constants of their graphs, so that each is stored once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

import eecompile.ops as ops
from eecompile.errors import EecompileError, ExportError
from eecompile.ir.settings import BUFFERS, THRESHOLDS_BUFFER, Settings
from eecompile.kernels import choose, confidence, gate, halt
from eecompile.kernels.choose import is_open
from eecompile.passes import facts
from eecompile.passes.lower import Schedule, Segment, schedule
from eecompile.passes.partition import Partition
from eecompile.passes.regions import possible
from eecompile.program import Program
from eecompile.signature import Signature


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose mask has the rows of the query: where it has one row, torch asks how many rows survive."""
    if mask is not None and mask.ndim == query.ndim and free_unbacked_symbols(query.shape[0]):
        mask = mask.expand(query.shape[0], *mask.shape[1:])
    aten = torch.ops.aten.scaled_dot_product_attention.default
    return aten(query, key, value, mask, *args, **kwargs)  # type: ignore[no-any-return]


def average_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive pooling of one axis; to a single value it is a mean, and torch does not ask how many rows survive."""
    return x.mean(-1, keepdim=True) if list(size) == [1] else torch.ops.aten.adaptive_avg_pool1d.default(x, size)


# Operators, and definitions that may launch a kernel, by their definitions in plain torch.
PLAIN: dict[Any, Callable[..., Any]] = {
    ops.confidence: confidence.confidence,
    ops.halt: halt.halt,
    torch.ops.aten.adaptive_avg_pool1d.default: average_pool,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.eecompile.choose.default: choose.choose,
    torch.ops.eecompile.confidence.default: confidence.confidence,
    torch.ops.eecompile.gate.default: gate.gate,
    torch.ops.eecompile.halt.default: halt.halt,
}

Tensors = Mapping[Any, Tensor]
"""The traced value of every parameter, buffer and setting; see `_key`."""


def lower_cond(
    program: Program, settings: Settings, settings_are_inputs: bool = False, single: bool = False
) -> ExportedProgram:
    """One `ExportedProgram` that computes what the compiled module computes, and saves what it saves.

    Exits that these settings close, gates that they hold open or closed, and branches that they close are not in it. The
    numbers of all others can be set later: they are tensors float32 [slots] under the names in
    `eecompile.ir.settings.BUFFERS`.

    Args:
        settings_are_inputs: Whether these tensors are inputs after the model's own; else buffers, as they are set now.
        single: Whether the batch is fixed at 1, for runtimes without sizes that depend on data.

    Returns:
        A program from the model's input tensors to its output tensors, `exit_index` [B] int64 and `confidence` [B]
        float32. One input is a positional argument; several are given by name.

    Raises:
        ExportError: The program has a part without an exported form, or torch cannot export it.
    """
    refuse(program, settings)
    module = ConditionalProgram(program, settings)
    names = input_names(program)
    dynamic = program.signature.dynamic
    if single and dynamic["batch"][0] > 1:
        raise ExportError("this target takes one row", got=f"a model that takes {dynamic['batch'][0]} rows or more")
    dynamic = {**dynamic, "batch": (1, 1)} if single else dynamic
    example = dict(zip(names, example_of(program, dynamic), strict=True))
    shapes = {n: free_axes(leaf.shape, dynamic) for n, leaf in zip(names, program.signature.inputs, strict=True)}
    if settings_are_inputs:
        values = {n: getattr(module, n) for n in module.settings}
        example |= values
        shapes |= {n: {} for n in values}
        module.take_settings()
    return traced(module, example, shapes)


def traced(module: nn.Module, example: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> ExportedProgram:
    """A module through `torch.export`; one input is a positional argument, several are given by name.

    Raises:
        ExportError: torch cannot export it, or an operator of this package is left in it.
    """
    args, kwargs = (tuple(example.values()), {}) if len(example) == 1 else ((), dict(example))
    try:
        with torch.no_grad():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dict(shapes), strict=False)
    except EecompileError:
        raise
    except Exception as error:  # torch.export raises many unrelated types
        raise ExportError(
            "torch.export could not trace the program",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            hint="a stage depends on how many rows it has in a way that torch cannot follow; fast.save keeps the program",
        ) from error
    _check_plain(exported)
    return exported


def signed(forward: Callable[[dict[str, Tensor]], Any], names: Sequence[str]) -> Callable[..., Any]:
    """A `forward` whose arguments have these names, which become those of the exported program."""

    def call(*args: Tensor, **kwargs: Tensor) -> Any:
        return forward(dict(zip(names, args, strict=False)) | kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    return call


def refuse(program: Program, settings: Settings) -> None:
    """Raises `ExportError` where the program has a part without an exported form."""
    if program.capture.front_end == "blocks":
        raise ExportError(
            "a program captured as blocks cannot be exported: its blocks are the model's own Python code, not a graph",
            wanted='a program captured with capture="export"',
            hint="compile the model without capture=",
        )
    if any(c.live for c in program.choices) and settings.halts:
        raise ExportError(
            "halting at each position cannot be exported: how many positions are still active is known on the host only",
            wanted="halting of whole rows, exits, gates, widths or branches",
            hint="compile with per_token=False, or close it first with fast.set_halting_threshold(2.0)",
        )


def plan(program: Program, settings: Settings, keep_thresholds: bool = False) -> Schedule:
    """The schedule under these settings; an exported program reports its exits alone."""
    alone = program.replace(reports=())
    return schedule(alone, settings.open_exits, True, possible(program, settings), keep_thresholds=keep_thresholds)


# ------------------------------------------------------------------ names


def input_names(program: Program) -> tuple[str, ...]:
    """The model's input tensors by the names that they have in exported programs, in order."""
    return distinct(leaf.path for leaf in program.signature.inputs)


def output_names(program: Program) -> tuple[str, ...]:
    """The exported program's outputs by name, in order; `exit_index` and `confidence` come last."""
    return distinct([*(leaf.path for leaf in program.signature.outputs), "exit_index", "confidence"])


def distinct(paths: Iterable[str]) -> tuple[str, ...]:
    found: list[str] = []
    for path in paths:
        name = re.sub(r"\W+", "_", path).strip("_") or "tensor"
        name = f"_{name}" if name[0].isdigit() else name
        while name in found:
            name += "_"
        found.append(name)
    return tuple(found)


# ------------------------------------------------------------------ what is traced


class Holder(nn.Module):
    """Holds the tensors of graphs, every parameter once, under the name that it has in the model."""

    def __init__(
        self, *graphs: fx.GraphModule | None, settings: Settings, always: Sequence[str] = (), device: Any = None
    ) -> None:
        super().__init__()
        self.names: dict[Any, str] = {}
        for name in always:
            self._hold(name, torch.empty(0, device=device), settings)
        for name, tensor in tensors_of(*graphs).values():
            self._hold(name, tensor, settings)
        self.eval()

    def tensors(self, without: Sequence[str] = ()) -> dict[Any, Tensor]:
        """What `Traced` reads."""
        return {key: facts.attribute(self, name) for key, name in self.names.items() if name not in without}

    def _hold(self, name: str, tensor: Tensor, settings: Settings) -> None:
        key = _key(name, tensor)
        if key in self.names:
            return
        while name in self.names.values():
            name += "_"
        if key in BUFFERS:
            name, tensor = key, settings.tensors(tensor.device)[key].clone()
        holder: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(last, nn.Parameter(tensor.detach(), requires_grad=False))
        else:
            holder.register_buffer(last, tensor.detach())
        self.names[key] = name


class Whole(Holder):
    """One graph as a module whose inputs have these names."""

    def __init__(self, module: fx.GraphModule, settings: Settings, names: Sequence[str]) -> None:
        super().__init__(module, settings=settings)
        self.forward = signed(lambda given: tuple(Traced(module, self.tensors()).run(*(given[n] for n in names))), names)


class ConditionalProgram(Holder):
    """The schedule as one module with conditions."""

    def __init__(self, program: Program, settings: Settings) -> None:
        planned = plan(program, settings, keep_thresholds=True)
        graphs = [g for s in planned.segments for g in (s.module, s.head)]
        graphs.append(None if program.prediction.tail is None else program.prediction.tail.module)
        # decisions read the thresholds, whatever else does
        always = (THRESHOLDS_BUFFER,) if settings.open_exits else ()
        super().__init__(*graphs, settings=settings, always=always, device=facts.device_of(program.graph_module))
        self.program, self.schedule = program, planned
        self.settings = tuple(name for name in BUFFERS if name in self.names)
        self._sign(())

    def take_settings(self) -> None:
        """Makes the settings inputs after the model's own, in the order of `settings`."""
        for name in self.settings:
            delattr(self, name)
        self._sign(self.settings)

    def _sign(self, settings: Sequence[str]) -> None:
        names = input_names(self.program)

        def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return self._run([given[n] for n in names], {n: given[n] for n in settings})

        self.forward = signed(run, (*names, *settings))

    def _run(self, flat: Sequence[Tensor], settings: dict[Any, Tensor]) -> tuple[Tensor, ...]:
        tensors = self.tensors(without=tuple(settings)) | settings
        signature, at = self.program.signature, self.program.prediction.index or 0
        first, *later = self.schedule.segments
        pool: dict[Any, Tensor] = dict(zip((v.node for v in first.inputs), flat, strict=True))
        pool |= dict(zip(_gives(first, signature), self._stage(first, flat, tensors), strict=True))
        index: Any = self._place(first)
        if later:
            pool |= _going_on(pool[CONFIDENCE], self._threshold(first, tensors))
        for segment in later:
            index = torch.where(pool[STAY], self._place(segment), index)
            pool |= self._later(segment, pool, flat, tensors)
        sure = pool[CONFIDENCE]
        index = index if later else torch.full_like(sure, index, dtype=torch.int64)
        axis = signature.outputs[at].batch_axis
        scores = pool[PREDICTION].movedim(0, axis) if axis else pool[PREDICTION]
        slots = () if self.program.prediction.tail is None else self.program.prediction.tail.slots
        leaves = [
            pool[i] if i in pool else scores if i == at or i in slots else self._blank(i, flat)
            for i in range(len(signature.outputs))
        ]
        if self.program.prediction.tail is not None:
            values = Traced(self.program.prediction.tail.module, tensors).run(scores, *flat)
            for i, value in zip(slots, values, strict=True):
                leaves[i] = value
        return (*leaves, index, torch.where(sure.isnan(), 0.0, sure))

    def _inputs(self) -> list[fx.Node]:
        return facts.placeholders(self.schedule.segments[0].module)

    def _place(self, segment: Segment) -> int:
        return len(self.program.exits) if segment.exit is None else segment.exit

    def _threshold(self, segment: Segment, tensors: Tensors) -> Tensor:
        assert segment.exit is not None  # that is the last one
        return tensors[THRESHOLDS_BUFFER][segment.exit]

    def _blank(self, i: int, flat: Sequence[Tensor]) -> Tensor:
        """Output leaf `i` where no segment gives it: NaN, or 0 where its dtype has none."""
        leaf = self.program.signature.outputs[i]
        inputs = self.program.signature.inputs
        named = {n: t.shape[a] for t, x in zip(flat, inputs, strict=True) for a, n in enumerate(x.shape)}
        if any(isinstance(s, str) and s not in named for s in leaf.shape):
            raise ExportError(
                "an output has a size that is computed, and no row may reach it", where=leaf.path, got=leaf.describe()
            )
        shape = [s if isinstance(s, int) else named[s] for s in leaf.shape]
        return torch.full(shape, _nothing(leaf.dtype), dtype=leaf.dtype, device=flat[0].device)

    # -------------------------------------------------------------- stages

    def _stage(self, segment: Segment, taken: Sequence[Tensor], tensors: Tensors) -> list[Tensor]:
        """One segment on n rows: live values and states to what `_gives` names, in order."""
        wanted = self.program.prediction_leaf
        values = list(Traced(segment.module, tensors).run(*taken))
        if segment.exit is None:
            sure, *leaves, scores = values
            rows = scores.movedim(wanted.batch_axis, 0) if wanted.batch_axis else scores
            return [rows.to(wanted.dtype), sure, *leaves]
        if segment.head is None:
            return [values[0].to(wanted.dtype), *values[1:]]
        sure, *rest = values
        count = len(segment.leaves) + len(segment.outputs)
        scores = self._sent(segment, sure >= self._threshold(segment, tensors), rest[count:], tensors)
        return [scores.to(wanted.dtype), sure, *rest[:count]]

    def _sent(self, segment: Segment, leaves: Tensor, reads: Sequence[Tensor], tensors: Tensors) -> Tensor:
        """The head of an exit that a router sends rows to, for those rows; zeros for the others."""
        assert segment.head is not None
        sizes = _sizes(facts.placeholders(segment.head), reads)
        into = _zeros(facts.output_leaves(segment.head)[0], 0, leaves, sizes)
        return run_arm(leaves, (into,), segment.head, reads, segment.head_axes, (0,), tensors)[0]

    def _later(
        self, segment: Segment, pool: Mapping[Any, Tensor], flat: Sequence[Tensor], tensors: Tensors
    ) -> dict[Any, Tensor]:
        """A segment after the first: what it gives by name, for the rows that `STAY` [B] marks, in tensors of all rows.

        The other rows keep their prediction, confidence and states; of all else they have zeros, and NaN of an output leaf.
        Which rows go on after it is found inside the condition too: where it is not run, none does.
        """
        stay, last = pool[STAY], segment.exit is None
        gives = _gives(segment, self.program.signature)
        takes: list[tuple[Any, int | None]] = [(v.node, v.batch_axis) for v in segment.inputs]
        takes += [(("state", j), 0) for j in range(segment.takes_states)]
        names = [*(n for n, _ in takes), PREDICTION, CONFIDENCE]
        # what a segment hands on as it took it stays where it is
        new = [n for n in gives if n not in pool or isinstance(n, tuple)]
        lives = facts.placeholders(segment.module)[: len(segment.inputs)]
        known = {e for n in lives for e in facts.shape(n)}
        missing = _symbols(gives[n][1] for n in new if not isinstance(n, tuple)) - known
        sized = [(n, t) for n, t in zip(self._inputs(), flat, strict=True) if missing & _symbols([n])]
        keys: dict[Any, Any] = dict(tensors_of(segment.module, segment.head))
        keys |= {} if last else {THRESHOLDS_BUFFER: None}
        data = (stay, *(pool[n] for n in names), *(t for _, t in sized))

        def parts(operands: Sequence[Tensor]) -> tuple[dict[Any, Tensor], dict[Any, list[Any]]]:
            """What comes in by name, and the shapes of what is new."""
            before, sources = dict(zip(names, operands[1:], strict=False)), operands[1 + len(names) : len(data)]
            sizes = _sizes([n for n, _ in sized], sources) | _sizes(lives, [before[v.node] for v in segment.inputs])
            shapes = {n: _shape(gives[n][1], gives[n][0], operands[0], sizes) for n in new if not isinstance(n, tuple)}
            return before, {n: list(before[n].shape) if isinstance(n, tuple) else shapes[n] for n in new}

        def filled(name: Any, shape: Sequence[Any]) -> Tensor:
            dtype = facts.value(gives[name][1]).dtype
            fill = _nothing(dtype) if isinstance(name, int) else 0
            return torch.full(shape, fill, dtype=dtype, device=stay.device)

        def deeper(*operands: Tensor) -> tuple[Tensor, ...]:
            before, shapes = parts(operands)
            rows = positions(operands[0])
            taken = [selected(before[n], a, rows) for n, a in takes]
            inner = dict(zip(keys, operands[len(data) :], strict=True))
            values = self._stage(segment, taken, inner)
            done = []
            for (name, (axis, _)), value in zip(gives.items(), values, strict=True):
                if name not in shapes:
                    continue
                if axis is None:
                    done.append(value.clone())
                else:
                    into = before[name] if isinstance(name, tuple) else filled(name, shapes[name])
                    done.append(placed(into, axis, rows, value))
            if not last:
                going_on = _going_on(values[list(gives).index(CONFIDENCE)], self._threshold(segment, inner))
                done += [placed(operands[0], 0, rows, going_on[STAY]), going_on[ANY]]
            return tuple(done)

        def stop(*operands: Tensor) -> tuple[Tensor, ...]:
            before, shapes = parts(operands)
            kept = [before[n].clone() if isinstance(n, tuple) else filled(n, s) for n, s in shapes.items()]
            return (*kept, *(() if last else (operands[0].clone(), torch.zeros((), dtype=torch.bool, device=stay.device))))

        sizes = [*parts(data)[1].values(), *(() if last else (stay.shape, ()))]
        found = either(pool[ANY], deeper, stop, (*data, *(tensors[key] for key in keys)), sizes)
        return dict(zip([*new, *(() if last else (STAY, ANY))], found, strict=True))


PREDICTION, CONFIDENCE = ("prediction",), ("confidence",)
STAY, ANY = ("stay",), ("any",)
"""Which rows go on [B], and whether one does []."""


def _going_on(sure: Tensor, threshold: Tensor) -> dict[Any, Tensor]:
    stay = ~(sure >= threshold)
    return {STAY: stay, ANY: stay.any()}


def _gives(segment: Segment, signature: Signature) -> dict[Any, tuple[int | None, fx.Node]]:
    """What a segment gives, in order, each with its batch axis and the node that has its shape.

    Its names: `PREDICTION` with its rows first, `CONFIDENCE`, states as `("state", j)`, output leaves by their index, live
    values by their node.
    """
    nodes = facts.output_leaves(segment.module)
    names: list[tuple[Any, int | None]] = [(PREDICTION, 0), (CONFIDENCE, 0)]
    names += [(("state", j), 0) for j in range(segment.gives_states)]
    names += [(i, signature.outputs[i].batch_axis) for i in segment.leaves]
    names += [(v.node, v.batch_axis) for v in segment.outputs]
    if segment.exit is None:
        nodes = [nodes[-1], *nodes[:-1]]
    elif segment.head is not None:
        nodes = [*facts.output_leaves(segment.head), *nodes[: len(names) - 1]]
    return {name: (axis, node) for (name, axis), node in zip(names, nodes, strict=True)}


def either(
    condition: Tensor,
    if_true: Callable[..., tuple[Tensor, ...]],
    if_false: Callable[..., tuple[Tensor, ...]],
    operands: Sequence[Tensor],
    shapes: Sequence[Sequence[Any]],
) -> tuple[Tensor, ...]:
    """`torch.cond` with outputs of these shapes; the first operand is the mask [n] of rows.

    Its graphs need distinct inputs: an operand that stands there twice is handed over once, and one that shares memory with
    an earlier one, as a view does, is copied. It cannot see that both sides have equal strides where these depend on a size
    that is computed: such an axis comes first.
    """
    first = [next((i for i, s in enumerate(shape) if _is_computed(s)), 0) for shape in shapes]
    distinct = list({id(t): t for t in operands}.values())
    place = {id(t): i for i, t in enumerate(distinct)}
    seen: set[Any] = set()
    for i, t in enumerate(distinct):
        memory = t.untyped_storage()._cdata
        distinct[i] = t.clone() if memory in seen else t
        seen.add(memory)
    order = [place[id(t)] for t in operands]

    def spread(branch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            values = branch(*(given[i] for i in order))
            return tuple(
                v.movedim(i, 0).clone(memory_format=torch.contiguous_format) if i else v
                for v, i in zip(values, first, strict=True)
            )

        return run

    found = torch.ops.higher_order.cond(condition, spread(if_true), spread(if_false), tuple(distinct))
    if one_row(operands[0]):  # what a condition of ExecuTorch gives lies in memory that the next condition writes to
        found = tuple(v.clone() for v in found)
    return tuple(v.movedim(0, i) if i else v for v, i in zip(found, first, strict=True))


def _is_computed(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_Atom


def positions(mask: Tensor) -> Tensor | None:
    """Positions [m] int64 of the rows that a mask [n] marks, None where n is 1; only called where it marks one."""
    if one_row(mask):
        return None
    rows = mask.nonzero().squeeze(-1)
    torch._check(rows.shape[0] > 0)  # type: ignore[no-untyped-call]  # operators ask whether they are given nothing
    return rows


def one_row(mask: Tensor) -> bool:
    """Whether a mask [n] is of a single row, whatever the inputs."""
    count: Any = mask.shape[0]
    return isinstance(count, int) and count == 1


def selected(t: Tensor, axis: int | None, rows: Tensor | None) -> Tensor:
    return t if axis is None or rows is None else t.index_select(axis, rows)


def placed(into: Tensor, axis: int, rows: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if rows is None else into.index_copy(axis, rows, value)


class Traced(fx.Interpreter):
    """Runs a graph on traced tensors: operators by their plain definitions, regions that run on some rows as conditions."""

    def __init__(self, module: fx.GraphModule, tensors: Tensors) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.tensors = tensors

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            module = facts.attribute(self.module, str(n.target))
            if isinstance(module, Partition):
                return self._partition(n, module)
        return super().run_node(n)

    def _partition(self, n: fx.Node, module: Partition) -> tuple[Tensor, ...]:
        """Each row through the arm that it takes; the others have what goes past the region."""
        (index, past, *inputs), _ = self.fetch_args_kwargs_from_env(n)
        arms = zip(module.arms, module.graphs(), module.takes, strict=True)
        result: tuple[Tensor, ...] | None = past
        if result is None:
            sizes = _sizes(n.all_input_nodes, (self.env[a] for a in n.all_input_nodes))
            items = sorted(n.users, key=lambda item: int(str(item.args[1])))
            result = tuple(_zeros(item, axis, index, sizes) for item, axis in zip(items, module.out_axes, strict=True))
        for k, body, takes in arms:
            taken, axes = [inputs[i] for i in takes], [module.axes[i] for i in takes]
            mask = index == k if index.dtype == torch.int64 else is_open(index) if k else ~is_open(index)
            result = run_arm(mask, result, body, taken, axes, module.out_axes, self.tensors)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = facts.attribute(self.module, str(target))
        return self.tensors[_key(str(target), value)] if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return PLAIN.get(target, target)(*args, **kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = facts.attribute(self.module, str(target))
        if isinstance(module, fx.GraphModule):
            return Traced(module, self.tensors).run(*args)
        given = {n: self.tensors[_key(n, t)] for n, t in _state(module)}
        return torch.func.functional_call(module, given, args, kwargs)


def run_arm(
    mask: Tensor,
    into: Sequence[Tensor],
    body: fx.GraphModule,
    inputs: Sequence[Tensor],
    axes: Sequence[int | None],
    out_axes: Sequence[int],
    tensors: Tensors,
) -> tuple[Tensor, ...]:
    """`into` with what `body` gives for the rows that `mask` [n] marks; the body is not run where there is none."""
    keys = tensors_of(body)
    count, n_inputs = len(into), len(inputs)

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        mask, kept, given = operands[0], operands[1 : 1 + count], operands[1 + count : 1 + count + n_inputs]
        rows = positions(mask)
        taken = [selected(t, a, rows) for t, a in zip(given, axes, strict=True)]
        inner = dict(zip(keys, operands[1 + count + n_inputs :], strict=True))
        values = Traced(body, inner).run(*taken)
        return tuple(placed(x, a, rows, y) for x, y, a in zip(kept, values, out_axes, strict=True))

    def keep(*operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in operands[1 : 1 + count])

    operands = (mask, *into, *inputs, *(tensors[key] for key in keys))
    return either(mask.any(), run, keep, operands, [x.shape for x in into])


def _sizes(nodes: Iterable[fx.Node], given: Iterable[Any]) -> dict[Any, Any]:
    """The dynamic sizes of nodes, as they are in the tensors that are given for them."""
    found: dict[Any, Any] = {}
    for node, tensor in zip(nodes, given, strict=True):
        if isinstance(tensor, Tensor):
            found |= {e: size for e, size in zip(facts.shape(node), tensor.shape, strict=True) if not e.is_Integer}
    return found


def _symbols(nodes: Iterable[fx.Node]) -> set[Any]:
    return {symbol for n in nodes for e in facts.shape(n) for symbol in e.free_symbols}


def _shape(like: fx.Node, axis: int | None, rows: Tensor, sizes: Mapping[Any, Any]) -> list[Any]:
    """The shape that `like` has for the `rows` [n] along `axis`."""
    return [
        rows.shape[0] if i == axis else int(e) if e.is_Integer else sizes[e] if e in sizes else _computed(e, like, sizes)
        for i, e in enumerate(facts.shape(like))
    ]


def _zeros(like: fx.Node, axis: int | None, rows: Tensor, sizes: Mapping[Any, Any]) -> Tensor:
    return torch.zeros(_shape(like, axis, rows, sizes), dtype=facts.value(like).dtype, device=rows.device)


def _computed(size: sympy.Expr, like: fx.Node, sizes: Mapping[Any, Any]) -> Any:
    """A size that is computed from others."""
    if not size.free_symbols <= sizes.keys():
        raise ExportError("a branch gives a size that none of its inputs has", where=like.name, got=str(size))
    return sympy_interp(PythonReferenceAnalysis, {e: sizes[e] for e in size.free_symbols}, size)


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0


# ------------------------------------------------------------------ tensors


def _key(name: str, tensor: Tensor) -> Any:
    """What a parameter or buffer is known by: a setting by its name, of which every graph has a copy, others by identity."""
    last = name.rpartition(".")[2]
    return last if last in BUFFERS else id(tensor)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def tensors_of(*modules: fx.GraphModule | None) -> dict[Any, tuple[str, Tensor]]:
    """The tensors that graphs and their regions read, with their names; two may have one name."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for module in modules:
        if module is None:
            continue
        for n in module.graph.nodes:
            if n.op not in ("get_attr", "call_module"):
                continue
            name = str(n.target)
            value = facts.attribute(module, name)
            if isinstance(value, Tensor):
                found.setdefault(_key(name, value), (name, value))
            elif isinstance(value, fx.GraphModule | Partition):
                found |= tensors_of(*_bodies(value)) | found
            elif n.op == "call_module":
                found |= {_key(inner, t): (f"{name}.{inner}", t) for inner, t in _state(value)} | found
    return found


def _bodies(module: nn.Module) -> list[fx.GraphModule]:
    if isinstance(module, Partition):
        return module.graphs()
    return [module] if isinstance(module, fx.GraphModule) else []


# ------------------------------------------------------------------ sizes


Sizes = Mapping[str, tuple[int, int | None]]
"""The least and the largest value of every dynamic size."""


def example_of(program: Program, dynamic: Sizes) -> list[Tensor]:
    """Inputs to trace with; their values are never read.

    Lengths are short enough for tables of positions, and long enough that no stage shrinks one to 1, which would be fixed.
    """
    chosen = {}
    for k, (name, (low, high)) in enumerate(dynamic.items()):
        size = max(2 * low, 5 + 12 * k)
        chosen[name] = low if low == high else max(size, 2) if high is None else min(max(size, 2), high)
    device = facts.device_of(program.graph_module)
    found = []
    for leaf in program.signature.inputs:
        shape = [s if isinstance(s, int) else chosen[s] for s in leaf.shape]
        found.append(torch.zeros(shape, dtype=leaf.dtype, device=device))
    return found


def free_axes(shape: Sequence[int | str], dynamic: Sizes) -> dict[int, Any]:
    """The dynamic sizes of a shape, as `torch.export` wants them."""
    found: dict[int, Any] = {}
    for axis, name in enumerate(shape):
        if isinstance(name, str):
            low, high = dynamic.get(name, (0, None))
            if low != high:
                found[axis] = Dim.DYNAMIC(min=low, max=high)
    return found


def _check_plain(exported: ExportedProgram) -> None:
    for module in exported.graph_module.modules():
        for n in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if getattr(n.target, "namespace", "") == "eecompile":
                raise ExportError("an operator of eecompile has no plain form", where=n.name, got=str(n.target))
