"""The gates and halting steps of a saved program, put back where they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.passes import InsertGates, InsertHalting, run_passes
from eecompile.passes.insert_gates import relocate_gates
from eecompile.passes.insert_halting import relocate_halting
from eecompile.program import Anchor, Carry, Gate, Halt, HaltStep, Program, Width
from eecompile.strategies.base import GateRecipe, HaltRecipe


def insert_saved_gates(program: Program, data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Inserts the gates or halting steps that a manifest describes; takes their weights out of `tensors`.

    Raises:
        ArtifactError: The weights do not fit the units.
    """
    saved = data["halting" if "halting" in data else "recipe"]
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    shared = RecurrentCore(options["open_bias"]) if options.get("unit") == "recurrent" else None
    units: dict[str, nn.Module] = {name: rebuild(d, shared) for name, d in data["units"].items()}
    for name, unit in units.items():
        prefix = f"gates.{name}."
        own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        wrong = sorted(set(own) ^ set(unit.state_dict()))
        if wrong:
            raise ArtifactError("the weights do not fit the gates", where=name, got=wrong[:5])
        dtype = next((t.dtype for t in own.values() if t.is_floating_point()), None)
        unit.to(dtype=dtype)
        unit.load_state_dict(own)
    if "halting" in data:
        halts = tuple(_halt(h) for h in data["records"])
        halting = InsertHalting(HaltRecipe(**options), units=units, scale=tensors.pop("halt_scale"))
        return run_passes(relocate_halting(program, halts), [halting])
    gates = tuple(_gate(g) for g in data["records"])
    widths = tuple(_width(w) for w in data.get("widths", ()))
    insert = InsertGates(GateRecipe(**options), units=units, thresholds=tensors.pop("gate_thresholds"))
    return run_passes(relocate_gates(program, gates, widths), [insert])


def _gate(data: dict[str, Any]) -> Gate:
    fields = dict(data)
    fields["carries"] = tuple(Carry(**c) for c in fields["carries"])
    fields["anchors"] = tuple(None if a is None else Anchor(**a) for a in fields["anchors"])
    return Gate(**fields)


def _width(data: dict[str, Any]) -> Width:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    fields["channels"] = tuple(tuple(c) for c in fields["channels"])
    return Width(**fields)


def _halt(data: dict[str, Any]) -> Halt:
    fields = dict(data)
    fields["steps"] = tuple(_step(s) for s in fields["steps"])
    fields["ys"] = tuple(fields["ys"])
    return Halt(**fields)


def _step(data: dict[str, Any]) -> HaltStep:
    fields = dict(data)
    fields["carries"] = ()  # written anew
    fields["anchors"] = tuple(None if a is None else Anchor(**a) for a in fields["anchors"])
    return HaltStep(**fields)
