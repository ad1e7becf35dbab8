"""Writes the exits into the graph: head, confidence, and one `select` at the end. The result is the marked graph.

Run as it stands the marked graph computes everything and selects: the reference meaning of early exit. It gives, flat:
the model's output leaves, the exit index `[B]`, the confidence `[B]`, then the prediction and the confidence of every
exit and of the model's own end, the exit scores where the criterion is learned, where exits are combined what each head
says by itself and, last, the model, and the program's reports.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

import eecompile.ops  # registers torch.ops.eecompile.*
from eecompile.criteria import Criterion, MaxProbability
from eecompile.errors import PassError, StrategyError
from eecompile.heads import Branch, HeadSpec, build_head, check_head, score_head
from eecompile.ir import settings
from eecompile.ir.functional import make_functional
from eecompile.ir.graph import Counterparts
from eecompile.ir.settings import Settings
from eecompile.ir.writer import GraphWriter, add_modules
from eecompile.passes import facts, sites
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.carried import Brought
from eecompile.passes.find_cuts import cuts_before
from eecompile.program import Cut, Exit, Program, Refusal
from eecompile.untrained import mark_untrained, seeded

HEADS = "eecompile_heads"
COMBINATION = "eecompile_combination"
aten = torch.ops.aten
assert eecompile.ops is not None


@dataclass(frozen=True)
class InsertExits(Pass):
    """Inserts `program.exits` into the graph.

    Args:
        head: What the strategy asked for.
        thresholds: One for all exits, or one for each.
        heads: Modules to use instead of new ones, by exit name: for the training capture, or a loaded program.
        seed: Seed of the new heads' weights; the global generator is left as it was.
        brought: Exits of compiled models among a cascade's: their heads, thresholds and temperatures.
        combination: Trained weights of the exits' ensemble to use instead of new ones.
    """

    name: ClassVar[str] = "insert_exits"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized", "exits placed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"marked"})

    head: HeadSpec = "auto"
    thresholds: float | tuple[float, ...] = 0.9
    heads: Mapping[str, Branch] = field(default_factory=dict)
    seed: int = 0
    brought: Brought = field(default_factory=Brought)
    combination: nn.Module | None = None

    def run(self, program: Program) -> PassResult:
        heads = dict(self.heads) or self.build(program)
        program = program.replace(settings=self._settings(program))
        gm = facts.copy(program.graph_module)
        add_modules(gm, HEADS, heads)
        program.settings.attach(gm, facts.device_of(gm))
        if program.exits and program.exits[0].combine == "weighted":
            classes = program.prediction_leaf.shape[-1]
            assert isinstance(classes, int)  # place_exits refuses others
            weights = self.combination or EnsembleWeights(len(program.exits), classes)
            gm.add_module(COMBINATION, weights.to(facts.device_of(gm)))
        marker = _Marker(gm, program)
        for i, e in enumerate(program.exits):
            marker.add_exit(i, e, heads[e.name])
        marker.finish()
        _functional_behind(gm, program)
        facts.tidy(gm)
        marked = program.replace(graph_module=gm, marked=gm, level="marked")
        return PassResult(marked, True, summary=f"{len(program.exits)} exits")

    def _settings(self, program: Program) -> Settings:
        brought, ends = self.brought.exits, self.brought.ends
        new = [e.cut for e in program.exits if e.cut not in brought]
        thresholds = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,) * len(new)
        if len(thresholds) != len(new):
            raise StrategyError(
                "wrong number of thresholds",
                got=len(thresholds),
                wanted=f"{len(new)}, one for each of {', '.join(new)}",
            )
        values = {cut: (t, ends.get(cut, 1.0)) for cut, t in zip(new, thresholds, strict=True)}
        values |= {cut: (one.threshold, one.temperature) for cut, one in brought.items()}
        chosen = [values[e.cut] for e in program.exits]
        last = ends.get(program.capture.models[-1], 1.0) if program.capture.models else 1.0
        names = [e.name for e in program.exits]
        found = program.settings.add(settings.exits(names), [t for t, _ in chosen])
        return found.add(settings.temperatures(names), [*(t for _, t in chosen), last])

    def build(self, program: Program) -> dict[str, Branch]:
        """New heads, in the dtype and on the device of the model."""
        if self.head == "shared":
            return {e.name: self._shared(program, e) for e in program.exits}
        reference = next((p for p in program.graph_module.parameters() if p.is_floating_point()), None)
        heads = {}
        with seeded(self.seed):
            for e in program.exits:
                if e.cut in self.brought.exits:
                    heads[e.name] = self.brought.exits[e.cut].branch
                    continue
                site, _ = sites.site_at(program, cut_of(program, e), e.mask_input)
                kind = e.head_kind if self.head == "auto" else self.head
                module = build_head(kind, site, e.cut).to(getattr(torch, site.dtype))
                takes_mask = check_head(module, site, e.cut)
                score = score_head(site) if e.criterion.learned else None
                branch = Branch(module, score, takes_mask)
                device = reference.device if reference is not None else None
                heads[e.name] = branch.to(device=device, dtype=getattr(torch, site.dtype))
                for part in branch.children():
                    mark_untrained(part)
        return heads

    def _shared(self, program: Program, e: Exit) -> Branch:
        """The model's own layers as a head, with a score of its own where the criterion is learned."""
        tail = sites.tail_of(program, e)
        if isinstance(tail, Refusal):
            raise PassError("no shared head", where=tail.node, got=tail.reason)
        score = score_head(sites.site_at(program, cut_of(program, e), e.mask_input)[0]) if e.criterion.learned else None
        if score is not None:
            mark_untrained(score)
        return Branch(tail.module, score)


