"""Sites of heads at cuts: shape, padding mask, and whether the model's own tail can serve as the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from eecompile.errors import NoPlaceError, PassError
from eecompile.heads import Site
from eecompile.ir.functional import make_functional
from eecompile.passes import facts
from eecompile.passes.extract import extract
from eecompile.passes.find_channels import POINTWISE
from eecompile.program import Cut, Exit, Program, Refusal

OVER_TIME = ("conv1d", "conv_transpose1d", "batch_norm")
POOLS = ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "group_norm", "instance_norm")
MASK_NAMES = ("attention_mask", "padding_mask", "key_padding_mask", "mask", "input_mask")


def site_at(program: Program, cut: Cut, mask: str | None) -> tuple[Site, str | None]:
    """The site of a head at a cut, and the name of the input that marks padding there, if any."""
    if program.prediction.index is None:
        raise PassError("the prediction leaf is not known yet", hint="pass prediction= to eecompile()")
    value = next(v for v in cut.live if v.node == cut.value)
    assert value.batch_axis is not None  # find_cuts refuses values without a batch
    leaf = program.prediction_leaf
    classes = leaf.shape[-1]
    if not isinstance(classes, int):
        raise PassError("the prediction has a dynamic number of classes", got=leaf.describe())
    node = facts.by_name(program.graph_module)[cut.value]
    positions = len(leaf.shape) == 3
    return made_site(program, node, (value.shape, value.dtype), value.batch_axis, mask, classes, positions)


def made_site(
    program: Program,
    node: fx.Node,
    value: tuple[tuple[int | str, ...], str],
    batch_axis: int,
    mask: str | None,
    classes: int = 1,
    positions: bool = False,
) -> tuple[Site, str | None]:
    """What a head, gate unit or router finds at a node, and the name of the input that marks padding there, if any.

    Args:
        value: Sizes and dtype of the node's value.
    """
    sizes, dtype = value
    over_time = len(sizes) == 3 and not positions and _convolved(node)
    site = Site(sizes, batch_axis, classes, positions, dtype, channels_first=over_time)
    name = None if len(sizes) != 3 else find_mask(program, sizes[2 if over_time else 1 - batch_axis], mask)
    return replace(site, masked=name is not None), name


def _convolved(node: fx.Node) -> bool:
    """Whether a value `[B, D, S]` comes from a convolution over time, or goes to one, with its axes as they are."""
    left, seen = [node], {node}
    while left:
        n = left.pop()
        name = facts.operator_name(n)
        if name in OVER_TIME or any(facts.operator_name(u) in OVER_TIME and u.args[:1] == (n,) for u in n.users):
            return True
        if name in POINTWISE or name in POOLS:
            before = [a for a in n.all_input_nodes if facts.is_tensor(a) and facts.value(a).ndim == 3 and a not in seen]
            left += before
            seen.update(before)
    return False


def find_mask(program: Program, length: int | str, wanted: str | None) -> str | None:
    """The graph input `[B, S]` that marks padding for a sequence of this length."""
    if wanted == "":  # none is wanted, whatever the inputs are called
        return None
    nodes = facts.placeholders(program.graph_module)
    for node, leaf in zip(nodes, program.signature.inputs, strict=True):
        last = leaf.path.rsplit(".", 1)[-1]
        if leaf.path == wanted or (wanted is None and last in MASK_NAMES):
            if leaf.batch_axis == 0 and len(leaf.shape) == 2 and leaf.shape[1] == length:
                return str(node.name)
            if wanted is not None:
                raise PassError(
                    "the mask does not fit the sequence at this exit",
                    where=leaf.path,
                    got=leaf.describe(),
                    wanted=f"[batch, {length}]",
                )
    if wanted is not None:
        raise PassError(
            "no input has the name given as mask=",
            got=wanted,
            wanted=", ".join(leaf.path for leaf in program.signature.inputs),
        )
    return None


def own_autocast(program: Program) -> NoPlaceError | None:
    """The error for a model whose layers run under an autocast of its own: one node of the graph, without a place inside."""
    found = [n for n in program.graph_module.graph.nodes if "wrap_with_autocast" in str(n.target)]
    inside = sum(program.costs.flops.get(n.name, 0.0) for n in found)
    if not found or 2 * inside < sum(program.costs.flops.values()):
        return None
    return NoPlaceError(
        "the model's forward runs under an autocast of its own, within which neither exits nor gates have a place",
        got=f"{inside / sum(program.costs.flops.values()):.0%} of its cost in `with torch.autocast(...)` in forward",
        wanted="a forward without it",
        hint="take it out of forward, and call the compiled model under torch.autocast",
    )


@dataclass(frozen=True)
class Tail:
    """The rest of the model after a cut, as a head that shares its parameters.

    Attributes:
        module: Takes the value at a cut, then `sides`.
        sides: Names of the further values that it reads (padding masks, token ids), in graph order.
        reads: Whether the value at the cut is among what it reads.
    """

    module: fx.GraphModule
    sides: tuple[str, ...]
    reads: bool


def shared_tail(program: Program) -> Tail | Refusal:
    """The model's own final layers, from the last block to the prediction, as a head."""
    blocks = [c for c in program.structure.cuts if c.is_block]
    if program.capture.front_end == "blocks":
        return Refusal("model", "shared head", "a model that was captured as blocks has no graph of its final layers")
    if not blocks:
        return Refusal("model", "shared head", "the model has no repeated block, so no tail after the last one")
    last = blocks[-1]
    tail = _tail(program, last.value, last.after, {})
    if not tail.reads:
        return Refusal(last.name, "shared head", f"the tail reads {list(tail.sides)}, not {last.value}")
    if any(v.trunk and v.node in tail.sides for v in last.live):
        return Refusal(last.name, "shared head", "the tail reads more than one value of the trunk")
    return tail


