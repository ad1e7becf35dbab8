"""The gates, halting steps and router of a saved program, put back where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from eecompile.artifact.records import record
from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.ir.choices import ChoiceRecords
from eecompile.passes import FindRegions, InsertRoutes, inserted_again, run_passes
from eecompile.passes.insert_routes import light_of, relocate_route
from eecompile.program import Program
from eecompile.routers import rebuild as rebuild_router


def insert_saved_gates(program: Program, data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Inserts the gates and halting steps that a manifest describes; takes their weights out of `tensors`.

    Raises:
        ArtifactError: The weights do not fit the units.
    """
    saved = saved_choices(data)
    shared = {k: RecurrentCore(r.open_bias) for k, r in enumerate(saved.gate_recipes) if r.unit == "recurrent"}
    groups = {g.unit.rsplit(".", 1)[1]: g.group for g in saved.gates}
    units: dict[str, nn.Module] = {n: rebuild(d, shared.get(groups.get(n, -1))) for n, d in data["units"].items()}
    for name, unit in units.items():
        _fill(unit, "gates", name, tensors)
    return inserted_again(program, saved, units)


def saved_choices(data: dict[str, Any]) -> ChoiceRecords:
    """The records in a manifest."""
    return record(ChoiceRecords, {**data["records"], "route_recipe": data["route_recipe"]})


def insert_saved_routes(
    program: Program, data: dict[str, Any], tensors: dict[str, Tensor], customs: Mapping[str, nn.Module]
) -> Program:
    """Inserts the router that a manifest describes, if there is one; takes its weights out of `tensors`.

    Args:
        customs: Branches that were modules of the user's.

    Raises:
        ArtifactError: The weights do not fit, or a branch is missing.
    """
    saved = saved_choices(data)
    if saved.route_recipe is None or saved.route is None:
        return program
    if any(w.left_out for w in saved.route.ways):
        program = run_passes(program, [FindRegions()])
    program = relocate_route(program, saved.route)
    route = program.choices.route
    assert route is not None
    modules: dict[str, nn.Module] = {"unit": rebuild_router(data["router"])}
    for way in (w for w in route.ways if w.module):
        if way.custom and way.name not in customs:
            raise ArtifactError("a branch is missing", where=way.name, got=", ".join(customs) or "none")
        attribute = way.module.rpartition(".")[2]
        modules[attribute] = _single(customs[way.name]) if way.custom else light_of(program, route, way)
    for name, module in modules.items():
        if name.removeprefix("branch_") not in customs:
            _fill(module, "routes", name, tensors)
    return run_passes(program, [InsertRoutes(saved.route_recipe, modules=modules)])


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
