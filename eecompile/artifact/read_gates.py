"""The gates and halting steps of a saved program, put back where they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eecompile.errors import ArtifactError
from eecompile.gates import RecurrentCore, rebuild
from eecompile.passes import inserted_again
from eecompile.program import Anchor, Carry, Gate, Halt, HaltStep, Program, Width
from eecompile.strategies.base import GateRecipe, HaltRecipe


def insert_saved_gates(program: Program, data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Inserts the gates and halting steps that a manifest describes; takes their weights out of `tensors`.

    Raises:
        ArtifactError: The weights do not fit the units.
    """
    gates, halts = tuple(_gate(g) for g in data["gates"]), tuple(_halt(h) for h in data["halts"])
    recipes = [GateRecipe(**_options(r)) for r in data["recipes"]]
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
        widths=tuple(_width(w) for w in data["widths"]),
        halts=halts,
        gate_recipes=tuple(recipes),
        halt_recipes=tuple(HaltRecipe(**_options(r)) for r in data["halting"]),
    )
    return inserted_again(program, like, units)


def _options(saved: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


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
    fields["carries"] = fields["parts"] = ()  # written and found anew
    fields["anchors"] = tuple(None if a is None else Anchor(**a) for a in fields["anchors"])
    return HaltStep(**fields)