def skipping_tail(program: Program, value: str, after: str, gate: str) -> Tail | Refusal:
    """All that is left of the model after a cut without the regions of `gate` and of every later gate, as a head."""
    names, gated = facts.by_name(program.graph_module), [c for c in program.choices if c.gates]
    first = next(i for i, c in enumerate(gated) if c.name == gate)
    skips = [(m, v) for c in gated[first:] if c.arms[0].skips for m, v in zip(c.merges, c.arms[0].values, strict=True)]
    tail = _tail(program, value, after, {names[m.node]: names[v] for m, v in skips})
    return tail if tail.reads else Refusal(gate, "shared head", "the prediction does not depend on its input")


def tail_of(program: Program, e: Exit) -> Tail | Refusal:
    """The head of an exit that has no layers of its own."""
    return skipping_tail(program, e.node, e.after, e.gate) if e.gate else shared_tail(program)


def _tail(program: Program, value: str, after: str, instead: Mapping[fx.Node, fx.Node]) -> Tail:
    """What the prediction needs after node `after`; `instead` are nodes that take the value of another one."""
    gm = program.graph_module
    nodes = list(gm.graph.nodes)
    names = facts.by_name(gm)
    position = {n: i for i, n in enumerate(nodes)}
    assert program.prediction.index is not None
    prediction = facts.output_leaves(gm)[program.prediction.index]
    needed: set[fx.Node] = set()
    reads: list[fx.Node] = []
    stack = [prediction]
    sizes_read: list[fx.Node] = []
    while stack or sizes_read:
        if not stack:  # sizes last: most are those of what the tail reads anyway
            stack += _unread(sizes_read.pop(), reads)
            continue
        n = stack.pop()
        if n in needed or n.op == "get_attr":
            continue
        if facts.is_symbolic_number(n):
            needed.add(n)
            sizes_read.append(n)
        elif position[n] <= position[names[after]]:
            if n not in reads:
                reads.append(n)
        else:
            needed.add(n)
            stack += [instead[n]] if n in instead else n.all_input_nodes
    others = sorted((n for n in reads if n is not names[value]), key=lambda n: position[n])
    ordered = sorted(needed, key=lambda n: position[n])
    module = extract(gm, ordered, [names[value], *others], [prediction], "SharedHead", instead)
    own = list(module.graph.nodes)
    for n in own:  # the rest of the graph reads the same values
        make_functional(n, {n: i for i, n in enumerate(own)})
    facts.tidy(module)
    return Tail(module, tuple(n.name for n in others), names[value] in reads)


def _unread(size: fx.Node, reads: list[fx.Node]) -> list[fx.Node]:
    """What a size must be read from; nothing where the values that are there give it."""
    number = facts.value(size)
    known = {symbol for n in reads for e in facts.shape(n) if e.is_Symbol for symbol in e.free_symbols}
    given = isinstance(number, torch.SymInt) and facts.expression(number).free_symbols <= known
    return [] if given else size.all_input_nodes


def tail_fits(program: Program, tail: Tail, cut: Cut) -> str | None:
    """Why the model's final layers cannot be the head at `cut`, None where they can."""
    last = [c for c in program.structure.cuts if c.is_block][-1]
    (wanted,) = (v.shape for v in last.live if v.node == last.value)
    (value,) = (v.shape for v in cut.live if v.node == cut.value)
    if value != wanted:
        return f"the model's own head reads {list(wanted)}, the value here is {list(value)}"
    missing = [s for s in tail.sides if s not in {v.node for v in cut.live}]
    return f"the model's own head also reads {', '.join(missing)}, not computed yet" if missing else None
