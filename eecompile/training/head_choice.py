"""Heads of a frozen trunk, exit by exit: which kinds are tried, which is taken, and what `fit` reports of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile.heads import HEADS, Head, LinearHead, build_head
from eecompile.passes import sites
from eecompile.passes.place_exits import DECISION_FLOPS_PER_CLASS, LEAST_STEP, WORTH, Candidates, head_flops
from eecompile.passes.sites import site_at
from eecompile.result import Result, Trace
from eecompile.training.batches import device_of, move
from eecompile.training.features import Block, Features, Slot, labels_at, shared_tail
from eecompile.training.head_fit import Fitted, HeadFit, Standardised, minimise
from eecompile.training.head_report import HeadRow
from eecompile.training.objectives import Objective, PerExitLoss
from eecompile.training.optim import nothing_to_train
from eecompile.training.plan import Plan, StagePlan
from eecompile.training.scores import right
from eecompile.training.stages import parts_of
from eecompile.training.step import classifies, scored

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

KINDS = {"map": ("linear", "mlp", "conv"), "sequence": ("linear", "first", "mlp", "attention"), "vector": ("linear", "mlp")}
ONE_LAYER = ("linear", "first", "shared")  # and what there is nothing to fit of
PER_POSITION = ("linear", "mlp")
GAIN, LEAST_GAIN = 0.02, 0.005  # a costlier kind is taken where it lowers the held-out loss by this share, and so much
OF_BATCHES = ("optimizer", "scheduler", "max_grad_norm", "patience", "checkpoint_every", "accelerator")
SCORE_DECAY = 0.1
LEAST_TO_SCORE = 25


def why_not(fast: CompiledModule, plan: Plan, stage: StagePlan, processes: int) -> str:
    """Why the heads of this stage are not fitted on kept features but batch by batch; empty where they are."""
    program = getattr(fast, "program", None)
    if plan.cached is False:
        return "cached=False was given"
    if program is None:
        return "the module has no graph to take features from"
    if program.choices.reports or stage.gate_mode is not None:
        return "gates, halting steps or routers are trained along"
    if not program.exits:
        return "there is no exit"
    if processes > 1:
        return f"{processes} processes share the training"
    given = next((name for name in OF_BATCHES if getattr(plan, name)), None)
    if given is not None:
        return f"{given}= was given"
    objective = plan.objective_in(stage)
    if objective.entangled:
        return objective.entangled
    if any(e.combine != "last" for e in program.exits):
        return "exits answer together, so that their heads depend on one another"
    positions = len(program.prediction_leaf.shape) == 3
    if positions and (any(e.criterion.learned for e in program.exits) or not classifies(objective) or plan.metric):
        return "scores, losses or metrics of whole sequences are trained along"
    if positions and any(not _per_position(fast.branch(e.name).head) for e in program.exits if e.head_kind != "shared"):
        return "a head reads whole sequences to predict per position"
    return ""


def heads_alone(stage: StagePlan) -> bool:
    """Whether a stage trains heads on a frozen trunk."""
    return stage.heads and not stage.trunk


def with_kinds(fast: CompiledModule, rows: Sequence[HeadRow]) -> None:
    """Gives exits the kinds of head that a run had chosen, without trained weights."""
    now = {e.name: e.head_kind for e in fast.program.exits}
    for row in rows:
        if row.kind != now[row.exit]:
            present, tail = fast.branch(row.exit).head, shared_tail(fast) if row.kind == "shared" else None
            assert isinstance(present, Head)
            like = next(present.parameters())
            new = tail.module if tail is not None else build_head(row.kind, present.site, row.exit)
            fast.replace_heads({row.exit: (row.kind, new.to(like.device, like.dtype), row.flops)})


def _read(kind: str) -> str:
    """The feature that a kind of head works on."""
    return "shared" if kind == "shared" else HEADS[kind].reads


def _per_position(head: nn.Module) -> bool:
    return isinstance(head, Head) and head.kind in (*PER_POSITION, "identity")


class Choice:
    """The kinds of head that an exit may have, and the one that is taken.

    Args:
        fast: The compiled module.
    """

    def __init__(self, fast: CompiledModule, plan: Plan, objective: Objective) -> None:
        self.fast, self.plan, self.objective = fast, plan, objective
        self.device = device_of(fast)
        self.convex = not any(isinstance(part, PerExitLoss) for part in parts_of(objective))
        recipe = fast.strategy.recipe().exits
        self.free = recipe is not None and recipe.head == "auto"
        self.recipe = recipe
        trunk = {id(p) for p in fast.trunk_parameters()}
        self.kinds: dict[str, dict[str, float]] = {}
        self.tail = shared_tail(fast) if self.free else None
        self.slots = [self._slot(k, trunk) for k in range(len(fast.program.exits))]
        if not self.free and all("logits" in s.reads and s.branch.score is None for s in self.slots):
            raise nothing_to_train("heads")

    def _slot(self, k: int, trunk: set[int]) -> Slot:
        program = self.fast.program
        e = program.exits[k]
        branch = self.fast.branch(e.name)
        scored = ("mean",) if branch.score is not None else ()
        axis = branch.head.site.batch_axis if isinstance(branch.head, Head) else self._axis(e)
        if all(id(p) in trunk or not p.requires_grad for p in branch.head.parameters()):
            return Slot(e, branch, axis, ("logits", *scored))
        if not isinstance(branch.head, Head) or type(branch.head) is not HEADS.get(branch.head.kind):
            return Slot(e, branch, axis, ("all", *scored), branch.takes_mask and e.mask_input is not None)
        self.kinds[e.name] = self._costs(k, branch.head) if self.free else {branch.head.kind: e.head_flops}
        reads = dict.fromkeys(_read(kind) for kind in self.kinds[e.name])
        whole = e.mask_input is not None and branch.takes_mask and "all" in reads
        tail = self.tail.module if self.tail is not None and "shared" in reads else None
        return Slot(e, branch, axis, tuple(dict.fromkeys((*reads, *scored))), whole, tail)

    def _axis(self, e: Any) -> int:
        cut = next(c for c in self.fast.program.structure.cuts if c.after == e.after)
        return site_at(self.fast.program, cut, e.mask_input)[0].batch_axis

    def _costs(self, k: int, head: Head) -> dict[str, float]:
        """FLOPs of head and decision for each kind that may be taken at exit k, the cheapest first."""
        program, site, recipe = self.fast.program, head.site, self.recipe
        assert recipe is not None  # there are exits
        e, total = program.exits[k], program.total_flops or 1.0
        cut = next(c for c in program.structure.cuts if c.after == e.after)
        sizes = Candidates(program, recipe, self.fast.example).sizes(cut)
        score = self.fast.branch(e.name).score
        more = DECISION_FLOPS_PER_CLASS * site.classes + (head_flops(score, site, sizes) if score is not None else 0.0)
        kinds = PER_POSITION if site.positions else KINDS.get(site.kind, ())
        costs = {kind: head_flops(build_head(kind, site, e.cut), site, sizes) + more for kind in kinds if kind != head.kind}
        if self.tail is not None and not site.positions and sites.tail_fits(program, self.tail, cut) is None:
            costs["shared"] = sum(program.costs.flops.get(n.name, 0.0) for n in self.tail.module.graph.nodes) + more
        spread = recipe.where == "everywhere"  # exits are as close as their heads are worth
        since = e.depth - (program.exits[k - 1].depth if k else 0.0)
        room = min(since, 1.0 - e.depth) if spread else 1.0 - e.depth

        def fits(cost: float) -> bool:
            share = cost / total
            wanted = max(LEAST_STEP, WORTH * share) if spread else share / recipe.max_head_share
            return bool(cost <= e.head_flops or wanted < room)

        found = {head.kind: e.head_flops} | {kind: cost for kind, cost in costs.items() if fits(cost)}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    # ------------------------------------------------------------------ one exit

    def fit(self, features: Features, k: int, until: float = math.inf) -> HeadRow:
        """Fits the head of exit k, of the kind that is best on the rows held out, and puts it into the module.

        Args:
            until: By `time.perf_counter`: the best by then is taken.
        """
        started = time.perf_counter()
        slot = self.slots[k]
        e, branch = slot.exit, slot.branch
        before, tried, steps = e.head_kind, dict[str, Fitted](), 0
        fitting = HeadFit(features, slot, self.objective, self.convex, self.plan.decay, self.plan.lr, until)
        if "logits" in slot.reads:  # nothing of its own to fit but a score
            if branch.score is not None:
                steps = self._fit_score(features, slot, fitting, branch.head)
            row = HeadRow(
                e.name, before, before, e.head_flops, 0.0, fitting.loss(branch.head, features.held_rows > 0), None, {}, steps
            )
        else:
            seed = (self.plan.seed * 1009 + k) % 2**31
            for kind in self._order(slot, features):
                if (tried and fitting.late()) or not self._tries(kind, slot, features, tried):
                    continue
                tried[kind] = fitting.fit(self._new(kind, branch.head, seed), seed)
                steps += tried[kind].steps
            taken = self._taken(slot, tried)
            chosen = tried[taken]
            score = self._score(features, fitting, chosen.head)
            if branch.score is not None:
                steps += self._fit_score(features, slot, fitting, chosen.head)
            final = fitting.again(chosen)
            steps += final.steps - chosen.steps
            self._put(e.name, taken, before, final.head)
            losses = {kind: f.loss for kind, f in tried.items()}
            flops = self.kinds.get(e.name, {}).get(taken, e.head_flops)
            row = HeadRow(e.name, taken, before, flops, chosen.weight_decay, chosen.loss, score, losses, steps)
        row.seconds, row.cut = time.perf_counter() - started, fitting.cut
        return row

    def _order(self, slot: Slot, features: Features) -> list[str]:
        """Kinds to try, those of one layer first; the present one alone where there is nothing to choose on."""
        kinds = self.kinds.get(slot.exit.name, {slot.exit.head_kind: 0.0})
        if len(kinds) == 1 or not features.held_rows:
            return [slot.exit.head_kind]
        return sorted(kinds, key=lambda kind: (kind not in ONE_LAYER, _read(kind) == "all"))

    def _tries(self, kind: str, slot: Slot, features: Features, tried: dict[str, Fitted]) -> bool:
        """Whether a kind is worth fitting: another one of more layers only where the best is worse than the model."""
        if kind in HEADS and _read(kind) not in slot.reads:  # there was no room
            return False
        if kind in (*ONE_LAYER, slot.exit.head_kind):
            return True
        return min(f.loss for f in tried.values()) > self._of_model(features)

    def _of_model(self, features: Features) -> float:
        """Held-out loss of the model's own output."""
        total, count = 0.0, 0
        for block in features.blocks:
            if len(block.held):
                own = features.teacher(block, block.held).to(self.device)
                labels = move(labels_at(block.labels, block.held), self.device)
                total += float(self.objective.of_one(own, own, labels)) * len(block.held)
                count += len(block.held)
        return total / max(count, 1)

    def _new(self, kind: str, present: nn.Module, seed: int) -> nn.Module:
        """A head of a kind: the present one where it is of that kind."""
        if kind == "shared":
            assert self.tail is not None
            return self.tail.module
        if not isinstance(present, Head) or present.kind == kind:
            return present
        torch.manual_seed(seed)
        like = next(present.parameters())
        return build_head(kind, present.site, "").to(like.device, like.dtype)

    def _taken(self, slot: Slot, tried: dict[str, Fitted]) -> str:
        best = min(f.loss for f in tried.values())
        costs = self.kinds.get(slot.exit.name, {})
        near = [kind for kind, f in tried.items() if f.loss <= best + max(GAIN * abs(best), LEAST_GAIN)]
        return min(near, key=lambda kind: costs.get(kind, 0.0))

    def _put(self, name: str, kind: str, before: str, head: nn.Module) -> None:
        branch = self.fast.branch(name)
        if kind == before:
            branch.head.load_state_dict(head.state_dict())
        else:
            self.fast.replace_heads({name: (kind, head, self.kinds[name][kind])})

    # ------------------------------------------------------------------ scores

    def _score(self, features: Features, fitting: HeadFit, head: nn.Module) -> float | None:
        """Accuracy on the rows held out, or on those fitted to."""
        if not classifies(self.objective):
            return None
        head.eval()
        hits, count = 0.0, 0
        with torch.no_grad():
            for block, rows in parts(features, held=features.held_rows > 0):
                value, _ = right(fitting.logits(head, block, rows).cpu(), labels_at(block.labels, rows))
                hits, count = hits + float(value.sum()), count + len(rows)
        return hits / max(count, 1)

    def _fit_score(self, features: Features, slot: Slot, fitting: HeadFit, head: nn.Module) -> int:
        """Fits the exit's score to whether the head is right on rows that it was not fitted to, where there are enough."""
        score = slot.branch.score
        assert isinstance(score, LinearHead)
        part = "held" if features.held_rows >= LEAST_TO_SCORE else "train"
        head.eval()
        hits: dict[int, Tensor] = {}
        with torch.no_grad():
            for block, rows in parts(features, held=part == "held"):
                value, _ = right(fitting.logits(head, block, rows).cpu(), labels_at(block.labels, rows))
                hits[block.index] = value.float().to(fitting.device)
        problem = Standardised(features, slot, score, fitting.device, part=part)

        def loss(w: Tensor, b: Tensor) -> Tensor:
            def of(x: Tensor, block: Block, rows: Tensor) -> Tensor:
                return F.binary_cross_entropy_with_logits((x @ w.T + b).squeeze(1), hits[block.index])

            return problem.mean(part, of)

        decay = SCORE_DECAY if self.plan.decay is None else self.plan.decay
        w, b = problem.start(score.classifier.weight.shape)
        steps = minimise(loss, w, b, decay, fitting.late)
        score.load_state_dict(problem.folded(score, w.detach(), b.detach()).state_dict())
        return steps

    # ------------------------------------------------------------------ all exits

    def measured(self, features: Features, validation: bool) -> tuple[float, list[float] | None]:
        """Objective and score of every exit and the model, on the training or the validation rows."""
        total, count, sums, labelled = 0.0, 0, torch.zeros(len(self.slots) + 1, dtype=torch.float64), 0.0
        where = "the rows that were kept"
        for branch in (s.branch for s in self.slots):
            branch.eval()
        with torch.no_grad():
            for block in features.blocks:
                if block.validation != validation:
                    continue
                for rows in torch.split(torch.arange(len(block.row)), 1024):
                    result = self._result(features, block, rows)
                    labels = move(labels_at(block.labels, rows), self.device)
                    total += float(self.objective(result, labels, where=where)) * len(rows)
                    count += len(rows)
                    found = scored(result, labels, self.plan.metric, self.objective, where)
                    if found is not None:
                        sums, labelled = sums + found[0].sum(0), labelled + float(found[1].sum())
        return total / max(count, 1), (sums / labelled).tolist() if labelled else None

    def _result(self, features: Features, block: Block, rows: Tensor) -> Result:
        """What `run` in train mode gives of these rows: outputs and scores."""
        outputs, scores = [], []
        for slot in self.slots:
            fitting = HeadFit(features, slot, self.objective, self.convex, None, self.plan.lr)
            outputs.append(fitting.logits(slot.branch.head, block, rows).to(self.device))
            score = slot.branch.score
            if isinstance(score, LinearHead):
                x = features.feature(slot, "mean", block, rows).to(self.device)
                scores.append(score.layers(x).flatten())
        outputs.append(features.teacher(block, rows).to(self.device))
        nothing = torch.zeros(len(rows), device=self.device)
        return Result(
            output=outputs[-1],
            exit_index=nothing.long(),
            confidence=nothing,
            cost=nothing,
            trace=Trace(tuple(o.float() for o in outputs), scores=tuple(scores) or None),
        )


def parts(features: Features, held: bool) -> Sequence[tuple[Block, Tensor]]:
    """Blocks with their rows held out, or fitted to."""
    found = [(b, b.held if held else b.train) for b in features.blocks]
    return [(b, rows) for b, rows in found if len(rows)]
