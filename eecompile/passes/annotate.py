"""Costs of nodes: FLOPs by torch's own counter, and measured time where it is asked for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from eecompile.errors import PassError
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Program

aten = torch.ops.aten
ROWS = 4  # counted at this batch and divided by it
DYNAMIC = 64  # a sequence length for counting, where the example gives none
# Views and element-wise operators count as 0 in torch's counter; skipping them keeps a 10,000-node graph quick.
COUNTED = (
    "linear", "conv", "matmul", "mm", "bmm", "addmm", "baddbmm", "attention", "lstm", "gru", "rnn", "einsum",
    "bilinear", "tensordot", "mv", "addmv", "dot", "outer",
)  # fmt: skip


@dataclass(frozen=True)
class Annotate(Pass):
    """Cost of each node for one row.

    Args:
        example: Flat inputs; sizes other than the batch are taken from them. None takes the traced sizes.
        measure: Also time every node on `example`; costs are then seconds instead of FLOPs where a pass weighs them.
        rounds: Timed runs; the median of each node counts.
    """

    name: ClassVar[str] = "annotate"
    ensures: ClassVar[frozenset[str]] = frozenset({"costs"})

    example: tuple[torch.Tensor, ...] | None = None
    measure: bool = False
    rounds: int = 5

    def run(self, program: Program) -> PassResult:
        gm = program.graph_module
        sizes = _sizes(gm, program, self.example)
        flops = count_flops(gm, sizes)
        if not any(flops.values()):  # no matrix product anywhere: fall back to elements written
            flops = {n.name: _elements(n, sizes) / ROWS for n in gm.graph.nodes if n.op == "call_function"}
        seconds: Mapping[str, float] = {}
        if self.measure:
            if self.example is None:
                raise PassError("measuring needs example inputs", hint="pass example_inputs to eecompile()")
            seconds = measure(gm, self.example, program.signature.batch_size(self.example), self.rounds)
        full = None
        if program.capture.models:
            own = facts.needed_for(facts.own_leaves(gm, program.signature))
            full = float(sum(flops.get(n.name, 0.0) for n in own))
        program = program.replace(flops=flops, seconds=seconds, full_flops=full)
        return PassResult(program, False, summary=f"{program.total_flops / 1e6:,.2f} MFLOPs a row")


def _sizes(gm: fx.GraphModule, program: Program, example: Sequence[torch.Tensor] | None) -> dict[sympy.Expr, int]:
    """A number for every symbol of the graph."""
    batch = facts.Batch(gm, program.signature)
    sizes: dict[sympy.Expr, int] = {}
    for i, n in enumerate(facts.placeholders(gm)):
        for axis, d in enumerate(facts.shape(n)):
            if d.is_Symbol and d != batch.symbol:
                hint = facts.value(n).shape[axis].node.hint
                sizes[d] = int(example[i].shape[axis] if example is not None else hint)
    sizes[batch.symbol] = ROWS
    return sizes


def _number(size: Any, sizes: Mapping[sympy.Expr, int]) -> int:
    e = facts.expression(size)
    if e.is_Integer:
        return int(e)
    e = e.subs(sizes)
    return int(e) if e.is_number else 1


def _elements(node: fx.Node, sizes: Mapping[sympy.Expr, int]) -> float:
    v = facts.value(node)
    if not isinstance(v, torch.Tensor):
        return 0.0
    count = 1
    for d in v.shape:
        count *= _number(d, sizes)
    return float(count)


def counting_sizes(
    program: Program, shape: Sequence[int | str], batch_axis: int | None, example: Sequence[torch.Tensor] | None
) -> list[int]:
    """Sizes of a value with ROWS rows and the example's lengths, for FLOPs to be counted on it."""
    lengths = {} if example is None else program.signature.lengths(example)
    return [ROWS if i == batch_axis else s if isinstance(s, int) else lengths.get(s, DYNAMIC) for i, s in enumerate(shape)]


def module_flops(module: torch.nn.Module, sizes: Sequence[int], dtype: torch.dtype) -> float:
    """FLOPs of a module of one input for one row, on meta tensors."""
    on_meta, x = copy.deepcopy(module).to("meta", dtype).eval(), torch.empty(sizes, dtype=dtype, device="meta")
    return flops_of(lambda: on_meta(x)) / ROWS


def count_flops(gm: fx.GraphModule, sizes: Mapping[sympy.Expr, int]) -> dict[str, float]:
    """FLOPs of each node for one row, by name."""
    known: dict[Any, float] = {}
    return {n.name: _node_flops(gm, n, sizes, known) for n in gm.graph.nodes if n.op in ("call_function", "call_module")}


def _node_flops(gm: fx.GraphModule, node: fx.Node, sizes: Mapping[sympy.Expr, int], known: dict[Any, float]) -> float:
    bodies = [
        facts.attribute(gm, str(a.target))
        for a in node.all_input_nodes
        if a.op == "get_attr" and isinstance(facts.attribute(gm, str(a.target)), fx.GraphModule)
    ]
    if bodies:  # a higher-order operator costs what its bodies cost
        return sum(_node_flops(b, n, sizes, known) for b in bodies for n in b.graph.nodes if n.op == "call_function")
    name = str(node.target)
    if not isinstance(node.target, torch._ops.OpOverload) or not any(c in name for c in COUNTED):
        return 0.0

    def concrete(a: fx.Node) -> Any:
        v = facts.value(a)
        if v is None and a.op == "get_attr":
            v = facts.attribute(gm, str(a.target))
        if isinstance(v, torch.SymInt):
            return _number(v, sizes)
        if isinstance(v, torch.Tensor):
            return torch.empty([_number(d, sizes) for d in v.shape], dtype=v.dtype, device="meta")
        return v

    args = fx.node.map_arg(node.args, concrete)
    kwargs = fx.node.map_arg(node.kwargs, concrete)
    key = (name, _key(args), _key(kwargs))
    if key not in known:
        known[key] = flops_of(lambda: node.target(*args, **kwargs)) / ROWS  # type: ignore[operator]
    return known[key]


def _key(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return (tuple(x.shape), x.dtype)
    if isinstance(x, list | tuple):
        return tuple(_key(v) for v in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _key(v)) for k, v in x.items()))
    return str(x)


def flops_of(call: Callable[[], Any]) -> float:
    """FLOPs of one call on meta tensors, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    return float(counter.get_total_flops())


def measure(gm: fx.GraphModule, example: Sequence[torch.Tensor], rows: int, rounds: int) -> dict[str, float]:
    """Median time of each node for one row, in seconds, on the device of `example`."""
    times: dict[str, list[float]] = {}

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op != "call_function":
                return super().run_node(n)
            _synchronize(example[0])
            start = time.perf_counter()
            out = super().run_node(n)
            _synchronize(example[0])
            times.setdefault(n.name, []).append(time.perf_counter() - start)
            return out

    with torch.no_grad():
        for _ in range(rounds + 1):
            Timed(gm).run(*example)
    return {n: sorted(t[1:])[len(t[1:]) // 2] / rows for n, t in times.items()}


def _synchronize(t: torch.Tensor) -> None:
    if t.is_cuda:
        torch.cuda.synchronize(t.device)
