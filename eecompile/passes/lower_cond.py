"""Lowers the schedule to one exported program of plain ATen: savings that survive outside of Python.

After each stage stands its decision and `torch.cond(is a row left, deeper, stop)`. Inside `deeper` the surviving rows are
found and gathered, the next stage runs, and its results are scattered back to `[B, ...]`, so that no data-dependent size
leaves a branch. The condition is one scalar: an exit saves at every batch size, not at batch 1 alone. Gates, widths, halting
steps and branches have the same form, "does a row take this arm".

Both sides of a condition give equal ranks and dtypes, and neither gives an input back as it is: what passes through is
cloned. Weights are operands of the conditions, not constants of their graphs, so that each is stored once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

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

# Operators, and definitions that may launch a kernel, by their definitions in plain torch.
PLAIN: dict[Any, Callable[..., Any]] = {
    ops.confidence: confidence.confidence,
    ops.halt: halt.halt,
    torch.ops.eecompile.choose.default: choose.choose,
    torch.ops.eecompile.confidence.default: confidence.confidence,
    torch.ops.eecompile.gate.default: gate.gate,
    torch.ops.eecompile.halt.default: halt.halt,
}

Tensors = Mapping[Any, Tensor]
"""The traced value of every parameter, buffer and setting; see `_key`."""


def lower_cond(program: Program, settings: Settings, settings_are_inputs: bool = False) -> ExportedProgram:
    """One `ExportedProgram` that computes what the compiled module computes, and saves what it saves.

    Exits that these settings close, gates that they hold open or closed, and branches that they close are not in it. The
    numbers of all others can be set later: they are tensors float32 [slots] under the names in
    `eecompile.ir.settings.BUFFERS`.

    Args:
        settings_are_inputs: Whether these tensors are inputs after the model's own; else buffers, as they are set now.

    Returns:
        A program from the model's input tensors to its output tensors, `exit_index` [B] int64 and `confidence` [B]
        float32. One input is a positional argument; several are given by name.

    Raises:
        ExportError: The program has a part without an exported form, or torch cannot export it.
    """
    refuse(program, settings)
    module = ConditionalProgram(program, settings)
    names = input_names(program)
    example = dict(zip(names, example_of(program), strict=True))
    shapes = {n: free_axes(program, leaf.shape) for n, leaf in zip(names, program.signature.inputs, strict=True)}
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
    if any(h.per_token for h in program.choices.halts) and settings.halts:
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
        at = self.program.prediction.index or 0
        blanks = {i: self._blank(i, flat) for s in self.schedule.segments[1:] for i in s.leaves}
        prediction, index, sure, *rest = self._from(0, flat, (), blanks, tensors)
        axis = self.program.signature.outputs[at].batch_axis
        scores = prediction.movedim(0, axis) if axis else prediction
        given = dict(zip(self._leaves_from(0), rest, strict=True)) | {at: scores}
        later = () if self.program.prediction.tail is None else self.program.prediction.tail.slots
        leaves = [
            given[i] if i in given else scores if i in later else self._blank(i, flat)
            for i in range(len(self.program.signature.outputs))
        ]
        if self.program.prediction.tail is not None:
            values = Traced(self.program.prediction.tail.module, tensors).run(scores, *flat)
            for i, value in zip(self.program.prediction.tail.slots, values, strict=True):
                leaves[i] = value
        return (*leaves, index, torch.nan_to_num(sure, nan=0.0))

    def _leaves_from(self, k: int) -> list[int]:
        return [i for s in self.schedule.segments[k:] for i in s.leaves]

    def _blank(self, i: int, flat: Sequence[Tensor]) -> Tensor:
        """Output leaf `i` where no row reached it: NaN, or 0 where its dtype has none."""
        leaf = self.program.signature.outputs[i]
        inputs = self.program.signature.inputs
        named = {n: t.shape[a] for t, x in zip(flat, inputs, strict=True) for a, n in enumerate(x.shape)}
        if any(isinstance(s, str) and s not in named for s in leaf.shape):
            raise ExportError(
                "an output has a size that is computed, and no row may reach it", where=leaf.path, got=leaf.describe()
            )
        shape = [s if isinstance(s, int) else named[s] for s in leaf.shape]
        fill = float("nan") if leaf.dtype.is_floating_point else 0
        return torch.full(shape, fill, dtype=leaf.dtype, device=flat[0].device)

    # -------------------------------------------------------------- stages

    def _from(
        self, k: int, live: Sequence[Tensor], states: Sequence[Tensor], blanks: Mapping[int, Tensor], tensors: Tensors
    ) -> tuple[Tensor, ...]:
        """Segment `k` and all after it, on n rows.

        Args:
            blanks: Leaves [n, ...] of later segments, as they are where no row gets there.

        Returns:
            Prediction [n, ...], exit index [n], confidence [n], and the leaves of these segments in order.
        """
        segment, signature = self.schedule.segments[k], self.program.signature
        wanted = signature.outputs[self.program.prediction.index or 0]
        values = Traced(segment.module, tensors).run(*live, *states[: segment.takes_states])
        if segment.exit is None:
            sure, *leaves, prediction = values
            rows = prediction.movedim(wanted.batch_axis, 0) if wanted.batch_axis else prediction
            index = torch.full_like(sure, len(self.program.exits), dtype=torch.int64)
            return (rows.to(wanted.dtype), index, sure, *leaves)
        at = segment.decision
        leaves, rest = values[at : at + len(segment.leaves)], values[at + len(segment.leaves) :]
        handed, reads = rest[: len(segment.outputs)], rest[len(segment.outputs) :]
        sure = values[0] if segment.head is not None else values[1]
        stay = ~(sure >= self._threshold(segment.exit, tensors))
        scores = values[0] if segment.head is None else self._sent(segment, ~stay, reads, tensors)
        scores = scores.to(wanted.dtype)
        after = self._after(k, handed, values[2:at], stay, scores, sure, blanks, tensors)
        return (*after[:3], *leaves, *after[3:])

    def _threshold(self, exit_index: int, tensors: Tensors) -> Tensor:
        return tensors[THRESHOLDS_BUFFER][exit_index]

    def _sent(self, segment: Segment, leaves: Tensor, reads: Sequence[Tensor], tensors: Tensors) -> Tensor:
        """The head of an exit that a router sends rows to, for those rows; zeros for the others."""
        assert segment.head is not None
        nodes = zip(facts.placeholders(segment.head), reads, strict=True)
        into = _zeros(facts.output_leaves(segment.head)[0], nodes, 0, leaves)
        return run_arm(leaves, (into,), segment.head, reads, segment.head_axes, (0,), tensors)[0]

    def _after(
        self,
        k: int,
        live: Sequence[Tensor],
        states: Sequence[Tensor],
        stay: Tensor,
        scores: Tensor,
        sure: Tensor,
        blanks: Mapping[int, Tensor],
        tensors: Tensors,
    ) -> tuple[Tensor, ...]:
        """What every row has, some from the exit of segment `k` and the others from later segments."""
        segments, outputs = self.schedule.segments, self.program.signature.outputs
        later = self._leaves_from(k + 1)
        exit_index = segments[k].exit
        assert exit_index is not None
        axes = [v.batch_axis for v in segments[k].outputs]
        keys: dict[Any, Any] = dict(tensors_of(*(g for s in segments[k + 1 :] for g in (s.module, s.head))))
        keys |= {} if segments[k + 1].exit is None else {THRESHOLDS_BUFFER: None}
        data = (stay, scores, sure, *live, *states, *(blanks[i] for i in later))
        n_live, n_states = len(live), len(states)

        def parts(operands: Sequence[Tensor]) -> tuple[Any, ...]:
            stay, scores, sure, *more = operands[: len(data)]
            live, states, blank = more[:n_live], more[n_live : n_live + n_states], more[n_live + n_states :]
            return stay, scores, sure, live, states, dict(zip(later, blank, strict=True))

        def deeper(*operands: Tensor) -> tuple[Tensor, ...]:
            stay, scores, sure, live, states, blank = parts(operands)
            rows = positions(stay)
            taken = [t if a is None else t.index_select(a, rows) for t, a in zip(live, axes, strict=True)]
            surviving = [s.index_select(0, rows) for s in states]
            below = {i: b if (a := outputs[i].batch_axis) is None else b.index_select(a, rows) for i, b in blank.items()}
            inner = dict(zip(keys, operands[len(data) :], strict=True))
            prediction, index, surest, *leaves = self._from(k + 1, taken, surviving, below, inner)
            done = [
                scores.index_copy(0, rows, prediction),
                torch.full_like(stay, exit_index, dtype=torch.int64).index_copy(0, rows, index),
                sure.index_copy(0, rows, surest),
            ]
            for i, leaf in zip(later, leaves, strict=True):
                axis = outputs[i].batch_axis
                done.append(leaf.clone() if axis is None else blank[i].index_copy(axis, rows, leaf))
            return tuple(done)

        def stop(*operands: Tensor) -> tuple[Tensor, ...]:
            stay, scores, sure, _, _, blank = parts(operands)
            index = torch.full_like(stay, exit_index, dtype=torch.int64)
            return (scores.clone(), index, sure.clone(), *(b.clone() for b in blank.values()))

        return either(stay.any(), deeper, stop, (*data, *(tensors[key] for key in keys)))


def either(
    condition: Tensor,
    if_true: Callable[..., tuple[Tensor, ...]],
    if_false: Callable[..., tuple[Tensor, ...]],
    operands: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """`torch.cond`; an operand that stands there twice is handed over once, as its graphs need distinct inputs."""
    distinct = list({id(t): t for t in operands}.values())
    place = {id(t): i for i, t in enumerate(distinct)}
    order = [place[id(t)] for t in operands]

    def spread(branch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: branch(*(given[i] for i in order))

    found: tuple[Tensor, ...] = torch.ops.higher_order.cond(condition, spread(if_true), spread(if_false), tuple(distinct))
    return found


def positions(mask: Tensor) -> Tensor:
    """Positions [m] int64 of the rows that a mask [n] marks; only called where it marks one."""
    rows = mask.nonzero().squeeze(-1)
    torch._check(rows.shape[0] > 0)  # type: ignore[no-untyped-call]  # operators ask whether they are given nothing
    return rows


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
            given = [(a, self.env[a]) for a in n.all_input_nodes]
            items = sorted(n.users, key=lambda item: int(str(item.args[1])))
            result = tuple(_zeros(item, given, axis, index) for item, axis in zip(items, module.out_axes, strict=True))
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
        taken = [t if a is None else t.index_select(a, rows) for t, a in zip(given, axes, strict=True)]
        inner = dict(zip(keys, operands[1 + count + n_inputs :], strict=True))
        values = Traced(body, inner).run(*taken)
        return tuple(x.index_copy(a, rows, y) for x, y, a in zip(kept, values, out_axes, strict=True))

    def keep(*operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in operands[1 : 1 + count])

    return either(mask.any(), run, keep, (mask, *into, *inputs, *(tensors[key] for key in keys)))


def _zeros(like: fx.Node, given: Iterable[tuple[fx.Node, Any]], axis: int, rows: Tensor) -> Tensor:
    """Zeros in the shape that `like` has for the `rows` [n]; its other dynamic sizes are those of given tensors."""
    value = facts.value(like)
    sizes: dict[Any, Any] = {}
    for node, tensor in given:
        if isinstance(tensor, Tensor):
            sizes |= dict(zip(facts.shape(node), tensor.shape, strict=False))
    shape: list[Any] = []
    for i, e in enumerate(facts.shape(like)):
        if i != axis and not e.is_Integer and e not in sizes:
            raise ExportError("a branch gives a size that none of its inputs has", where=like.name, got=str(e))
        shape.append(rows.shape[0] if i == axis else int(e) if e.is_Integer else sizes[e])
    return torch.zeros(shape, dtype=value.dtype, device=rows.device)


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


def example_of(program: Program) -> list[Tensor]:
    """Inputs to trace with; their values are never read."""
    chosen = {}
    for k, (name, (low, high)) in enumerate(program.signature.dynamic.items()):
        size = max(low, 5 + 2 * k)
        chosen[name] = low if low == high else max(size, 2) if high is None else min(max(size, 2), high)
    device = facts.device_of(program.graph_module)
    found = []
    for leaf in program.signature.inputs:
        shape = [s if isinstance(s, int) else chosen[s] for s in leaf.shape]
        found.append(torch.zeros(shape, dtype=leaf.dtype, device=device))
    return found


def free_axes(program: Program, shape: Sequence[int | str]) -> dict[int, Any]:
    """The dynamic sizes of a shape, as `torch.export` wants them."""
    found: dict[int, Any] = {}
    for axis, name in enumerate(shape):
        if isinstance(name, str):
            low, high = program.signature.dynamic.get(name, (0, None))
            if low != high:
                found[axis] = Dim.DYNAMIC(min=low, max=high)
    return found


def _check_plain(exported: ExportedProgram) -> None:
    for module in exported.graph_module.modules():
        for n in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if getattr(n.target, "namespace", "") == "eecompile":
                raise ExportError("an operator of eecompile has no plain form", where=n.name, got=str(n.target))
