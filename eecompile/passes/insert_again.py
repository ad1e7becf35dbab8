"""Gates, halting steps and routers that are known already, inserted into another capture of the same model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from eecompile.ir.choices import ChoiceRecords
from eecompile.passes.base import Pass, run_passes
from eecompile.passes.find_token_parts import FindTokenParts
from eecompile.passes.insert_gates import InsertGates, norms_name, relocate_gates
from eecompile.passes.insert_halting import InsertHalting, relocate_halting
from eecompile.passes.insert_routes import InsertRoutes, relocate_route
from eecompile.passes.place_gates import GATES
from eecompile.program import Exit, Program


def inserting(choices: ChoiceRecords, units: Mapping[str, nn.Module]) -> list[Pass]:
    """The passes that insert the gates and halting chains of a compiled model once their places are known."""
    passes: list[Pass] = [InsertGates(r, units=units) for r in choices.gate_recipes]
    for recipe in choices.halt_recipes:
        passes += [InsertHalting(recipe, units=units), *([FindTokenParts()] if recipe.unit == "token" else [])]
    return passes


def inserted_again(
    program: Program,
    like: ChoiceRecords,
    exits: tuple[Exit, ...],
    units: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
) -> Program:
    """What `like` says in another capture of the same model; units are shared.

    Args:
        exits: Those that a router sends rows to; where they are in this capture is left to be found.
        units: Of gates and halting steps, by the names that they have in `like`.
        modules: As for `InsertRoutes`.
    """
    for k, gate_recipe in enumerate(like.gate_recipes):
        gates = tuple(g for g in like.gates if g.group == k)
        names = {g.unit for g in gates} | {f"{GATES}.{norms_name(w)}" for w in like.widths}
        own = {name: u for name, u in units.items() if f"{GATES}.{name}" in names}
        program = run_passes(relocate_gates(program, gates, like.widths), [InsertGates(gate_recipe, units=own)])
    for k, halt_recipe in enumerate(like.halt_recipes):
        chains = tuple(h for h in like.chains if h.group == k)
        own = {name: u for name, u in units.items() if f"{GATES}.{name}" in {s.unit for h in chains for s in h.steps}}
        program = relocate_halting(program, chains)
        program = run_passes(program, [InsertHalting(halt_recipe, units=own), FindTokenParts()])
    if like.route is not None and like.route_recipe is not None:
        program = relocate_route(program.replace(exits=exits), like.route)
        program = run_passes(program, [InsertRoutes(like.route_recipe, modules=modules)])
    return program
