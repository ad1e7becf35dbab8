"""Gates and halting chains of already compiled models that become models of a cascade."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from eecompile.errors import PassError, StrategyError
from eecompile.ir.choices import ChoiceRecords
from eecompile.ir.recipes import GateRecipe, HaltRecipe
from eecompile.ir.settings import GATES as GATE_THRESHOLDS
from eecompile.ir.settings import HALTING
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.insert_gates import relocate_gates
from eecompile.passes.insert_halting import relocate_halting
from eecompile.passes.place_gates import GATES, site_of
from eecompile.program import Anchor, Program

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

NO_MASK = ""  # as a recipe's mask: no input marks padding, whatever names there are


@dataclass(frozen=True)
class CarriedChoices:
    """Gates or halting chains of one compiled model, as the cascade's graph will know them.

    Attributes:
        choices: Their records, with what they were inserted by at the present thresholds.
        units: Their units, shared with the compiled model, by the names that they have in the cascade.
    """

    model: str
    choices: ChoiceRecords
    units: Mapping[str, nn.Module]


def movable(choices: ChoiceRecords) -> bool:
    """Whether what decides inside a compiled model can be moved into a cascade: gates and halting chains can."""
    return choices.route is None and not choices.widths


def originals(program: Program) -> dict[str, str]:
    """The model's own value that stands where a gate or a chain hands on another one, by the latter's name."""
    found = {c.node: c.y for g in program.choices.gates for c in g.carries}
    for h in program.choices.chains:
        found |= {n: y for s, y in zip(h.steps, h.ys, strict=True) for n in (s.value, s.last)}
        found[h.output] = h.ys[-1]
    return found


def carried_choices(
    name: str, fast: CompiledModule, moved: Callable[[Anchor | None], Anchor | None], plain: bool
) -> CarriedChoices:
    """What decides inside a compiled model, for the cascade.

    Raises:
        StrategyError: A unit reads an input that is prepared for the model here.
    """
    choices = fast.program.choices

    def place(one: Any) -> dict[str, Any]:
        anchors = (moved(one.anchors[0]), moved(one.anchors[1]))
        return {"region": f"{name}.{one.region}", "unit": _unit(name, one.unit), "anchors": anchors}

    def recipe(one: Any, regions: list[str], threshold: Any) -> Any:
        return replace(one, threshold=threshold, mask=_mask(name, fast.program, regions, one, plain))

    settings, steps = fast.live.wanted, [s.region for h in choices.chains for s in h.steps]
    gated = [g.region for g in choices.gates]
    moved_choices = ChoiceRecords(
        gates=tuple(replace(g, score="", decision="", needs="", **place(g)) for g in choices.gates),
        chains=tuple(replace(h, steps=tuple(replace(s, **place(s)) for s in h.steps)) for h in choices.chains),
        gate_recipes=tuple(recipe(r, gated, settings[GATE_THRESHOLDS]) for r in choices.gate_recipes),
        halt_recipes=tuple(recipe(r, steps, settings[HALTING][0]) for r in choices.halt_recipes),
    )
    return CarriedChoices(name, moved_choices, _units(name, fast))


def one_halting(carried: Sequence[CarriedChoices]) -> None:
    """Scores of all chains in one program are scaled by one factor.

    Raises:
        StrategyError: Two compiled models halt in ways that one factor cannot give.
    """
    ways = [(c.model, r.threshold, bool(r.repeat)) for c in carried for r in c.choices.halt_recipes]
    for a, b in pairwise(ways):
        if a[1:] != b[1:]:
            kinds = [f"{model}: {'repeats a block' if repeats else 'over depth'}, {t:g}" for model, t, repeats in (a, b)]
            raise StrategyError(
                "two models of the cascade halt in different ways",
                got=" and ".join(kinds),
                wanted="one kind, and one halting threshold (the factor of the scores is its inverse)",
                hint="set_halting_threshold() to the same value in both first",
            )


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
class AdoptChoices(Pass):
    """Finds the places of a compiled model's gates and chains in the cascade's graph; their insertion follows."""

    name: ClassVar[str] = "adopt_choices"
    requires: ClassVar[frozenset[str]] = frozenset({"costs", "cuts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gates placed", "halting placed"})

    carried: CarriedChoices

    def run(self, program: Program) -> PassResult:
        before, carried = program.choices, self.carried.choices
        gates = [replace(g, name=f"gate_{i}") for i, g in enumerate(carried.gates, len(before.gates))]
        halts = []
        for i, h in enumerate(carried.chains, len(before.chains)):
            steps = tuple(replace(s, name=f"halt_{i}_step_{k}") for k, s in enumerate(h.steps))
            halts.append(replace(h, name=f"halt_{i}", steps=steps))
        depths = depths_of(program)
        with _elsewhere(self.carried.model):
            found = relocate_gates(program, tuple(gates)) if gates else program
            found = relocate_halting(found, tuple(halts)) if halts else found
        new_gates, new_halts = found.choices.gates[len(before.gates) :], found.choices.chains[len(before.chains) :]
        values = [(g.region, g.carries[0].y) for g in new_gates] + [(h.name, y) for h in new_halts for y in h.ys]
        for where, value in values:
            _its_own(found, self.carried.model, where, value)
        done = found.replace(
            gates=(*before.gates, *(replace(g, depth=depths[g.carries[0].x]) for g in new_gates)),
            chains=(*before.chains, *(replace(h, depth=depths[h.x]) for h in new_halts)),
        )
        return PassResult(done, False, summary=f"{len(gates)} gates, {len(halts)} chains of {self.carried.model}")


def depths_of(program: Program) -> dict[str, float]:
    """Fraction of the full model's cost up to each node."""
    done, found = 0.0, {}
    for n in program.graph_module.graph.nodes:
        done += program.costs.flops.get(n.name, 0.0)
        found[n.name] = program.share(done)
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
