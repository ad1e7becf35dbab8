"""Exits of an already compiled model that becomes one of a cascade's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from torch import fx, nn

from eecompile.errors import PassError, StrategyError
from eecompile.heads import Branch
from eecompile.ir.recipes import ExitRecipe
from eecompile.ir.settings import EXITS, TEMPERATURES, Settings
from eecompile.passes import facts
from eecompile.passes.place_carried import CarriedChoices, carried_choices, movable, one_halting, originals
from eecompile.passes.split_tail import criterion_of
from eecompile.program import Anchor, Cut, Exit, Place, Program

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


@dataclass(frozen=True)
class Carried:
    """One exit of a compiled model, as the composite's graph will know it.

    Attributes:
        exit: As it stands in the compiled model's own program.
        branch: Its head, shared with the compiled model.
        sides: Further inputs of the head: anchors of nodes, or names of the model's inputs.
    """

    place: Place
    exit: Exit
    branch: Branch
    threshold: float
    temperature: float
    sides: tuple[Anchor | str, ...]


@dataclass(frozen=True)
class Brought:
    """All that compiled models bring into a cascade.

    Attributes:
        exits: In order, by the name of their cut in the composite.
        ends: Temperature of each compiled model's own prediction, by the model's name.
        choices: Gates and halting chains of each compiled model.
    """

    exits: Mapping[str, Carried] = field(default_factory=dict)
    ends: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[CarriedChoices, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(c.place for c in self.exits.values())


def unwrapped(models: Mapping[str, nn.Module], plain: Sequence[bool]) -> tuple[dict[str, nn.Module], Brought]:
    """The models with compiled ones replaced by their originals, and what those bring along.

    Args:
        plain: For each whether it takes the cascade's inputs as they are.

    Raises:
        StrategyError: A compiled model that cannot be taken apart.
    """
    found, exits, ends = {}, dict[str, Carried](), {}
    choices = list[CarriedChoices]()
    for (name, model), takes in zip(models.items(), plain, strict=True):
        program = getattr(model, "program", None)
        if not isinstance(program, Program):
            found[name] = model
            continue
        fast = cast("CompiledModule", model)
        found[name] = _able(name, fast, program)
        settings: Settings = fast.live.wanted
        ends[name] = settings[TEMPERATURES][-1]

        def moved(a: Anchor | None, name: str = name) -> Anchor | None:
            return None if a is None else within(name, a)

        choices.append(carried_choices(name, fast, moved, takes))
        for k, e in enumerate(program.exits):
            one = _carried(name, program, e, takes)
            exits[one.place.name] = replace(
                one,
                branch=fast.branch(e.name),
                threshold=settings[EXITS][k],
                temperature=settings[TEMPERATURES][k],
            )
    one_halting(choices)
    return found, Brought(exits, ends, tuple(choices))


def within(name: str, a: Anchor) -> Anchor:
    """An anchor of a model's own graph as it is in the cascade's."""
    return replace(a, path=f"{name}.model.{a.path}" if a.path else f"{name}.model")


def _able(name: str, fast: CompiledModule, program: Program) -> nn.Module:
    """The model of a compiled one that can be one of a cascade's."""

    def refuse(got: str, wanted: str) -> StrategyError:
        return StrategyError(
            "this compiled model cannot be one of a cascade's models",
            where=name,
            got=got,
            wanted=wanted,
            hint="pass the original model",
        )

    if program.capture.models:
        raise refuse("a cascade", "its models, in one list with the others")
    if fast.running is None:
        raise refuse("a loaded program, without the Python model", "one that was compiled in this process")
    if program.capture.front_end != "export":
        raise refuse('capture="blocks"', 'capture="export"')
    if not movable(program.choices):
        raise refuse("routes or widths", "exits, gates and halting only")
    weights = fast.combination.state_dict()
    if weights and bool(weights["bias"].any()):
        raise refuse("trained weights of an ensemble of its exits", 'combine="ensemble", or weights trained in the cascade')
    if any(e.head_kind == "shared" for e in program.exits):
        raise refuse('head="shared"', "heads of their own")
    return fast.running


def _carried(name: str, program: Program, e: Exit, plain: bool) -> Carried:
    assert program.marked is not None
    before = program.history["find_cuts"].graph_module  # without anything inserted, which would count among its neighbours
    anchors = {n.name: a for n, a in facts.anchors(before.graph.nodes).items()}
    own = originals(program)

    def moved(node: str) -> Anchor:
        return within(name, anchors[own.get(node, node)])

    inputs = {
        n.name: leaf.path for n, leaf in zip(facts.placeholders(program.marked), program.signature.inputs, strict=True)
    }
    sides: list[Anchor | str] = []
    for side in e.head_inputs[1:]:
        if side in inputs and not plain:
            raise StrategyError(
                "a head of this compiled model reads an input that is prepared for it here",
                where=f"{name}, {e.name}",
                got=inputs[side],
                hint="pass the original model, or leave prepare= and inputs= out for it",
            )
        sides.append(inputs[side] if side in inputs else moved(side))
    after = moved(e.after) if own.get(e.after, e.after) in anchors else moved(e.node)
    place = Place(f"{name}.{e.cut}", moved(e.node), after)
    return Carried(place, e, Branch(nn.Identity()), 0.0, 1.0, tuple(sides))


def paths(program: Program) -> list[str]:
    """Names of the inputs, in the graph's order."""
    return [leaf.path for leaf in program.signature.inputs]


def brought_exit(program: Program, cut: Cut, one: Carried, recipe: ExitRecipe) -> Exit:
    """The exit at its cut in the composite.

    Raises:
        StrategyError: Its criterion is another one than the cascade's.
        PassError: What its head reads is not found.
    """
    mine, criterion = one.exit.criterion, criterion_of(program, recipe)
    if mine != criterion:
        raise StrategyError(
            "the exits of one program share a criterion",
            where=cut.name,
            got=f"{mine.name} in the compiled model, {criterion.name} in the cascade",
            hint=f"pass Cascade(criterion={mine.name!r})",
        )
    by_anchor = {a: n for n, a in facts.anchors(program.graph_module.graph.nodes).items()}
    inputs = dict(
        zip((leaf.path for leaf in program.signature.inputs), facts.placeholders(program.graph_module), strict=True)
    )
    sides: list[fx.Node] = []
    for side in one.sides:
        node = inputs.get(side) if isinstance(side, str) else by_anchor.get(side)
        if node is None:
            raise PassError(
                "what a head of a compiled model reads is not in the cascade's graph", where=cut.name, got=str(side)
            )
        sides.append(node)
    mask = one.exit.mask_input
    at = one.exit.head_inputs.index(mask) - 1 if mask in one.exit.head_inputs[1:] else -1
    return replace(
        one.exit,
        node=cut.value,
        after=cut.after,
        cut=cut.name,
        depth=cut.depth,
        anchor=cut.anchor,
        head_inputs=(cut.value, *(n.name for n in sides)),
        mask_input=sides[at].name if at >= 0 else None,
        combine=recipe.combine,
        sides=(),
    )
