"""Exits at the predictions of a cascade's earlier models, each of which must save more than it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from eecompile.errors import PassError, StrategyError
from eecompile.ir.recipes import ExitRecipe
from eecompile.passes import facts, sites
from eecompile.passes.carried import Carried, brought_exit
from eecompile.passes.split_tail import criterion_of
from eecompile.program import Cut, Exit, Program


def at_predictions(
    program: Program, recipe: ExitRecipe, decision_flops_per_class: float, brought: Mapping[str, Carried]
) -> list[Exit]:
    """One exit after every model but the last, whose prediction it takes as it is, and those that models bring along.

    Raises:
        StrategyError: The graph has no earlier model, or one costs so much that the next might as well run at once.
        PassError: The work cannot stop after a model; the message says why.
    """
    if not program.capture.models:
        raise StrategyError(
            'exits="predictions" needs several models', got="one model", hint="pass a list of models to eecompile()"
        )
    _earned(program, recipe.max_head_share)
    exits = [brought_exit(program, _cut(program, name), one, recipe) for name, one in brought.items()]
    for name in program.capture.models[:-1]:
        cut = _cut(program, name)
        site, mask = sites.site_at(program, cut, recipe.mask)
        exits.append(
            Exit(
                name="",
                node=cut.value,
                after=cut.after,
                cut=name,
                depth=cut.depth,
                head="",
                criterion=criterion_of(program, recipe),
                head_flops=decision_flops_per_class * site.classes,
                anchor=cut.anchor,
                head_inputs=(cut.value,),
                head_kind="identity",
                mask_input=mask,
                combine=recipe.combine,
            )
        )
    order = {n.name: i for i, n in enumerate(program.graph_module.graph.nodes)}
    return sorted(exits, key=lambda e: order[e.after])


def _cut(program: Program, name: str) -> Cut:
    cut = next((c for c in program.structure.cuts if c.name == name), None)
    if cut is None:
        reasons = [r.reason for r in program.refusals if r.node == name]
        raise PassError("the work cannot stop after this model", where=name, got=reasons[0] if reasons else "no cut")
    return cut


@dataclass(frozen=True)
class ModelCost:
    """Work of one model of a cascade for one row.

    Attributes:
        alone: All that its prediction needs.
        added: What the models before it have not done yet.
        wasted: Of that, what no later model needs: lost where a row goes on.
    """

    name: str
    alone: float
    added: float
    wasted: float


def model_costs(program: Program) -> tuple[list[ModelCost], str]:
    """The models' costs in order, and the unit: measured seconds or FLOPs."""
    leaves = facts.output_leaves(program.graph_module)
    count = len(program.signature.outputs)
    costs = program.costs.seconds or program.costs.flops

    def cost(nodes: set[fx.Node]) -> float:
        return float(sum(costs.get(n.name, 0.0) for n in nodes))

    needed = [facts.needed_for(given) for given in [*([leaf] for leaf in leaves[count:]), leaves[:count]]]
    done: set[fx.Node] = set()
    found = []
    for k, (name, mine) in enumerate(zip(program.capture.models, needed, strict=True)):
        added = mine - done
        later = set().union(*needed[k + 1 :])
        found.append(ModelCost(name, cost(mine), cost(added), cost(added - later)))
        done |= mine
    return found, "seconds" if program.costs.seconds else "FLOPs"


def _earned(program: Program, share: float) -> None:
    """Refuses a model that wastes `share` of what the next one adds, or more: the next might as well run at once."""
    costs, unit = model_costs(program)
    bad = [k for k, (a, b) in enumerate(zip(costs, costs[1:], strict=False)) if a.wasted >= share * b.added]
    if not bad:
        return
    one, following = costs[bad[0]], costs[bad[0] + 1]
    ratio = f"{one.wasted / following.added:.2f} times" if following.added else "more than"
    right = [c.name for c in sorted(costs, key=lambda c: c.alone)]
    raise StrategyError(
        "a model of the cascade does not earn its place: it costs too much compared with the next one",
        where=one.name,
        got=f"{ratio} what {following.name} adds to it ({_figures(costs, unit)} a row)",
        wanted=f"less than {share:g} times",
        hint=f"the order by cost is {', '.join(right)}"
        if right != list(program.capture.models)
        else 'leave one out, or pass Cascade(max_head_share=...), or order="given" to take them as they are',
    )


def _figures(costs: Sequence[ModelCost], unit: str) -> str:
    scale, name = (1e-3, "ms") if unit == "seconds" else (1e6, "MFLOPs")
    return ", ".join(f"{c.name}: {c.alone / scale:,.3g} {name}" for c in costs)
