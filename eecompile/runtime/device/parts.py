"""Splits a segment's module at what runs on some rows only: straight code, and regions with a decision about each row.

A region with widths and the branches of a router are a region for each width or branch, whose results meet in one value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.kernels.choose import is_open
from eecompile.passes import facts
from eecompile.passes.partition import Partition
from eecompile.runtime.device.fuse import Sent
from eecompile.runtime.device.nodes import THRESHOLDS


@dataclass(frozen=True)
class Straight:
    """Code that runs as it stands."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Conditional:
    """A region: `outputs` are what `inside` gives for open rows, and `past` for the others.

    Attributes:
        name: Of its lists.
        past: Empty where every row is open in one region or another that gives the same outputs.
        first: Whether it is the first of these; the others write into what is there.
        axes: Batch axis of each input, None without one.
        out_axes: Batch axis of each output.
    """

    name: str
    decision: str
    past: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inside: Parts
    axes: tuple[int | None, ...]
    out_axes: tuple[int, ...]
    first: bool = True


@dataclass(frozen=True)
class Parts:
    """A module in pieces; names are those of its graph's nodes after `prefix`."""

    inputs: tuple[str, ...]
    pieces: tuple[Straight | Conditional, ...]
    outputs: tuple[str, ...]


def split(module: fx.GraphModule, prefix: str) -> Parts:
    """The pieces of a module with a flat tuple of outputs, in the order in which they run."""
    nodes = [n for n in module.graph.nodes if n.op not in ("output", "placeholder", "get_attr")]
    wanted = [a for a in module.graph.output_node().args[0] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
    modules = {n: facts.attribute(module, str(n.target)) for n in nodes if n.op == "call_module"}
    calls = {n: m for n, m in modules.items() if isinstance(m, Partition | Sent)}
    items = {i for c in calls for i in c.users}
    runs: list[list[fx.Node] | fx.Node] = []
    for n in nodes:
        if n in items:
            continue
        if n in calls:
            runs.append(n)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(n)
        else:
            runs.append([n])
    constants = [n for n in wanted if n.op == "get_attr"]
    if constants and not (runs and isinstance(runs[-1], list)):
        runs.append([])
    pieces: list[Straight | Conditional] = []
    for k, run in enumerate(runs):
        if isinstance(run, list):
            later = set(nodes) - set(run) | {module.graph.output_node()}
            mine = set(run)
            given = [n for n in run if any(u in later for u in n.users)]
            given += constants if k == len(runs) - 1 else []
            pieces.append(_straight(module, run, mine, list(dict.fromkeys(given)), prefix))
        else:
            called = calls[run]
            pieces += _sent(run, called, prefix) if isinstance(called, Sent) else _arms(run, called, prefix)
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    return Parts(_names(inputs, prefix), tuple(pieces), _names(wanted, prefix))


def _names(nodes: Any, prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{n.name}" for n in nodes)


def _straight(module: fx.GraphModule, run: list[fx.Node], mine: set[fx.Node], given: list[fx.Node], prefix: str) -> Straight:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = list(dict.fromkeys(a for n in run for a in n.all_input_nodes if a not in mine and a.op != "get_attr"))
    for a in inputs:
        env[a] = graph.placeholder(a.name)
        env[a].meta = dict(a.meta)

    def resolve(a: fx.Node) -> fx.Node:
        if a not in env:  # an attribute, read where it is first needed
            env[a] = graph.node_copy(a)
        return env[a]

    for n in run:
        env[n] = graph.node_copy(n, resolve)
    graph.output(tuple(resolve(n) for n in given))
    return Straight(facts.module_of(module, graph, "Part"), _names(inputs, prefix), _names(given, prefix))


def _arms(call: fx.Node, partition: Partition, prefix: str) -> list[Straight | Conditional]:
    """A region for each arm that has a body, and before them who takes it; a gate's decision says that as it is."""
    asked, by, *inputs = call.args
    name, count = f"{prefix}{call.name}", len(partition.out_axes)
    past = () if by is None else _names(by, prefix)
    given = _names(inputs, prefix)
    gate = partition.arms == (1,)
    found: list[Straight | Conditional] = []
    if not gate:
        found.append(_choice([asked], list(partition.arms), on_arm, name, prefix))  # type: ignore[list-item]
    for i, (k, body, takes) in enumerate(zip(partition.arms, partition.graphs(), partition.takes, strict=True)):
        inner = name if gate else f"{name}.{k}"
        found.append(
            Conditional(
                name=inner,
                decision=_names([asked], prefix)[0] if gate else f"{name}.is_{k}",
                past=past if i == 0 else (),
                inputs=tuple(given[j] for j in takes),
                outputs=_given(call, count, prefix),
                inside=split(body, f"{inner}."),
                axes=tuple(partition.axes[j] for j in takes),
                out_axes=partition.out_axes,
                first=i == 0,
            )
        )
    return found


def _sent(call: fx.Node, sent: Sent, prefix: str) -> list[Straight | Conditional]:
    """Who is sent to an exit, and its head for these."""
    confidence, *values = call.args
    name = f"{prefix}{call.name}"
    choice = _choice([confidence], [sent.exit], to_exit, name, prefix, (THRESHOLDS,))  # type: ignore[list-item]
    head = Conditional(
        name=name,
        decision=f"{name}.is_{sent.exit}",
        past=(),
        inputs=_names(values, prefix),
        outputs=_given(call, 1, prefix),
        inside=split(sent.head, f"{name}."),
        axes=sent.axes,
        out_axes=(0,),
    )
    return [choice, head]


def _choice(
    asked: list[fx.Node],
    run: list[int],
    decided: Callable[..., Tensor],
    name: str,
    prefix: str,
    more_inputs: tuple[str, ...] = (),
) -> Straight:
    """Which rows take each of `run`; `more_inputs` are names that `decided` is called with after what it reads."""
    graph = fx.Graph()
    read = list(dict.fromkeys(asked))
    env = {n: graph.placeholder(n.name) for n in read}
    for n, made in env.items():
        made.meta = dict(n.meta)
    more = [graph.placeholder(b) for b in more_inputs]
    graph.output(tuple(graph.call_function(decided, (k, *(env[n] for n in asked), *more)) for k in run))
    module = fx.GraphModule({}, graph, class_name="Choice")
    return Straight(module, (*_names(read, prefix), *more_inputs), tuple(f"{name}.is_{k}" for k in run))


def on_arm(k: int, index: Tensor) -> Tensor:
    """[n] float32, 1 for rows that take arm k."""
    return (index == k).float() if index.dtype == torch.int64 else (is_open(index) == bool(k)).float()


def to_exit(k: int, confidence: Tensor, thresholds: Tensor) -> Tensor:
    """[n] float32, 1 for rows that leave at exit k, as the decision has it: no NaN does."""
    threshold = thresholds[k]
    return ((confidence.float() >= threshold) & ~(threshold > 1)).float()


def _given(call: fx.Node, count: int, prefix: str) -> tuple[str, ...]:
    names: dict[Any, fx.Node] = {i.args[1]: i for i in call.users if i.target is operator.getitem}
    return tuple(f"{prefix}{names[k].name}" if k in names else f"{prefix}{call.name}.{k}" for k in range(count))


def used_in(parts: Parts) -> frozenset[str]:
    """Names that its pieces read or that it hands on."""
    found = set(parts.outputs)
    for piece in parts.pieces:
        found |= set(piece.inputs)
        if isinstance(piece, Conditional):
            found |= {piece.decision, *piece.past}
    return frozenset(found)
