"""The gates, halting steps and router of a saved program, put back where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from eecompile.artifact.records import record, records
from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.ir.recipes import GateRecipe, HaltRecipe, RouteRecipe
from eecompile.passes import FindRegions, InsertRoutes, inserted_again, run_passes
from eecompile.passes.insert_routes import light_of, relocate_routes
from eecompile.program import Gate, Halt, Program, Route, Width
from eecompile.routers import rebuild as rebuild_router


def insert_saved_gates(program: Program, data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Inserts the gates and halting steps that a manifest describes; takes their weights out of `tensors`.

    Raises:
        ArtifactError: The weights do not fit the units.
    """
    gates, recipes = records(Gate, data["gates"]), records(GateRecipe, data["recipes"])
    shared = {k: RecurrentCore(r.open_bias) for k, r in enumerate(recipes) if r.unit == "recurrent"}
    groups = {g.unit.rsplit(".", 1)[1]: g.group for g in gates}
    units: dict[str, nn.Module] = {n: rebuild(d, shared.get(groups.get(n, -1))) for n, d in data["units"].items()}
    for name, unit in units.items():
        _fill(unit, "gates", name, tensors)
    like = program.replace(
        gates=gates,
        widths=records(Width, data["widths"]),
        halts=records(Halt, data["halts"]),
        gate_recipes=recipes,
        halt_recipes=records(HaltRecipe, data["halting"]),
    )
    return inserted_again(program, like, units)


def insert_saved_routes(
    program: Program, data: dict[str, Any], tensors: dict[str, Tensor], customs: Mapping[str, nn.Module]
) -> Program:
    """Inserts the router that a manifest describes; takes its weights out of `tensors`.

    Args:
        customs: Branches that were modules of the user's.

    Raises:
        ArtifactError: The weights do not fit, or a branch is missing.
    """
    recipe, routes = record(RouteRecipe, data["recipe"]), records(Route, data["records"])
    if any(w.left_out for r in routes for w in r.ways):
        program = run_passes(program, [FindRegions()])
    program = relocate_routes(program, routes)
    (route,) = program.choices.routes
    modules: dict[str, nn.Module] = {"unit": rebuild_router(data["unit"])}
    for way in (w for w in route.ways if w.module):
        if way.custom and way.name not in customs:
            raise ArtifactError("a branch is missing", where=way.name, got=", ".join(customs) or "none")
        attribute = way.module.rpartition(".")[2]
        modules[attribute] = _single(customs[way.name]) if way.custom else light_of(program, route, way)
    for name, module in modules.items():
        if name.removeprefix("branch_") not in customs:
            _fill(module, "routes", name, tensors)
    return run_passes(program, [InsertRoutes(recipe, modules=modules)])


def _fill(module: nn.Module, kind: str, name: str, tensors: dict[str, Tensor]) -> None:
    """Loads a module's weights, which it takes out of `tensors`."""
    prefix = f"{kind}.{name}."
    own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
    wrong = sorted(set(own) ^ set(module.state_dict()))
    if wrong:
        raise ArtifactError(f"the weights do not fit the {kind}", where=name, got=wrong[:5])
    if not isinstance(module, fx.GraphModule):  # a light version has the dtypes of the model
        module.to(dtype=next((t.dtype for t in own.values() if t.is_floating_point()), None))
    module.load_state_dict(own)


def _single(module: nn.Module) -> nn.Module:
    """An exported module gives a tuple of one; a branch gives the tensor."""
    assert isinstance(module, fx.GraphModule)
    output = module.graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
    module.recompile()
    return module
