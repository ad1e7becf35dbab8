"""Separates the end of a model from its class scores: `softmax`, `log_softmax` or `sigmoid` after the logits, and outputs
that are computed from the prediction, such as probabilities or the class next to the logits.

    before: leaves = (softmax(z), argmax(z), hidden)
    after:  leaves = (z, z, hidden), and tail(z, inputs) = (softmax(z), argmax(z))

Heads, criteria and losses work on the logits `z`; whatever a row was answered with then passes the model's own end once, for
the whole batch, so that rows that left early get in every output what the model makes of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError
from eecompile.ir.recipes import ExitRecipe
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.program import Program, Tail

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
SIGMOIDS = (aten.sigmoid.default, aten.sigmoid_.default)
SAME = (aten.detach.default, aten.detach_.default, aten.alias.default, aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class SplitTail(Pass):
    """Fills `program.prediction.tail`; nothing where the prediction is logits and no other output comes from it alone."""

    name: ClassVar[str] = "split_tail"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized"})
    ensures: ClassVar[frozenset[str]] = frozenset({"tail split"})

    def run(self, program: Program) -> PassResult:
        if program.prediction.index is None:
            return PassResult(program, False)
        gm = facts.copy(program.graph_module)
        every = facts.output_leaves(gm)
        count = len(program.signature.outputs)
        ends = [logits_of(n) for n in (every[program.prediction.index], *every[count:])]
        alike = len({end.target for _, end in ends if end is not None}) <= 1 and len({e is None for _, e in ends}) == 1
        scores = [z for z, _ in ends] if alike else [every[program.prediction.index], *every[count:]]
        z = scores[0]
        reader = _Reader(gm, program, z)
        slots = tuple(i for i, n in enumerate(every[:count]) if n is not z and reader.reads_scores_alone(n))
        if program.prediction.index not in slots and z is not every[program.prediction.index]:
            return PassResult(program, False)  # the model's end reads more than its scores
        if not slots:
            return PassResult(program, False)
        tail = reader.tail([every[i] for i in slots])
        leaves = [z if i in slots else n for i, n in enumerate(every[:count])]
        gm.graph.output_node().args = ((*leaves, *scores[1:]),)
        for n in reversed(list(gm.graph.nodes)):  # in-place operators are never dead code to FX
            if n.target is aten.sigmoid_.default and not n.users and n in reader.after:
                gm.graph.erase_node(n)
        facts.tidy(gm)
        names = ", ".join(program.signature.outputs[i].path for i in slots)
        done = program.replace(graph_module=gm, tail=Tail(tail, slots))
        return PassResult(done, True, summary=f"{names} computed from {z.name} at the end")


def logits_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a prediction is the softmax, log-softmax or sigmoid of, and that operator; the node itself and None else."""
    end = node
    while end.target in SAME:
        end = end.args[0]  # type: ignore[assignment]
    if end.target not in (*SOFTMAXES, *SIGMOIDS):
        return node, None
    z = end.args[0]
    if not isinstance(z, fx.Node) or facts.shape(z) != facts.shape(node) or not facts.value(z).is_floating_point():
        return node, None
    if end.target in SOFTMAXES and end.args[1] not in (-1, len(facts.shape(z)) - 1):
        return node, None
    return z, end


def ends_in_sigmoid(program: Program) -> bool:
    """Whether each score of the prediction is the probability of a yes."""
    tail, at = program.prediction.tail, program.prediction.index
    if tail is None or at not in tail.slots:
        return False
    end = facts.output_leaves(tail.module)[tail.slots.index(at)]
    while end.target in SAME:
        end = end.args[0]  # type: ignore[assignment]
    return end.target in SIGMOIDS


def criterion_of(program: Program, recipe: ExitRecipe) -> Criterion:
    """The criterion of exits, with what the model's end says of its scores.

    Raises:
        StrategyError: Exits answer together, or labels may hold at once, where that is not defined.
    """
    shape, found = program.prediction_leaf.shape, recipe.criterion
    if shape[-1] != 1 and len(shape) == 2 and ends_in_sigmoid(program):
        found = replace(found, multi_label=True)
    if found.multi_label and len(shape) != 2:
        raise StrategyError("multi_label is for scores [B, C]", got=f"[{', '.join(map(str, shape))}]")
    if recipe.combine in ("ensemble", "weighted") and (found.multi_label or shape[-1] == 1):
        raise StrategyError(
            "an ensemble multiplies the probabilities of several classes",
            got=f"combine={recipe.combine!r}, and scores that each say yes or no",
            wanted='combine="last" or "confident"',
        )
    return found


class _Reader:
    """What comes after the scores `z` of a graph.

    Attributes:
        after: The nodes that are computed from `z`.
    """

    def __init__(self, gm: fx.GraphModule, program: Program, z: fx.Node) -> None:
        self.gm, self.z = gm, z
        self.trunk = facts.trunk_nodes(gm, facts.Batch(gm, program.signature))
        self.inputs = facts.placeholders(gm)
        self.after: set[fx.Node] = set()
        for n in gm.graph.nodes:
            if n.op != "output" and any(a is z or a in self.after for a in n.all_input_nodes):
                self.after.add(n)

    def reads_scores_alone(self, leaf: fx.Node) -> bool:
        """Whether a leaf is computed from the scores, the model's inputs and constants, without the model's weights."""
        own = self._own([leaf])
        if leaf.op == "placeholder" or (leaf not in self.after and own.isdisjoint(self.inputs)):
            return False
        learned = any(n in self.trunk or self._is_parameter(n) for n in own if n not in self.after)
        return not learned and not any(self._written(n) for n in (*own, self.z))

    def _is_parameter(self, n: fx.Node) -> bool:
        return n.op == "get_attr" and isinstance(facts.attribute(self.gm, str(n.target)), torch.nn.Parameter)

    @staticmethod
    def _written(n: fx.Node) -> bool:
        return any(w.target is not aten.sigmoid_.default for w in facts.writers(n)) and n.op != "placeholder"

    def _own(self, leaves: Iterable[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = list(leaves)
        while todo:
            n = todo.pop()
            if n is not self.z and n not in found:
                found.add(n)
                todo += n.all_input_nodes
        return found

    def tail(self, leaves: list[fx.Node]) -> fx.GraphModule:
        """`tail(z, *inputs)` gives the leaves."""
        graph = fx.Graph()
        own = self._own(leaves)
        env: dict[fx.Node, fx.Node] = {self.z: graph.placeholder("scores")}
        for n in self.inputs:
            env[n] = graph.placeholder(n.name)
        for n in self.gm.graph.nodes:
            if n in own and n not in env:
                env[n] = graph.node_copy(n, lambda a: env[a])
                if env[n].target is aten.sigmoid_.default:  # the scores are kept
                    env[n].target = aten.sigmoid.default
        graph.output(tuple(env[n] for n in leaves))
        module: Any = fx.GraphModule(self.gm, graph, class_name="Tail")
        facts.tidy(module)
        found: fx.GraphModule = module
        return found
