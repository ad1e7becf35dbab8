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
from eecompile.reasons import Reason
from eecompile.signature import Signature
from eecompile.strategies.base import GateRecipe, HaltRecipe, RouteRecipe

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
    "Result",
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


@dataclass
class Result:
    """What `fast.run(x)` gives.

    Attributes:
        output: The same type as `model(x)`.
        exit_index: [B] int64; counts exits from 0, the model's own end is `len(fast.exits)`.
        confidence: [B] float32 in [0, 1]; of the exit that was taken, or of the model's own output.
        cost: [B] float32; fraction of the full model's FLOPs spent on each row.
        outputs: In train mode: the prediction of every exit and, last, of the model itself; each `[B, ..., C]`.
        confidences: In train mode: [B] float32 of every exit and, last, of the model itself.
        separate: In train mode, where exits are combined: what each head says by itself and, last, the model.
        scores: In train mode, for learned criteria: the exit score's logit `[B]` of every exit.
        gates: [B, G], where there are gates: bool, whether the gate let the row in (False too where the row had left
            before); in train mode 1 and 0, differentiable by the straight-through estimate.
        gate_scores: [B, G] in [0, 1], in train mode and of `fast.observe`.
        gates_free: [B, G] bool, with `gate_scores`: whether the gate's own score decided. Not where a threshold keeps it
            open or shut, `min_open` forces it open, or an earlier shut gate shuts it.
        widths: [B, W] float32, where widths are chosen: the share of the channels that each part in `fast.widths` ran with
            for the row; 0 where it was skipped or the row had left before.
        end_cost: [B] float32, in train mode and of `fast.observe`, where there are gates or branches: the cost of each row
            with its gates and its route as they were decided and all exits closed, differentiable in train mode.
        route: [B] int64, where there is a router: the exit that the row was sent to, or the branch that it took, -1 where
            it had left before. In train mode as decisions were taken meanwhile.
        route_weights: [B, K] float32, in train mode and of `fast.observe`: the probability of every route, differentiable.
        route_costs: [K] float32, with `route_weights`: cost of a row on each route.
        way_outputs: In train mode with `gate_mode = "every"`: what the model says where every row takes way k, for each
            of K; without gradients.
        steps: [B] or [B, S] int64 ([B, 1] where no row reached the end of the chain): steps taken, where the strategy halts,
            summed over several chains; where gates are on whole blocks [B], how many of those ran.
        ponder: [B] or [B, S] float32: ponder cost N + R, differentiable in train mode.
        step_outputs: In train mode, where scores are probabilities of stopping (PonderNet): the prediction `[B, ..., C]` had
            every row stopped at each of the N steps. No row stops earlier then, so `steps` is N and `ponder` tells nothing.
        step_scores: [B, N] float32, with `step_outputs`: probability of stopping at a step, of a row that got there.
        final: [B] bool; rows that left by themselves. The others were stopped at `exit_index` by a deadline, a budget or
            an interrupt, or are still on their way in a stream.
        stopped: Why the call was stopped before every row was final: "deadline", "budget" or "interrupt"; else None.
            After a budget on a device that decides by itself, reading it waits for the device.
        late: Whether the output came after its deadline, or costs more than its budget: even the first exit was too far.
    """

    output: Any
    exit_index: torch.Tensor
    confidence: torch.Tensor
    cost: torch.Tensor
    outputs: tuple[torch.Tensor, ...] | None = None
    confidences: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    separate: tuple[torch.Tensor, ...] | None = None
    gates: torch.Tensor | None = None
    gate_scores: torch.Tensor | None = None
    gates_free: torch.Tensor | None = None
    widths: torch.Tensor | None = None
    end_cost: torch.Tensor | None = None
    route: torch.Tensor | None = None
    route_weights: torch.Tensor | None = None
    route_costs: torch.Tensor | None = None
    way_outputs: tuple[torch.Tensor, ...] | None = None
    steps: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    step_outputs: tuple[torch.Tensor, ...] | None = None
    step_scores: torch.Tensor | None = None
    final: torch.Tensor | None = None
    stopped: Reason = Reason()  # noqa: RUF009 (a descriptor, not a default)
    late: bool = False
