"""Chooses the cuts that get an exit, and refuses exits that cost more than they can save."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from eecompile.errors import EecompileError, NoPlaceError, StrategyError, near
from eecompile.heads import Branch, HeadSpec, Site, build_head, score_head
from eecompile.ir.recipes import ExitRecipe
from eecompile.passes import facts, sites
from eecompile.passes.annotate import counting_sizes, module_flops
from eecompile.passes.at_predictions import at_predictions
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.carried import Brought
from eecompile.passes.find_cuts import cuts_before
from eecompile.passes.split_tail import criterion_of
from eecompile.program import Cut, Exit, Program, Refusal

DECISION_FLOPS_PER_CLASS = 8  # exp, sums, a maximum and a comparison
LEAST_STEP = 0.03  # of the model's cost between two exits that are placed "everywhere"
WORTH = 4.0  # work between them over what the later one's head costs


@dataclass(frozen=True)
class PlaceExits(Pass):
    """Fills `program.exits` from the recipe; the graph stays as it is.

    Args:
        recipe: What the strategy wants; None for no exits.
        example: Flat inputs, for the sizes of dynamic axes.
        brought: Exits of compiled models among a cascade's.
    """

    name: ClassVar[str] = "place_exits"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "cuts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"exits placed"})

    recipe: ExitRecipe | None
    example: tuple[torch.Tensor, ...] | None = None
    brought: Brought = field(default_factory=Brought)

    def run(self, program: Program) -> PassResult:
        if self.recipe is None:
            return PassResult(program.replace(exits=()), False, summary="no exits asked for")
        considered = Candidates(program, self.recipe, self.example)
        where = self.recipe.where
        if where == "predictions":
            chosen = at_predictions(program, self.recipe, DECISION_FLOPS_PER_CLASS, self.brought.exits)
        elif where == "gates":
            chosen = considered.before_gates()
        elif isinstance(where, int):
            chosen = considered.spaced(where)
        elif isinstance(where, str) and where == "every-block":
            chosen = considered.every_block()
        elif isinstance(where, str) and where == "everywhere":
            chosen = considered.everywhere()
        else:
            wanted = [where] if isinstance(where, str | float) else list(where)
            chosen = considered.named(wanted)
        if not chosen:
            raise sites.own_autocast(program) or nothing_placed(program, considered.refusals)
        chosen.sort(key=lambda e: e.depth)
        exits = tuple(replace(e, name=f"exit_{i}", head=f"eecompile_heads.exit_{i}") for i, e in enumerate(chosen))
        summary = ", ".join(f"{e.name} after {e.cut} at {e.depth:.0%}" for e in exits)
        return PassResult(program.replace(exits=exits), False, tuple(considered.refusals), summary)


def nothing_placed(program: Program, refusals: list[Refusal]) -> StrategyError:
    """The error when no exit fits, with the reason for each candidate."""
    reasons = [f"{r.node}: {r.reason}" for r in (*program.refusals, *refusals) if r.rule in ("find_cuts", "place_exits")]
    listed = "; ".join(reasons[:12]) + (f"; and {len(reasons) - 12} more" if len(reasons) > 12 else "")
    return NoPlaceError(
        "no place for an exit",
        got=listed or "no cut at all",
        wanted="a cut whose head costs less than the work after it",
        hint="give exits= as names (eecompile inspect shows the cuts), another head=, or a larger model",
    )


class Candidates:
    """Candidates for exits: each cut is checked once."""

    def __init__(self, program: Program, recipe: ExitRecipe, example: tuple[torch.Tensor, ...] | None) -> None:
        self.program, self.recipe, self.example = program, recipe, example
        self.refusals: list[Refusal] = []
        self._judged: dict[str, Exit | None] = {}
        self._anchors = {n.name: a for n, a in facts.anchors(program.graph_module.graph.nodes).items()}
        self._tail: sites.Tail | Refusal | None = None
        if recipe.head == "shared" and recipe.where != "gates":
            self._tail = sites.shared_tail(program)
            if isinstance(self._tail, Refusal):
                raise StrategyError(
                    "the model's own final layers cannot be reused as exits",
                    where=self._tail.node,
                    got=self._tail.reason,
                    hint='use head="auto"',
                )

    def candidate(self, cut: Cut, head: HeadSpec | None = None) -> Exit | None:
        """An exit at `cut`, or None with the refusal noted. `head` stands in for the strategy's own."""
        key = f"{cut.after} {head or ''}"
        if key not in self._judged:
            self._judged[key] = self._judge(cut, self.recipe.head if head is None else head)
        return self._judged[key]

    def _judge(self, cut: Cut, spec: HeadSpec) -> Exit | None:
        def refuse(reason: str) -> None:
            self.refusals.append(Refusal(cut.name, "place_exits", reason))

        site, mask = sites.site_at(self.program, cut, self.recipe.mask)
        if site.positions and site.kind != "sequence":
            refuse(f"the model predicts per position, the value here is {list(site.sizes)}")
            return None
        if site.positions:
            wanted = self.program.prediction_leaf.shape[1]
            if site.sizes[1 - site.batch_axis] != wanted:
                refuse(f"the model predicts at {wanted} positions, the value here is {list(site.sizes)}")
                return None
        sides: tuple[str, ...] = ()
        if isinstance(self._tail, sites.Tail):
            reason = sites.tail_fits(self.program, self._tail, cut)
            if reason is not None:
                refuse(reason)
                return None
            sides, kind = self._tail.sides, "shared"
            cost = self._cost(self._tail)
        elif site.kind == "other" and isinstance(spec, str):
            refuse(f"no built-in head for a value {list(site.sizes)}; give a module or a factory as head=")
            return None
        else:
            head = build_head(spec, site, cut.name)
            kind = getattr(head, "kind", type(head).__name__)
            score = score_head(site) if self.recipe.criterion.learned else None
            cost = head_flops(head, site, self.sizes(cut)) + (head_flops(score, site, self.sizes(cut)) if score else 0.0)
        cost += DECISION_FLOPS_PER_CLASS * site.classes
        total = self.program.total_flops
        # Depth may be measured time; what a head may cost is weighed in the same unit, as a fraction.
        saves = (1.0 - cut.depth) * total
        if cost >= saves * self.recipe.max_head_share:
            refuse(f"head and decision cost {cost / total:.1%} of the model, leaving here saves {max(saves, 0) / total:.1%}")
            return None
        inputs = (cut.value, *sides) if kind == "shared" else (cut.value, *((mask,) if mask else ()))
        return self._exit(cut, kind, cost, inputs, mask)

    def sizes(self, cut: Cut) -> list[int]:
        """Sizes of the value at a cut, with ROWS rows and the example's length."""
        value = next(v for v in cut.live if v.node == cut.value)
        return counting_sizes(self.program, value.shape, value.batch_axis, self.example)

    def every_block(self) -> list[Exit]:
        cuts = self.program.structure.cuts
        blocks = [c for c in cuts if c.is_block]
        if not blocks:
            raise StrategyError(
                'exits="every-block" on a model without repeated blocks',
                got=f"{len(cuts)} cuts: {', '.join(c.name for c in cuts[:12])}",
                hint="give a number, names or fractions",
            )
        return [e for c in blocks if (e := self.candidate(c)) is not None]

    def before_gates(self) -> list[Exit]:
        """One exit before every gate, which answers what the model says if it skips that gate's region and all later ones.

        Raises:
            StrategyError: The work cannot stop there, or what goes into a region does not reach the prediction.
        """
        placed = []
        cuts = cuts_before(self.program)
        for gate in (c for c in self.program.choices if c.gates):
            cut = cuts[gate.name]
            tail = cut if isinstance(cut, Refusal) else sites.skipping_tail(self.program, cut.value, cut.after, gate.name)
            if isinstance(cut, Refusal) or isinstance(tail, Refusal):
                assert isinstance(tail, Refusal)
                raise StrategyError(
                    "no exit fits before a gated region",
                    where=gate.region,
                    got=tail.reason,
                    hint='train the gates by their cost: targets="cost", or mode="gates"',
                )
            site, mask = sites.site_at(self.program, cut, self.recipe.mask)
            cost = self._cost(tail) + DECISION_FLOPS_PER_CLASS * site.classes
            placed.append(replace(self._exit(cut, "shared", cost, (cut.value, *tail.sides), mask), gate=gate.name))
        return placed

    def _cost(self, tail: sites.Tail) -> float:
        """FLOPs of the model's own layers as a head."""
        return sum(self.program.costs.flops.get(n.name, 0.0) for n in tail.module.graph.nodes)

    def _exit(self, cut: Cut, kind: str, cost: float, inputs: tuple[str, ...], mask: str | None) -> Exit:
        return Exit(
            name="",
            node=cut.value,
            after=cut.after,
            cut=cut.name,
            depth=cut.depth,
            head="",
            criterion=criterion_of(self.program, self.recipe),
            head_flops=cost,
            anchor=cut.anchor,
            head_inputs=inputs,
            head_kind=kind,
            mask_input=mask,
            combine=self.recipe.combine,
            sides=tuple(self._anchors.get(n) for n in inputs[1:]),
        )

    def everywhere(self) -> list[Exit]:
        """Every place where a fresh answer is worth its head: block boundaries, or all cuts of a model without blocks.

        Kept is an exit with enough work before it, since the exit kept last, and after it: at least `LEAST_STEP` of the
        model's cost and `WORTH` times what its own head costs.
        """
        kept: list[Exit] = []
        cuts = self.program.structure.cuts
        for c in sorted([c for c in cuts if c.is_block] or cuts, key=lambda c: c.depth):
            before = kept[-1].depth if kept else 0.0
            e = self.candidate(c)
            if e is not None and self._lacking(e, before) and e.head_kind == "conv" and self.recipe.head == "auto":
                e = self.candidate(c, "linear")  # a plain head, where a convolution costs too much
            if e is None:
                continue
            lacking = self._lacking(e, before)
            if lacking is None:
                kept.append(e)
            else:
                self.refusals.append(Refusal(c.name, "place_exits", lacking))
        return kept

    def _lacking(self, e: Exit, before: float) -> str | None:
        """Why an exit is not worth its head; None where it is."""
        share = self.program.share(e.head_flops)
        wanted = max(LEAST_STEP, WORTH * share)
        since, rest = e.depth - before, 1.0 - e.depth
        if min(since, rest) >= wanted:
            return None
        side, there = ("since the exit before", since) if since < wanted else ("after it", rest)
        return f"a head of {share:.1%} of the model wants {wanted:.1%} of work {side}, there is {there:.1%}"

    def spaced(self, count: int) -> list[Exit]:
        """`count` exits at 1/(count+1), 2/(count+1), ... of the cost; block boundaries where there are blocks."""
        blocks = [c for c in self.program.structure.cuts if c.is_block]
        pool = blocks if len(blocks) > count else list(self.program.structure.cuts)
        depths = [(k + 1) / (count + 1) for k in range(count)]
        # Where no block boundary can hold an exit (an encoder's, for a decoder's prediction) any cut may.
        return self._nearest(pool, depths) or self._nearest(list(self.program.structure.cuts), depths)

    def _nearest(self, pool: list[Cut], depths: list[float]) -> list[Exit]:
        """For each depth the nearest cut that is free and fit; fewer where the pool runs out, with a refusal."""
        taken: dict[str, Exit] = {}
        for depth in depths:
            for c in sorted(pool, key=lambda c: abs(c.depth - depth)):
                if c.after in taken or c.depth <= 0.0:
                    continue
                placed = self.candidate(c)
                if placed is not None:
                    taken[c.after] = placed
                    break
            else:
                self.refusals.append(Refusal(f"{depth:.0%} of the cost", "place_exits", "no free cut left for this exit"))
        return list(taken.values())

    def named(self, wanted: list[str | float]) -> list[Exit]:
        """Exits by name with wildcards, or by fraction of the cost.

        Raises:
            StrategyError: A name matches nothing; the message lists near ones, or why that place was refused.
        """
        chosen: dict[str, Exit] = {}
        cuts = self.program.structure.cuts
        for w in wanted:
            if isinstance(w, float):
                free = [c for c in cuts if c.after not in chosen and (c.is_block or c.dominates)]
                for e in self._nearest(free, [w]):
                    chosen[e.after] = e
                continue
            matched = [c for c in cuts if any(fnmatch.fnmatchcase(n, w) for n in (c.name, c.value, c.after))]
            if not matched:
                reasons = [r.reason for r in self.program.refusals if r.node == w]
                raise StrategyError(
                    "no cut has this name",
                    got=w,
                    wanted=near(w, [c.name for c in cuts]) if cuts else "this model has no cut",
                    hint=f"that place was refused: {reasons[0]}" if reasons else "eecompile inspect MODEL shows the cuts",
                )
            before = len(self.refusals)
            placed = [found for c in matched if (found := self.candidate(c)) is not None]
            if not placed:
                raise StrategyError(
                    "no exit fits where it was asked for",
                    where=w,
                    got="; ".join(f"{r.node}: {r.reason}" for r in self.refusals[before:])
                    or "refused before for the same reason",
                    hint="choose an earlier place or a cheaper head=",
                )
            chosen.update({one.after: one for one in placed})
        return list(chosen.values())


def head_flops(head: nn.Module, site: Site, sizes: list[int]) -> float:
    """FLOPs of a head for one row, on meta tensors; 0 for a head that does not run there (checked when inserted)."""
    dtype = getattr(torch, site.dtype)
    try:
        return module_flops(Branch(head, takes_mask=False), sizes, dtype)
    except EecompileError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # check_head says what is wrong, with the place
        return 0.0
