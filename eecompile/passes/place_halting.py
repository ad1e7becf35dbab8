"""Chooses the chains of blocks that a row may stop in: neighbours of one shape, or one block again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from eecompile.errors import NoPlaceError, StrategyError, check_name, near
from eecompile.gates import unit_class
from eecompile.ir.recipes import HaltRecipe
from eecompile.ir.records import HaltingChain, HaltStep
from eecompile.passes.annotate import module_flops
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.place_gates import GATES, KEYWORDS, make_unit, named, site_of, sizes_of
from eecompile.program import Program, Refusal, Region

UNITS = ("linear", "token")
RULES_OF_HALTING = ("mean", "stop")


@dataclass(frozen=True)
class PlaceHalting(Pass):
    """Fills `program.choices.chains` from the recipe; the graph stays as it is.

    Args:
        recipe: What the strategy wants.
        example: Flat inputs, for the sizes of dynamic axes.
    """

    name: ClassVar[str] = "place_halting"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "regions"})
    ensures: ClassVar[frozenset[str]] = frozenset({"halting placed"})

    recipe: HaltRecipe
    example: tuple[torch.Tensor, ...] | None = None

    def run(self, program: Program) -> PassResult:
        self._check(program)
        refusals: list[Refusal] = []
        halts: list[HaltingChain] = []
        for chain in self._chains(program, refusals):
            halts.append(self._halt(program, chain, len(halts)))
        if not halts:
            reasons = [f"{r.node}: {r.reason}" for r in (*program.refusals, *refusals) if r.rule in RULES]
            raise NoPlaceError(
                "no chain of blocks that a row could stop in",
                got="; ".join(reasons[:12]) or "no block of the model hands on what it was given",
                wanted="at least two blocks of one shape in a row, or max_steps= for blocks that repeat",
                hint="eecompile inspect MODEL shows the blocks",
            )
        if self.recipe.rule == "stop" and len(halts) > 1:
            raise StrategyError(
                "a distribution over where a row stops belongs to one chain: each of its steps has a prediction of its own",
                got="; ".join(f"{h.steps[0].region} ({len(h.steps)} steps)" for h in halts),
                wanted="blocks of one chain",
                hint="blocks= names them",
            )
        summary = "; ".join(f"{h.name}: {len(h.steps)} steps" for h in halts)
        return PassResult(program.replace(chains=tuple(halts)), False, tuple(refusals), summary)

    def _check(self, program: Program) -> None:
        if program.choices.gates:
            raise StrategyError(
                "gates and halting on the same blocks", got="both", wanted="one of them: a row that halted skips the rest"
            )
        check_name("halting unit", self.recipe.unit, UNITS, StrategyError)
        if self.recipe.rule not in RULES_OF_HALTING:
            wanted = near(self.recipe.rule, RULES_OF_HALTING)
            raise StrategyError("unknown meaning of halting scores", got=repr(self.recipe.rule), wanted=wanted)

    def _chains(self, program: Program, refusals: list[Refusal]) -> list[list[Region]]:
        where = self.recipe.where
        chosen: dict[str, Region] = {}
        blocks = [r for r in program.structure.regions if r.kind == "block"]
        for name in [where] if isinstance(where, str) else list(where):
            matched = named(blocks, name)
            if not matched and name not in KEYWORDS:
                raise StrategyError(
                    "no block has this name",
                    got=name,
                    wanted=near(name, [r.name for r in blocks]),
                    hint="eecompile inspect MODEL shows the blocks",
                )
            chosen |= {r.name: r for r in matched}
        order = [r for r in program.structure.regions if r.name in chosen]
        fit = []
        for r in order:
            if r.batch_axis != 0:
                refusals.append(Refusal(r.name, self.name, f"its batch is on axis {r.batch_axis}, halting needs it first"))
            else:
                fit.append(r)
        if self.recipe.repeat:
            return [[r] for r in fit]
        chains: list[list[Region]] = []
        for r in fit:
            if chains and chains[-1][-1].y == r.x:
                chains[-1].append(r)
            else:
                chains.append([r])
        alone = [c[0].name for c in chains if len(c) == 1]
        refusals += [Refusal(n, self.name, "no neighbour of the same shape: nothing to stop before") for n in alone]
        return [c for c in chains if len(c) > 1]

    def _halt(self, program: Program, chain: list[Region], index: int) -> HaltingChain:
        steps = chain * self.recipe.repeat if self.recipe.repeat else chain
        name = f"halt_{index}"
        made = []
        for k, r in enumerate(steps):
            site, _ = site_of(program, r, self.recipe.mask)
            unit = make_unit(unit_class(self.recipe.unit, site, r.name), site, 0.0, 1, None)
            cost = module_flops(unit, sizes_of(program, r, self.example), getattr(torch, site.dtype))
            # A block that is repeated has one unit, wherever it is called; one among several blocks has its own.
            module = r.name.partition("@")[0].replace(".", "_")
            own = f"halt_{module}" if self.recipe.repeat else f"{name}_unit_{k}"
            made.append(HaltStep(f"{name}_step_{k}", r.name, "", f"{GATES}.{own}", r.flops, cost, (), r.anchors))
        return HaltingChain(
            name=name,
            steps=tuple(made),
            x=chain[0].x,
            ys=tuple(r.y for r in chain),
            output="",
            ledger="",
            repeated=bool(self.recipe.repeat),
            per_token=self.recipe.unit == "token",
            depth=chain[0].depth,
        )


RULES = ("find_regions", "place_halting")


def starting_bias(recipe: HaltRecipe, steps: int) -> float:
    """The logit of untrained scores: all steps but the last then add up to about one half."""
    if recipe.bias is not None:
        return recipe.bias
    share = 0.5 / max(steps - 1, 1)
    return math.log(share / (1 - share))