class EnsembleWeights(nn.Module):
    """Weights and biases of the exits' geometric ensemble, as logarithms; at first the plain mean of all exits so far.

    Attributes:
        weights: float32 `[E, E]`; row m are those of exits 0 to m at exit m.
        bias: float32 `[E, C]`.
    """

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__()
        counts = torch.arange(1, exits + 1, dtype=torch.float32)
        self.weights = nn.Parameter(-counts.log().unsqueeze(1).expand(exits, exits).clone())
        self.bias = nn.Parameter(torch.zeros(exits, classes))


def cut_of(program: Program, e: Exit) -> Any:
    return next(c for c in program.structure.cuts if c.after == e.after)


class _Marker(GraphWriter):
    """Writes exits in graph order and the selection at the end."""

    exit = -1  # which exit new nodes belong to, -1 for the selection

    def __init__(self, gm: fx.GraphModule, program: Program) -> None:
        super().__init__(gm)
        self.program = program
        self.outputs: list[fx.Node] = []
        self.confidences: list[fx.Node] = []
        self.scores: list[fx.Node] = []
        self.separate: list[fx.Node] = []
        self.state: fx.Node | None = None
        self.memory: fx.Node | None = None  # of the combination of exits
        self.thresholds = self.setting(settings.THRESHOLDS_BUFFER, "thresholds")
        self.temperatures = self.setting(settings.TEMPERATURES_BUFFER, "temperatures")
        leaves = facts.own_leaves(gm, program.signature)
        assert program.prediction.index is not None
        self.leaves = leaves
        self.prediction = leaves[program.prediction.index]
        axis = program.prediction_leaf.batch_axis
        if axis is None:
            raise StrategyError("the prediction has no batch axis", got=str(self.prediction))
        self.axis = axis

    def note(self, node: fx.Node, name: str, val: Any = None) -> fx.Node:
        node.meta["eecompile"] = self.exit
        return super().note(node, name, val)

    def predicts(self, name: str, target: Any, *args: Any) -> fx.Node:
        """A node whose value is like the model's own prediction."""
        return self.call_like(name, facts.value(self.prediction), target, *args)

    def _role(self, node: fx.Node, role: str) -> fx.Node:
        """Says what the lowering takes this node for: "output", "confidence", "threshold", "state", "memory"."""
        node.meta["eecompile_role"] = role
        return node

    def add_exit(self, index: int, e: Exit, branch: Branch) -> None:
        """Head and confidence directly after the cut, before anything can overwrite what the head reads."""
        self.exit, self.at = index, self.names[e.after]
        inputs = tuple(self.names[n] for n in e.head_inputs)
        val = facts.value(self.prediction)
        call = self.module(f"{e.name}_head", e.head, inputs if branch.takes_mask else inputs[:1], val)
        logits = call
        if branch.score is not None:
            logits = self.predicts(f"{e.name}_logits", operator.getitem, call, 0)
            self.scores.append(self.call_like(f"{e.name}_score", None, operator.getitem, call, 1))
        logits = self._as_prediction(e, logits)
        self.separate.append(logits)
        if e.combine in ("ensemble", "weighted"):
            logits = self._ensemble(e, logits, index)
        scored = self.scores[-1] if e.criterion.learned else logits
        if e.criterion.routed:
            self._sent(e, index)
        else:
            self._confidence(e.name, scored, e.criterion, index, self._mask(e, scored))
        if e.combine == "confident":
            logits = self._surest(e.name, logits, index)
        self.outputs.append(self._role(logits, "output"))

    def _as_prediction(self, e: Exit, logits: fx.Node) -> fx.Node:
        """The logits in the dtype of the model's own, where the value at the exit has another one."""
        given, wanted = (facts.value(n) for n in (self.names[e.head_inputs[0]], self.prediction))
        if given is None or e.head_kind == "shared" or given.dtype == wanted.dtype:
            return logits
        return self.predicts(f"{e.name}_cast", aten.to.dtype, logits, wanted.dtype)

    def _sent(self, e: Exit, index: int) -> None:
        """The router's confidence for this exit: nothing of the head is in it."""
        column = self.call(f"{e.name}_confidence", aten.select.int, self.names[e.routed], 1, index)
        self.confidences.append(self._role(column, "confidence"))

    def _ensemble(self, e: Exit, logits: fx.Node, index: int) -> fx.Node:
        name, target = e.name, torch.ops.eecompile.ensemble.default
        args: tuple[Any, ...] = (logits, self.memory, self._threshold(name, index))
        if e.combine == "weighted":
            # The heads are trained by themselves: the ensemble's loss moves nothing but its own weights.
            logits = self.call_like(f"{name}_alone", facts.value(logits), aten.detach.default, logits)
            given = [self.attribute(f"{COMBINATION}.{n}", f"{name}_{n}") for n in ("weights", "bias")]
            target = torch.ops.eecompile.weighted_ensemble.default
            args = (logits, self.memory, *given, index, args[2])
        call = self.call_like(f"{name}_combination", None, target, *args)
        self.memory = self._role(self.item(f"{name}_memory", call, 1), "memory")
        return self.predicts(f"{name}_combined", operator.getitem, call, 0)

    def _surest(self, name: str, logits: fx.Node, index: int) -> fx.Node:
        args = (logits, self.confidences[-1], self.memory, self._threshold(name, index))
        call = self.call_like(f"{name}_combination", None, torch.ops.eecompile.keep_best.default, *args)
        self.confidences[-1] = self._role(self.item(f"{name}_surest", call, 1), "confidence")
        self.memory = self._role(self.item(f"{name}_memory", call, 2), "memory")
        return self.predicts(f"{name}_combined", operator.getitem, call, 0)

    def _threshold(self, name: str, index: int) -> fx.Node:
        node = self.call_like(f"{name}_threshold", None, aten.select.int, self.thresholds, 0, index)
        return self._role(node, "threshold")

    def _mask(self, e: Exit, scored: fx.Node) -> fx.Node | None:
        if e.mask_input is None or e.criterion.learned or not masks_positions(self.program, e):
            return None
        return self.names[e.mask_input]

    def _confidence(self, name: str, logits: fx.Node, criterion: Criterion, index: int, mask: fx.Node | None) -> None:
        number = self.call_like(f"{name}_temperature", None, aten.select.int, self.temperatures, 0, index)
        options: dict[str, Any] = {"patience": criterion.patience, "reduce": criterion.reduce}
        if mask is not None:
            options["mask"] = mask
        if criterion.stateful and index < len(self.program.exits):
            options["threshold"] = self._threshold(name, index)
        if not criterion.learned:
            logits = self._yes_or_no(name, logits, criterion.multi_label)
        args = (logits, self.state if criterion.stateful else None, criterion.name, number)
        call = self.call_like(f"{name}_decision", None, torch.ops.eecompile.confidence.default, *args, **options)
        self.confidences.append(self._role(self.item(f"{name}_confidence", call, 0), "confidence"))
        if criterion.stateful:
            self.state = self._role(self.item(f"{name}_state", call, 1), "state")

    def _yes_or_no(self, name: str, logits: fx.Node, multi_label: bool) -> fx.Node:
        """As `kernels.confidence.yes_or_no`; a model captured as blocks computes its decisions outside of the graph."""
        if self.program.capture.front_end == "blocks":
            return logits
        if multi_label:
            logits = self.call(f"{name}_labels", aten.unsqueeze.default, logits, -1)
        if facts.shape(logits)[-1] != 1:
            return logits
        no = self.call(f"{name}_no", aten.zeros_like.default, logits)
        return self.call(f"{name}_yes_or_no", aten.cat.default, [no, logits], -1)

    def finish(self) -> None:
        output = self.graph.output_node()
        self.exit, self.at = -1, output.prev
        exits = self.program.exits
        final = self.prediction
        if self.axis:
            final = self.call_like("prediction_rows", None, aten.movedim.int, final, self.axis, 0)
        criterion = exits[-1].criterion.at_end if exits else MaxProbability()
        mask = self._mask(exits[-1], final) if exits else None
        self._confidence("model", final, criterion, len(exits), mask)
        self.outputs.append(final)
        self.separate = [*self.separate, final] if exits and exits[-1].combine != "last" else []
        args = (self.outputs, self.confidences, self.thresholds)
        chosen = self.call_like("selection", None, torch.ops.eecompile.select.default, *args)
        prediction = self.predicts("selected", operator.getitem, chosen, 0)
        index = self.item("exit_index", chosen, 1)
        confidence = self.item("confidence", chosen, 2)
        if self.axis:
            prediction = self.predicts("selected_prediction", aten.movedim.int, prediction, 0, self.axis)
        leaves = [prediction if n is self.prediction else self._blank(n, i, index) for i, n in enumerate(self.leaves)]
        reports = [self.names[r.node] for r in self.program.choices.reports]
        output.args = (
            (*leaves, index, confidence, *self.outputs, *self.confidences, *self.scores, *self.separate, *reports),
        )

    def _blank(self, leaf: fx.Node, i: int, index: fx.Node) -> fx.Node:
        """Another output leaf: rows that left before it was computed have no value there."""
        available = available_from(self.program, self.position[leaf], self.position, self.names)
        if available == 0:
            return leaf
        axis = self.program.signature.outputs[i].batch_axis
        args = (leaf, index, available, -1 if axis is None else axis)
        return self.call_like(f"{leaf.name}_or_nothing", facts.value(leaf), torch.ops.eecompile.blank.default, *args)


