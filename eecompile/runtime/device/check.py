"""Shows without a GPU that nothing in a device program needs the host between input and output.

Two ways, because each sees what the other does not. Every node of every stage is looked at: operators that are known to wait
for the device, to draw random numbers or to move data. Then every body of the program runs under fake tensors, which have
no values: an operator that asks for one is caught there, whatever its name. Last, the program itself is compared with what
CUDA permits in bodies of conditional nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from eecompile.ir.settings import BUFFERS
from eecompile.passes import facts
from eecompile.runtime.device.nodes import (
    ALL_ROWS,
    BUCKETS,
    CLOCK,
    PREDICTED,
    Body,
    DeviceProgram,
    If,
    Switch,
    While,
    bodies_of,
    makes,
    reads,
    writes,
)
from eecompile.runtime.device.watched import source_of

WAITS = frozenset(
    "_local_scalar_dense item is_nonzero equal allclose nonzero argwhere masked_select unique _unique _unique2 unique_dim "
    "unique_consecutive bincount histc _ctc_loss embedding_renorm_ linalg_inv linalg_inv_ex linalg_solve linalg_cholesky "
    "linalg_eigh linalg_svd linalg_lstsq nms _assert_scalar sym_constrain_range_for_size pin_memory".split()
)
"""Operators whose CUDA kernels read a value back, by name without overload."""
RANDOM = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_ uniform_ "
    "exponential_ native_dropout poisson rrelu".split()
)


@dataclass(frozen=True)
class Problem:
    """Something that keeps a program from running on the device alone.

    Attributes:
        where: Stage or body.
        node: Name of the graph's node, empty where it is the program itself.
        reason: What is wrong.
        source: Line of the model's code, where it is known.
    """

    where: str
    node: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.node + ': ' if self.node else ''}{self.reason}{f' ({self.source})' if self.source else ''}"
        )


@dataclass
class NoSync:
    """What `check_no_sync` found.

    Attributes:
        problems: Nothing where the program can run on the device alone.
        operators: Nodes that were looked at.
        bodies: Bodies of conditional nodes that were run under fake tensors.
        programs: The programs, one line each.
    """

    title: ClassVar[str] = "no synchronisation"
    problems: list[Problem] = field(default_factory=list)
    operators: int = 0
    bodies: int = 0
    programs: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        head = "ok" if self.ok else f"{len(self.problems)} problems"
        lines = [
            f"{self.title}: {head}; {self.operators} operators and {self.bodies} bodies in {len(self.programs)} programs"
        ]
        return "\n  ".join([*lines, *self.programs, *map(str, self.problems)])


def suspicious(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Nodes of a module that are known to need the host, with the reason."""
    for n in module.graph.nodes:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            continue
        name = n.target.overloadpacket.__name__
        if name in WAITS or n.target is torch.ops.aten.repeat_interleave.Tensor:
            yield n, f"{name} reads a value of a tensor on the host"
        elif name in RANDOM or (name == "dropout" and n.args[2]):
            yield n, f"{name} draws random numbers, whose generator the host moves on"
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and _by_mask(n) and not _fills(n):
            yield n, f"{name} with a mask needs to know on the host how many it selects"


def _by_mask(n: fx.Node) -> bool:
    indices = n.args[1] if len(n.args) > 1 else ()
    found = [facts.value(i) for i in indices if isinstance(i, fx.Node)] if isinstance(indices, list | tuple) else []
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in found)


def _fills(n: fx.Node) -> bool:
    """Whether one number goes to all that a mask selects: that is `masked_fill`, which needs no count."""
    if len(n.args) < 3 or (len(n.args) > 3 and n.args[3]) or n.kwargs.get("accumulate"):
        return False
    number = facts.value(n.args[2]) if isinstance(n.args[2], fx.Node) else None
    return isinstance(number, Tensor) and number.numel() == 1


def lint(program: DeviceProgram) -> list[str]:
    """What CUDA would refuse, or what reads memory that nothing wrote."""
    known = {b.name for b in program.buffers} | set(program.inputs) | {BUCKETS, ALL_ROWS}
    known |= set(BUFFERS)
    known |= {CLOCK, PREDICTED} if program.deadline else set()
    written = {b.name for b in program.buffers if b.fill is not None} | (known - {b.name for b in program.buffers})
    names = [b.name for b in program.buffers]
    found = [f"buffer {n} is there twice" for n in sorted({n for n in names if names.count(n) > 1})]
    missing = [n for n in ("output", "exit_index", "confidence") if n not in names]
    found += [f"there is no buffer {n}" for n in missing]
    _lint(program.nodes, known, written, found, program)
    return found


def _lint(body: Body, known: set[str], written: set[str], found: list[str], program: DeviceProgram) -> set[str]:
    """Checks a body; gives what is written after it whatever was decided."""
    known, written = set(known), set(written)
    for node in body:
        kind = type(node).__name__
        for name in reads(node):
            if name not in known:
                found.append(f"{kind} reads {name}, which is not known in its body")
            elif name not in written:
                found.append(f"{kind} reads {name}, which nothing has written")
        lost = [name for name in writes(node) if name not in known]
        found += [f"{kind} writes {name}, which is not known in its body" for name in lost]
        known |= set(makes(node))
        written |= set(makes(node)) | set(writes(node))
        inner = bodies_of(node)
        if isinstance(node, If | Switch | While) and (not inner or not all(inner)):
            found.append(f"{kind} on {node.control} has an empty body, which hangs older drivers")
        # A loop's switch holds one stage after the other; another switch holds one stage. Whatever its bucket was, a stage
        # has written: who reads comes only where it ran.
        size = len(program.buckets) if isinstance(node, Switch) and node.element == 0 else max(len(inner), 1)
        for start in range(0, len(inner), size):
            written_by_each = [_lint(b, known, written, found, program) for b in inner[start : start + size]]
            written |= set.intersection(*written_by_each)
        if isinstance(node, While) and not any(node.control in writes(n) for b in inner for n in _flat(b)):
            found.append(f"a loop on {node.control} never changes it")
    return written


def _flat(body: Body) -> Iterator[Any]:
    for node in body:
        yield node
        for inner in bodies_of(node):
            yield from _flat(inner)


def check_modules(modules: Sequence[fx.GraphModule], where: Sequence[str], report: NoSync) -> None:
    """Adds what `suspicious` finds."""
    for module, name in zip(modules, where, strict=True):
        report.operators += sum(n.op == "call_function" for n in module.graph.nodes)
        report.problems += [Problem(name, n.name, reason, source_of(n)) for n, reason in suspicious(module)]
