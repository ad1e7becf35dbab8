"""The gates and halting steps of a saved program, put back where they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eecompile.artifact.records import records
from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.ir.recipes import GateRecipe, HaltRecipe
from eecompile.passes import inserted_again
from eecompile.program import Gate, Halt, Program, Width


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
        prefix = f"gates.{name}."
        own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        wrong = sorted(set(own) ^ set(unit.state_dict()))
        if wrong:
            raise ArtifactError("the weights do not fit the gates", where=name, got=wrong[:5])
        dtype = next((t.dtype for t in own.values() if t.is_floating_point()), None)
        unit.to(dtype=dtype)
        unit.load_state_dict(own)
    like = program.replace(
        gates=gates,
        widths=records(Width, data["widths"]),
        halts=records(Halt, data["halts"]),
        gate_recipes=recipes,
        halt_recipes=records(HaltRecipe, data["halting"]),
    )
    return inserted_again(program, like, units)
