"""The gates of a saved program, put back where they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eecompile.errors import ArtifactError
from eecompile.gates import GateUnit, RecurrentCore, rebuild
from eecompile.passes import InsertGates, run_passes
from eecompile.passes.insert_gates import relocate_gates
from eecompile.program import Anchor, Carry, Gate, Program
from eecompile.strategies.base import GateRecipe


def insert_saved_gates(program: Program, data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Inserts the gates that a manifest describes; takes their weights out of `tensors`.

    Raises:
        ArtifactError: The weights do not fit the units.
    """
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["recipe"].items()}
    recipe = GateRecipe(**options)
    shared = RecurrentCore(recipe.open_bias) if recipe.unit == "recurrent" else None
    units: dict[str, GateUnit] = {name: rebuild(d, shared) for name, d in data["units"].items()}
    for name, unit in units.items():
        prefix = f"gates.{name}."
        own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        wrong = sorted(set(own) ^ set(unit.state_dict()))
        if wrong:
            raise ArtifactError("the weights do not fit the gates", where=name, got=wrong[:5])
        dtype = next((t.dtype for t in own.values() if t.is_floating_point()), None)
        unit.to(dtype=dtype)
        unit.load_state_dict(own)
    gates = tuple(_gate(g) for g in data["records"])
    insert = InsertGates(recipe, units=units, thresholds=tensors.pop("gate_thresholds"))
    return run_passes(relocate_gates(program, gates), [insert])


def _gate(data: dict[str, Any]) -> Gate:
    fields = dict(data)
    fields["carries"] = tuple(Carry(**c) for c in fields["carries"])
    fields["anchors"] = tuple(None if a is None else Anchor(**a) for a in fields["anchors"])
    return Gate(**fields)
