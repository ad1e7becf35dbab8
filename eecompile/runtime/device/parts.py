"""Splits a segment's module at its gated regions: straight code, and regions that run on some rows only."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from eecompile.errors import UnsupportedModelError
from eecompile.passes import facts
from eecompile.passes.gated import Gated
from eecompile.passes.routed import Routed
from eecompile.passes.widened import Widened


@dataclass(frozen=True)
class Straight:
    """Code that runs as it stands."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Conditional:
    """A region: `outputs` are what `inside` gives for open rows, and `past` for the others."""

    gated: Gated
    decision: str
    past: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inside: Parts


@dataclass(frozen=True)
class Parts:
    """A module in pieces; names are those of its graph's nodes behind `prefix`."""

    inputs: tuple[str, ...]
    pieces: tuple[Straight | Conditional, ...]
    outputs: tuple[str, ...]


def split(module: fx.GraphModule, prefix: str) -> Parts:
    """The pieces of a module with a flat tuple of outputs, in the order in which they run."""
    nodes = [n for n in module.graph.nodes if n.op not in ("output", "placeholder", "get_attr")]
    wanted = [a for a in module.graph.output_node().args[0] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
    calls = {n: g for n in nodes if n.op == "call_module" and isinstance(g := facts.attribute(module, str(n.target)), Gated)}
    for n in nodes:
        if n.op == "call_module" and isinstance(facts.attribute(module, str(n.target)), Widened | Routed):
            raise UnsupportedModelError(
                "the device program does not know this kind of conditional code yet",
                where=n.name,
                got=type(facts.attribute(module, str(n.target))).__name__.lower(),
                wanted="exits, gates and halting; widths and branches of routers run in reference and compact",
                hint='set fast.executor = "compact"',
            )
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
            pieces.append(_conditional(run, calls[run], prefix))
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
    return Straight(fx.GraphModule(module, graph, class_name="Part"), _names(inputs, prefix), _names(given, prefix))


def _conditional(call: fx.Node, gated: Gated, prefix: str) -> Conditional:
    decision, past, *inputs = call.args
    names: dict[Any, fx.Node] = {i.args[1]: i for i in call.users if i.target is operator.getitem}
    outputs = tuple(f"{prefix}{names[k].name}" if k in names else f"{prefix}{call.name}.{k}" for k in range(len(past)))  # type: ignore[arg-type]
    return Conditional(
        gated=gated,
        decision=_names([decision], prefix)[0],
        past=_names(past, prefix),
        inputs=_names(inputs, prefix),
        outputs=outputs,
        inside=split(gated.body, f"{prefix}{call.name}."),
    )


def used_in(parts: Parts) -> frozenset[str]:
    """Names that its pieces read or that it hands on."""
    found = set(parts.outputs)
    for piece in parts.pieces:
        found |= set(piece.inputs)
        if isinstance(piece, Conditional):
            found |= {piece.decision, *piece.past}
    return frozenset(found)
