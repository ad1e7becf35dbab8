"""The gates, halting steps and router of a saved program, put back where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from eecompile.artifact.records import record
from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.heads import from_data
from eecompile.ir.choices import ChoiceRecords
from eecompile.passes import FindRegions, inserted_again, run_passes
from eecompile.passes.place_routes import ROUTES
from eecompile.program import Exit, Program
from eecompile.routers import UNITS as ROUTERS


def insert_saved(
    program: Program,
    data: dict[str, Any],
    exits: tuple[Exit, ...],
    tensors: dict[str, Tensor],
    customs: Mapping[str, nn.Module],
) -> Program:
    """Inserts what a manifest describes apart from exits; takes the weights of its units out of `tensors`.

    Args:
        exits: As the manifest has them.
        customs: Branches that were modules of the user's.

    Raises:
        ArtifactError: The weights do not fit, or a branch is missing.
    """
    saved = record(ChoiceRecords, data["records"])
    shared = {k: RecurrentCore(r.open_bias) for k, r in enumerate(saved.gate_recipes) if r.unit == "recurrent"}
    groups = {g.unit.rsplit(".", 1)[1]: g.group for g in saved.gates}
    units: dict[str, nn.Module] = {n: rebuild(d, shared.get(groups.get(n, -1))) for n, d in data["units"].items()}
    for name, unit in units.items():
        _fill(unit, "gates", name, tensors)
    branches = [arm for c in saved for arm in c.arms if arm.module]
    missing = [arm.name for arm in branches if arm.custom and arm.name not in customs]
    if missing:
        raise ArtifactError("a branch is missing", where=missing[0], got=", ".join(customs) or "none")
    modules = {f"branch_{name}": _single(module) for name, module in customs.items()}
    if data["router"] is not None:
        modules["unit"] = from_data(ROUTERS, data["router"])
    if not all(arm.custom for arm in branches):
        program = run_passes(program, [FindRegions()])
    program = inserted_again(program, saved, exits, units, modules)
    for name, module in getattr(program.graph_module, ROUTES, nn.Module()).named_children():
        if name.removeprefix("branch_") not in customs:
            _fill(module, "routes", name, tensors)
    return program


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