def masks_positions(program: Program, e: Exit) -> bool:
    """Whether the exit's padding mask speaks of the positions that the model predicts at, `[B, S, C]`.

    It does not where they differ: an encoder's mask says nothing of a decoder's positions.
    """
    shape = program.prediction_leaf.shape
    if len(shape) != 3 or e.mask_input is None:
        return False
    names = [n.name for n in facts.placeholders(program.graph_module)]
    return program.signature.inputs[names.index(e.mask_input)].shape[1] == shape[1]


def available_from(program: Program, position: int, positions: Mapping[fx.Node, int], nodes: Mapping[str, fx.Node]) -> int:
    """The first exit at which a value that is computed at `position` is there; the number of exits if at none."""
    return sum(positions[nodes[e.after]] < position for e in program.exits)


def _functional_behind(gm: fx.GraphModule, program: Program) -> None:
    """In-place operators that would overwrite what a head has read: backward needs it, so they become functional."""
    names = facts.by_name(gm)
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    for e in program.exits:
        for name in e.head_inputs:
            make_functional(names[name], position, position[names[e.after]])


def relocate(program: Program, exits: tuple[Exit, ...]) -> tuple[Exit, ...]:
    """The same exits in another capture of the same model, found by their anchors.

    Raises:
        PassError: A value of the first capture has no counterpart.
    """
    there = Counterparts(program.graph_module, "an exit")
    names = there.names
    moved = []
    swap = {c.y: names[c.node] for g in program.choices.gates for c in g.carries}
    swap |= {
        y: names[s.value] for h in program.choices.chains if not h.repeated for y, s in zip(h.ys[:-1], h.steps, strict=False)
    }
    swap |= {h.ys[-1]: names[h.output] for h in program.choices.chains}
    before = cuts_before(program) if any(e.gate for e in exits) else {}
    for e in exits:
        cut = before[e.gate] if e.gate else next((c for c in program.structure.cuts if c.name == e.cut), None)
        node = there.found.get(e.anchor)
        if isinstance(cut, Cut) and (e.gate or node is None):
            node = names[cut.value]
        if node is None or isinstance(cut, Refusal):
            raise PassError("an exit's place is not in the training capture", where=e.cut, got=str(e.anchor))
        node = swap.get(node.name, node)
        after = node if cut is None or cut.value != node.name else names[cut.after]
        inputs = [node.name]
        for name, anchor in itertools.zip_longest(e.head_inputs[1:], e.sides):
            other = names.get(name) if anchor is None else there.found.get(anchor)
            if other is None:
                raise PassError("a head's input is not in the training capture", where=e.cut, got=name)
            inputs.append(other.name)
        moved.append(replace(e, node=node.name, after=after.name, head_inputs=tuple(inputs)))
    return tuple(moved)
