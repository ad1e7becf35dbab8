"""The IR: one FX graph plus typed, frozen records of what was found in it and put into it.

A `Program` goes through the passes; none of them changes the one it was given. Nodes are named, not referenced:
names survive a copy of the graph, node objects do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from eecompile.errors import PassError, near
from eecompile.ir.choices import choices_of
from eecompile.ir.recipes import GateRecipe, HaltRecipe, RouteRecipe
from eecompile.ir.records import (
    Anchor,
    Block,
    Carry,
    Choice,
    Cut,
    Exit,
    Gate,
    Halt,
    HaltStep,
    Live,
    Place,
    Refusal,
    Region,
    Report,
    Route,
    Stage,
    TokenPart,
    Way,
    Width,
)
from eecompile.ir.settings import Settings
from eecompile.signature import Signature

__all__ = [
    "Anchor",
    "Block",
    "Carry",
    "Choice",
    "Cut",
    "Exit",
    "Gate",
    "Halt",
    "HaltStep",
    "History",
    "Level",
    "Live",
    "Place",
    "Program",
    "Refusal",
    "Region",
    "Report",
    "Route",
    "Snapshot",
    "Stage",
    "Tail",
    "TokenPart",
    "Way",
    "Width",
]

Level = Literal["captured", "marked", "staged", "schedule"]


@dataclass(frozen=True)
class Snapshot:
    """The graph as it stood after one pass."""

    name: str
    level: Level
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    refusals: tuple[Refusal, ...]
    graph_module: fx.GraphModule = field(repr=False)
    summary: str = ""


class History(Sequence[Snapshot]):
    """What every pass left behind, in order; `history["stage"]` is the one after that pass."""

    def __init__(self, snapshots: Sequence[Snapshot] = ()) -> None:
        self._snapshots = tuple(snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            for s in self._snapshots:
                if s.name == key:
                    return s
            raise PassError("no such pass in the history", got=key, wanted=near(key, [s.name for s in self._snapshots]))
        if isinstance(key, slice):
            return History(self._snapshots[key])
        return self._snapshots[key]

    def append(self, snapshot: Snapshot) -> History:
        return History((*self._snapshots, snapshot))

    def __repr__(self) -> str:
        return f"History({', '.join(s.name for s in self._snapshots)})"


@dataclass(frozen=True)
class Tail:
    """What a model computes from its class scores at its end: see `passes/split_tail.py`.

    Attributes:
        module: `module(scores, *inputs)` gives the output leaves at `slots`; in the graphs these hold the scores.
    """

    module: fx.GraphModule = field(repr=False)
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A model on its way through the compiler.

    Attributes:
        graph_module: The graph at `level`. Flat tensors in, a flat tuple of tensors out.
        source: The captured graph, before any rewrite.
        marked: The graph at level "marked", kept by later levels: what is trained, saved and taken as the truth.
        signature: How a call of the user's model maps to the graph's inputs and outputs.
        prediction: Index of the output leaf that holds the class scores, None until a strategy needs it.
        tail: What the model computes from its class scores at its end, None where it gives them as they are.
        flops: Cost of each node of the captured graph for one row, by name.
        seconds: Measured time of each node for one row, by name, where it was asked for.
        models: Names of the models of a cascade, the last one being the full model; empty for a single model. The
            captured graph gives the predictions of the others behind the full model's output leaves.
        block_pattern: The repeated unit that the user named, None for the best one found.
        places: Where compiled models among them have exits of their own.
        full_flops: Cost of the full model for one row, where the graph holds other models too.
        facts: What has been established so far; passes declare what they need and give.
        gate_recipes: What the gates were inserted by: one entry, in a cascade one for each model with gates.
        halt_recipes: The same for the chains that halt.
        reports: What a run tells for each row besides its outputs.
        settings: What can be set, as it was compiled.
        refusals: Places that were passed over, with the reason.
    """

    graph_module: fx.GraphModule
    source: fx.GraphModule
    signature: Signature
    level: Level = "captured"
    marked: fx.GraphModule | None = None
    front_end: Literal["export", "blocks"] = "export"
    models: tuple[str, ...] = ()
    block_pattern: str | None = None
    places: tuple[Place, ...] = ()
    prediction: int | None = None
    tail: Tail | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    full_flops: float | None = None
    blocks: tuple[Block, ...] = ()
    cuts: tuple[Cut, ...] = ()
    regions: tuple[Region, ...] = ()
    exits: tuple[Exit, ...] = ()
    gates: tuple[Gate, ...] = ()
    gate_recipes: tuple[GateRecipe, ...] = ()
    widths: tuple[Width, ...] = ()
    reports: tuple[Report, ...] = ()
    halts: tuple[Halt, ...] = ()
    halt_recipes: tuple[HaltRecipe, ...] = ()
    routes: tuple[Route, ...] = ()
    route_recipe: RouteRecipe | None = None
    stages: tuple[Stage, ...] = ()
    settings: Settings = field(default_factory=Settings)
    facts: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = ()
    history: History = field(default_factory=History)

    def replace(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)

    def restore(self, leaves: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> Any:
        """The model's own output type around what a graph gave for these flat inputs."""
        return self.signature.restore(leaves if self.tail is None else self.answer(leaves, flat), flat)

    def answer(self, leaves: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's output leaves, from those of a graph and the call's flat inputs."""
        found = list(leaves)
        if self.tail is not None:
            assert self.prediction is not None
            values = self.tail.module(found[self.prediction], *flat)
            for i, value in zip(self.tail.slots, values, strict=True):
                found[i] = value
        return found

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every region in which rows take one of several arms: gates and widths, halting steps, a router's branches."""
        return choices_of(self.gates, self.widths, self.halts, self.routes)

    @property
    def gate_recipe(self) -> GateRecipe | None:
        """What the gates of a single model were inserted by, None without gates."""
        return self.gate_recipes[0] if self.gate_recipes else None

    @property
    def halt_recipe(self) -> HaltRecipe | None:
        """What the chains of a single model were inserted by, None without any."""
        return self.halt_recipes[0] if self.halt_recipes else None

    @property
    def total_flops(self) -> float:
        """Cost of the unmodified model for one row; of a cascade's last model alone."""
        return float(sum(self.flops.values())) if self.full_flops is None else self.full_flops
