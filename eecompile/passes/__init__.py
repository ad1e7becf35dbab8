"""The passes, in the order in which they run."""

from __future__ import annotations

from torch import fx, nn

from eecompile.capture.export import Captured
from eecompile.errors import StrategyError
from eecompile.ir.recipes import Recipe
from eecompile.passes import facts
from eecompile.passes.adopt_blocks import AdoptBlocks, StageBlocks
from eecompile.passes.annotate import Annotate
from eecompile.passes.base import Pass, PassResult, check_order, run_passes
from eecompile.passes.carried import Brought
from eecompile.passes.equilibrium import Equilibrium
from eecompile.passes.find_blocks import FindBlocks
from eecompile.passes.find_cuts import FindCuts
from eecompile.passes.find_regions import FindRegions
from eecompile.passes.find_token_parts import FindTokenParts
from eecompile.passes.insert_again import inserted_again, inserting
from eecompile.passes.insert_exits import COMBINATION, InsertExits, relocate
from eecompile.passes.insert_gates import InsertGates
from eecompile.passes.insert_halting import InsertHalting
from eecompile.passes.insert_routes import InsertRoutes
from eecompile.passes.lower import Lower
from eecompile.passes.normalize import Normalize
from eecompile.passes.place_carried import AdoptChoices
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
        passes += [AdoptChoices(one), *inserting(one.choices, one.units)]
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
    units, modules = (dict(getattr(program.marked, n, nn.Module()).named_children()) for n in (GATES, ROUTES))
    train = inserted_again(train, program.choices, program.exits, units, modules)
    heads = {e.name: facts.attribute(program.marked, e.head) for e in program.exits}
    train = train.establish("exits placed").replace(exits=relocate(train, program.exits))
    combination = getattr(program.marked, COMBINATION, None)
    passes: list[Pass] = [InsertExits(heads=heads, combination=combination)]
    train = run_passes(train, [*passes, Equilibrium()] if equilibrium else passes)
    read_copies(train.graph_module)
    facts.tidy(train.graph_module)
    return train


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
    "inserted_again",
    "insertion",
    "prepare_training_graph",
    "prepared",
    "run_passes",
]
