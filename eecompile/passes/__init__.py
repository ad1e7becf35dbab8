"""The passes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from eecompile.capture.export import Captured
from eecompile.errors import StrategyError
from eecompile.ir.choices import ChoiceRecords
from eecompile.ir.recipes import Recipe
from eecompile.passes import facts
from eecompile.passes.adopt_blocks import AdoptBlocks, StageBlocks
from eecompile.passes.annotate import Annotate
from eecompile.passes.base import Pass, PassResult, check_order, run_passes
from eecompile.passes.carried import Brought
from eecompile.passes.carried_choices import AdoptChoices
from eecompile.passes.equilibrium import Equilibrium
from eecompile.passes.find_blocks import FindBlocks
from eecompile.passes.find_cuts import FindCuts
from eecompile.passes.find_regions import FindRegions
from eecompile.passes.find_token_parts import FindTokenParts
from eecompile.passes.insert_exits import COMBINATION, InsertExits, relocate
from eecompile.passes.insert_gates import InsertGates, norms_name, relocate_gates
from eecompile.passes.insert_halting import InsertHalting, relocate_halting
from eecompile.passes.insert_routes import InsertRoutes, relocate_route
from eecompile.passes.lower import Lower
from eecompile.passes.normalize import Normalize
from eecompile.passes.place_exits import PlaceExits
from eecompile.passes.place_gates import GATES, PlaceGates
from eecompile.passes.place_halting import PlaceHalting
from eecompile.passes.place_routes import ROUTES, PlaceRoutes
from eecompile.passes.share import Share
from eecompile.passes.split_tail import SplitTail
from eecompile.passes.stage import StagePass
from eecompile.passes.training_graph import read_copies
from eecompile.passes.unfold import Unfold
from eecompile.passes.verify import Verify
from eecompile.program import Program
from eecompile.signature import Signature


def analysis(captured: Captured, measure: bool = False, blocks: str | None = None) -> list[Pass]:
    """What every strategy needs to know before it can be placed."""
    if captured.front_end == "blocks":
        return [AdoptBlocks(captured.blocks)]
    return [*prepared(captured.models), Annotate(captured.flat_example, measure), FindBlocks(blocks), Unfold(), FindCuts()]


def prepared(models: tuple[str, ...]) -> list[Pass]:
    """What comes before anything is counted; several models may share work."""
    return [Normalize(), SplitTail(), *([Share()] if models else [])]


def insertion(recipe: Recipe, captured: Captured, seed: int, brought: Brought | None = None) -> list[Pass]:
    """What puts a recipe into the graph and lowers it. Each primitive has passes of its own; absent ones add none."""
    brought = brought or Brought()
    passes: list[Pass] = []
    routing: list[Pass] = []
    if recipe.routes is not None:
        if captured.front_end != "export":
            raise StrategyError(
                "a router needs the graph of the model", got=f"capture={captured.front_end!r}", wanted="export"
            )
        routing = [PlaceRoutes(recipe.routes, captured.flat_example), InsertRoutes(recipe.routes, seed=seed)]
    if recipe.gates is not None:
        passes += [
            FindRegions(),
            PlaceGates(recipe.gates, captured.flat_example),
            InsertGates(recipe.gates, seed=seed),
        ]
    if recipe.halting is not None:
        passes += [
            *([] if recipe.gates is not None else [FindRegions()]),
            PlaceHalting(recipe.halting, captured.flat_example),
            InsertHalting(recipe.halting, seed=seed),
            *([FindTokenParts()] if recipe.halting.unit == "token" else []),
        ]
    for one in brought.choices:
        passes.append(AdoptChoices(one))
        passes += [InsertGates(r, units=one.units) for r in one.choices.gate_recipes]
        for halting in one.choices.halt_recipes:
            passes.append(InsertHalting(halting, units=one.units))
            passes += [FindTokenParts()] if halting.unit == "token" else []
    if recipe.routes is not None and recipe.routes.branches:  # exits come after them: they may not lie among the branches
        passes += [*([FindRegions()] if recipe.gates is None and recipe.halting is None else []), *routing]
        routing = []
    passes += [PlaceExits(recipe.exits, captured.flat_example, brought), *routing]
    if recipe.exits is not None:
        passes.append(InsertExits(recipe.exits.head, recipe.exits.threshold, seed=seed, brought=brought))
    else:  # no exit, but the marked graph still selects and reports what it did
        passes.append(InsertExits())
    if captured.front_end == "blocks":
        return [*passes, StageBlocks(), Verify(captured.flat_example)]
    return [*passes, StagePass(), Lower(), Verify(captured.flat_example)]


def prepare_training_graph(
    program: Program, graph_module: fx.GraphModule, signature: Signature, equilibrium: bool = False
) -> Program:
    """What was put into `program` in the train-mode capture of the same model; all that was inserted is shared.

    Args:
        equilibrium: Whether gradients are scaled at the exits (Li et al. 2019).
    """
    assert program.marked is not None
    train = Program(graph_module, graph_module, signature, capture=program.capture, settings=program.settings)
    train = train.replace(index=program.prediction.index)
    known = FindBlocks(program.structure.block_pattern)
    train = run_passes(train, [Normalize(), SplitTail(), Annotate(), known, Unfold(), FindCuts()])
    if hasattr(program.marked, GATES):
        units = dict(program.marked.get_submodule(GATES).named_children())
        train = inserted_again(train, program.choices, units)
    if program.choices.route is not None and program.choices.route_recipe is not None:
        modules = dict(program.marked.get_submodule(ROUTES).named_children())
        # the router's places only; its exits are set below
        train = relocate_route(train.replace(exits=program.exits), program.choices.route)
        train = run_passes(train, [InsertRoutes(program.choices.route_recipe, modules=modules)])
    heads = {e.name: facts.attribute(program.marked, e.head) for e in program.exits}
    train = train.establish("exits placed").replace(exits=relocate(train, program.exits))
    combination = getattr(program.marked, COMBINATION, None)
    passes: list[Pass] = [InsertExits(heads=heads, combination=combination)]
    train = run_passes(train, [*passes, Equilibrium()] if equilibrium else passes)
    read_copies(train.graph_module)
    facts.tidy(train.graph_module)
    return train


def inserted_again(program: Program, like: ChoiceRecords, units: Mapping[str, nn.Module]) -> Program:
    """The gates and halting steps of `like` in another capture of the same model; units are shared.

    Args:
        units: By the names that they have in `like`.
    """
    for k, gate_recipe in enumerate(like.gate_recipes):
        gates = tuple(g for g in like.gates if g.group == k)
        names = {g.unit for g in gates} | {f"{GATES}.{norms_name(w)}" for w in like.widths}
        own = {name: u for name, u in units.items() if f"{GATES}.{name}" in names}
        insert = InsertGates(gate_recipe, units=own)
        program = run_passes(relocate_gates(program, gates, like.widths), [insert])
    for k, halt_recipe in enumerate(like.halt_recipes):
        halts = tuple(h for h in like.halts if h.group == k)
        own = {name: u for name, u in units.items() if f"{GATES}.{name}" in {s.unit for h in halts for s in h.steps}}
        halting = InsertHalting(halt_recipe, units=own)
        program = run_passes(relocate_halting(program, halts), [halting, FindTokenParts()])
    return program


__all__ = [
    "AdoptBlocks",
    "Annotate",
    "Equilibrium",
    "FindBlocks",
    "FindCuts",
    "FindRegions",
    "FindTokenParts",
    "InsertExits",
    "InsertGates",
    "InsertHalting",
    "InsertRoutes",
    "Lower",
    "Normalize",
    "Pass",
    "PassResult",
    "PlaceExits",
    "PlaceGates",
    "PlaceHalting",
    "PlaceRoutes",
    "Share",
    "SplitTail",
    "StageBlocks",
    "StagePass",
    "Unfold",
    "Verify",
    "analysis",
    "check_order",
    "insertion",
    "prepare_training_graph",
    "prepared",
    "run_passes",
]
