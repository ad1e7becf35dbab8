"""The passes, in the order in which they run."""

from __future__ import annotations

from torch import fx

from eecompile.capture.export import Captured
from eecompile.passes import facts
from eecompile.passes.adopt_blocks import AdoptBlocks, StageBlocks
from eecompile.passes.annotate import Annotate
from eecompile.passes.base import Pass, PassResult, check_order, run_passes
from eecompile.passes.carried import Brought
from eecompile.passes.equilibrium import Equilibrium
from eecompile.passes.find_blocks import FindBlocks
from eecompile.passes.find_cuts import FindCuts
from eecompile.passes.find_regions import FindRegions
from eecompile.passes.insert_exits import TEMPERATURES, THRESHOLDS, InsertExits, relocate
from eecompile.passes.insert_gates import GATE_THRESHOLDS, InsertGates, relocate_gates
from eecompile.passes.insert_halting import HALT_SCALE, InsertHalting, relocate_halting
from eecompile.passes.lower import Lower
from eecompile.passes.normalize import Normalize
from eecompile.passes.place_exits import PlaceExits
from eecompile.passes.place_gates import GATES, PlaceGates
from eecompile.passes.place_halting import PlaceHalting
from eecompile.passes.share import Share
from eecompile.passes.stage import StagePass
from eecompile.passes.verify import Verify
from eecompile.program import Program
from eecompile.signature import Signature
from eecompile.strategies.base import Recipe


def analysis(captured: Captured, measure: bool = False, blocks: str | None = None) -> list[Pass]:
    """What every strategy needs to know before it can be placed."""
    if captured.front_end == "blocks":
        return [AdoptBlocks(captured.blocks)]
    return [*prepared(captured.models), Annotate(captured.flat_example, measure), FindBlocks(blocks), FindCuts()]


def prepared(models: tuple[str, ...]) -> list[Pass]:
    """What comes before anything is counted; several models may share work."""
    return [Normalize(), Share()] if models else [Normalize()]


def insertion(recipe: Recipe, captured: Captured, seed: int, brought: Brought | None = None) -> list[Pass]:
    """What puts a recipe into the graph and lowers it. Each primitive has passes of its own; absent ones add none."""
    brought = brought or Brought()
    passes: list[Pass] = []
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
        ]
    passes.append(PlaceExits(recipe.exits, captured.flat_example, brought))
    if recipe.exits is not None:
        passes.append(InsertExits(recipe.exits.head, recipe.exits.threshold, seed=seed, brought=brought))
    else:  # no exit, but the marked graph still selects and tells what it did
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
    train = Program(graph_module, graph_module, signature, prediction=program.prediction, models=program.models)
    train = train.replace(places=program.places)
    train = run_passes(train, [Normalize(), Annotate(), FindBlocks(), FindCuts()])
    if program.gate_recipe is not None:
        units = dict(program.marked.get_submodule(GATES).named_children())
        insert = InsertGates(program.gate_recipe, units=units, thresholds=getattr(program.marked, GATE_THRESHOLDS))
        train = run_passes(relocate_gates(train, program.gates, program.widths), [insert])
    if program.halt_recipe is not None:
        units = dict(program.marked.get_submodule(GATES).named_children())
        halting = InsertHalting(program.halt_recipe, units=units, scale=getattr(program.marked, HALT_SCALE))
        train = run_passes(relocate_halting(train, program.halts), [halting])
    heads = {e.name: facts.attribute(program.marked, e.head) for e in program.exits}
    buffers = {name: getattr(program.marked, name) for name in (THRESHOLDS, TEMPERATURES)}
    train = train.replace(exits=relocate(train, program.exits), facts=train.facts | {"exits placed"})
    passes: list[Pass] = [InsertExits(heads=heads, buffers=buffers)]
    return run_passes(train, [*passes, Equilibrium()] if equilibrium else passes)


__all__ = [
    "AdoptBlocks",
    "Annotate",
    "Equilibrium",
    "FindBlocks",
    "FindCuts",
    "FindRegions",
    "InsertExits",
    "InsertGates",
    "InsertHalting",
    "Lower",
    "Normalize",
    "Pass",
    "PassResult",
    "PlaceExits",
    "PlaceGates",
    "PlaceHalting",
    "Share",
    "StageBlocks",
    "StagePass",
    "Verify",
    "analysis",
    "check_order",
    "insertion",
    "prepare_training_graph",
    "prepared",
    "run_passes",
]
