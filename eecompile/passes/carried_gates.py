"""Gates and halting chains of already compiled models that become models of a cascade."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from eecompile.errors import PassError, StrategyError
from eecompile.ir.recipes import GateRecipe, HaltRecipe
from eecompile.ir.settings import GATES as GATE_THRESHOLDS
from eecompile.ir.settings import HALTING
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.insert_gates import relocate_gates
from eecompile.passes.insert_halting import relocate_halting
from eecompile.passes.place_gates import GATES, site_of
from eecompile.program import Anchor, Gate, Halt, Program

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

NO_MASK = ""  # as a recipe's mask: no input marks padding, whatever names there are


@dataclass(frozen=True)
class CarriedGates:
    """The gates of one compiled model, as the cascade's graph will know them.

    Attributes:
        recipe: What they were inserted by, with their present thresholds.
        units: Their units, shared with the compiled model, by the names that they have in the cascade.
    """

    model: str
    recipe: GateRecipe
    gates: tuple[Gate, ...]
    units: Mapping[str, nn.Module]


@dataclass(frozen=True)
class CarriedHalts:
    """The halting chains of one compiled model."""

    model: str
    recipe: HaltRecipe
    halts: tuple[Halt, ...]
    units: Mapping[str, nn.Module]


def originals(program: Program) -> dict[str, str]:
    """The model's own value that stands where a gate or a chain hands on another one, by the latter's name."""
    found = {c.node: c.y for g in program.choices.gates for c in g.carries}
    for h in program.choices.halts:
        found |= {n: y for s, y in zip(h.steps, h.ys, strict=True) for n in (s.value, s.last)}
        found[h.output] = h.ys[-1]
    return found


def carried_gates(
    name: str, fast: CompiledModule, moved: Callable[[Anchor | None], Anchor | None], plain: bool
) -> CarriedGates | None:
    """What a model's gates are in the cascade; None without gates.

    Raises:
        StrategyError: A unit reads an input that is prepared for the model here.
    """
    program: Program = fast.program
    if not program.choices.gate_recipes:
        return None
    recipe = program.choices.gate_recipes[0]
    mask = _mask(name, program, [g.region for g in program.choices.gates], recipe, plain)
    recipe = replace(recipe, threshold=fast.live.wanted[GATE_THRESHOLDS], mask=mask)
    gates = tuple(
        replace(
            g,
            region=f"{name}.{g.region}",
            unit=_unit(name, g.unit),
            score="",
            decision="",
            needs="",
            anchors=(moved(g.anchors[0]), moved(g.anchors[1])),
        )
        for g in program.choices.gates
    )
    return CarriedGates(name, recipe, gates, _units(name, fast))


def carried_halts(
    name: str, fast: CompiledModule, moved: Callable[[Anchor | None], Anchor | None], plain: bool
) -> CarriedHalts | None:
    """What a model's halting chains are in the cascade; None without any."""
    program: Program = fast.program
    if not program.choices.halt_recipes:
        return None
    recipe = program.choices.halt_recipes[0]
    regions = [s.region for h in program.choices.halts for s in h.steps]
    (threshold,) = fast.live.wanted[HALTING]
    recipe = replace(recipe, threshold=threshold, mask=_mask(name, program, regions, recipe, plain))
    halts = []
    for h in program.choices.halts:
        steps = tuple(
            replace(
                s,
                region=f"{name}.{s.region}",
                unit=_unit(name, s.unit),
                anchors=(moved(s.anchors[0]), moved(s.anchors[1])),
            )
            for s in h.steps
        )
        halts.append(replace(h, steps=steps))
    return CarriedHalts(name, recipe, tuple(halts), _units(name, fast))


def _unit(model: str, unit: str) -> str:
    return f"{GATES}.{model}_{unit.rsplit('.', 1)[1]}"


def _units(model: str, fast: CompiledModule) -> dict[str, nn.Module]:
    return {f"{model}_{name}": unit for name, unit in fast.gate_units.named_children()}


def _mask(name: str, program: Program, wanted: list[str], recipe: GateRecipe | HaltRecipe, plain: bool) -> str | None:
    """The input that marks padding for the units of the regions `wanted`, by its name in the cascade.

    Raises:
        StrategyError: It is prepared for this model, so the cascade's graph has no input of that kind.
    """
    before = program.replace(graph_module=program.history["find_regions"].graph_module)
    found = {site_of(before, r, recipe.mask)[1] for r in program.structure.regions if r.name in wanted}
    masks = {node for node in found if node is not None}
    if not masks:
        return NO_MASK
    node = masks.pop()
    paths = [leaf.path for leaf in program.signature.inputs]
    path = paths[[n.name for n in facts.placeholders(before.graph_module)].index(node)]
    if not plain:
        raise StrategyError(
            "a gate of this compiled model reads an input that is prepared for it here",
            where=name,
            got=path,
            hint="pass the original model, or leave prepare= and inputs= out for it",
        )
    return path if len(found) == 1 else recipe.mask


@dataclass(frozen=True)
class AdoptGates(Pass):
    """Finds the places of a compiled model's gates in the cascade's graph; `insert_gates` follows."""

    name: ClassVar[str] = "adopt_gates"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "cuts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gates placed"})

    carried: CarriedGates

    def run(self, program: Program) -> PassResult:
        first = len(program.choices.gates)
        gates = [replace(g, name=f"gate_{first + i}") for i, g in enumerate(self.carried.gates)]
        depths = depths_of(program)
        with _elsewhere(self.carried.model):
            found = relocate_gates(program, tuple(gates))
        moved = []
        for g in found.choices.gates[first:]:
            _its_own(found, self.carried.model, g.region, g.carries[0].y)
            moved.append(replace(g, depth=depths[g.carries[0].x]))
        done = found.replace(gates=(*program.choices.gates, *moved))
        return PassResult(done, False, summary=f"{len(gates)} gates of {self.carried.model}")


@dataclass(frozen=True)
class AdoptHalting(Pass):
    """Finds the places of a compiled model's halting chains in the cascade's graph; `insert_halting` follows."""

    name: ClassVar[str] = "adopt_halting"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "cuts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"halting placed"})

    carried: CarriedHalts

    def run(self, program: Program) -> PassResult:
        first = len(program.choices.halts)
        halts = []
        for i, h in enumerate(self.carried.halts):
            name = f"halt_{first + i}"
            steps = tuple(replace(s, name=f"{name}_step_{k}") for k, s in enumerate(h.steps))
            halts.append(replace(h, name=name, steps=steps))
        depths = depths_of(program)
        with _elsewhere(self.carried.model):
            found = relocate_halting(program, tuple(halts))
        moved = []
        for h in found.choices.halts[first:]:
            for y in h.ys:
                _its_own(found, self.carried.model, h.name, y)
            moved.append(replace(h, depth=depths[h.x]))
        done = found.replace(halts=(*program.choices.halts, *moved))
        return PassResult(done, False, summary=f"{len(halts)} chains of {self.carried.model}")


def depths_of(program: Program) -> dict[str, float]:
    """Fraction of the full model's cost up to each node."""
    done, found = 0.0, {}
    for n in program.graph_module.graph.nodes:
        done += program.costs.flops.get(n.name, 0.0)
        found[n.name] = done / (program.total_flops or 1.0)
    return found


@contextlib.contextmanager
def _elsewhere(model: str) -> Iterator[None]:
    """A region that is not found under its model's name is that of a module that another model has too."""
    try:
        yield
    except PassError as error:
        raise _shared(model, str(error.where), "another model") from error


def _shared(model: str, where: str, others: str) -> StrategyError:
    return StrategyError(
        "a layer with a gate or halting is shared by two models of the cascade",
        where=where,
        got=f"{model} and {others}",
        wanted="layers of its own: what one skips the other still needs",
        hint=f"pass the original model for {model}",
    )


def _its_own(program: Program, model: str, where: str, value: str) -> None:
    """Refuses a layer that two models share: what is skipped for one would be skipped for the other.

    Raises:
        StrategyError: Another model's prediction needs it.
    """
    leaves = facts.output_leaves(program.graph_module)
    count = len(program.signature.outputs)
    given = dict(zip(program.capture.models, [*([leaf] for leaf in leaves[count:]), leaves[:count]], strict=True))
    node = facts.by_name(program.graph_module)[value]
    others = [name for name, own in given.items() if name != model and node in facts.needed_for(own)]
    if others:
        raise _shared(model, where, ", ".join(others))
