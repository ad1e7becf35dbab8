"""The IR: one FX graph plus typed, frozen records of what was found in it and put into it.

A `Program` goes through the passes; none of them changes the one it was given. Nodes are named, not referenced:
names survive a copy of the graph, node objects do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from eecompile.errors import PassError, near
from eecompile.ir.choices import ChoiceRecords
from eecompile.ir.records import (
    Anchor,
    Block,
    Choice,
    Cut,
    Exit,
    Live,
    Place,
    Refusal,
    Region,
    Report,
    Stage,
    TokenPart,
)
from eecompile.ir.settings import Settings
from eecompile.signature import Leaf, Signature

__all__ = [
    "Anchor",
    "Block",
    "Capture",
    "Choice",
    "ChoiceRecords",
    "Costs",
    "Cut",
    "Exit",
    "History",
    "Level",
    "Live",
    "Place",
    "Prediction",
    "Program",
    "Refusal",
    "Region",
    "Report",
    "Snapshot",
    "Stage",
    "Structure",
    "Tail",
    "TokenPart",
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
    """Snapshots of every pass, in order; `history["stage"]` is the one after that pass.

    Attributes:
        facts: What has been established so far; passes declare what they need and give.
    """

    def __init__(self, snapshots: Sequence[Snapshot] = (), facts: frozenset[str] = frozenset()) -> None:
        self._snapshots = tuple(snapshots)
        self.facts = facts

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

    def append(self, snapshot: Snapshot, facts: frozenset[str]) -> History:
        """With one pass more, which established these facts."""
        return History((*self._snapshots, snapshot), self.facts | facts)

    def establish(self, *facts: str) -> History:
        """With facts that were established in another way than by a pass."""
        return History(self._snapshots, self.facts | set(facts))

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
class Prediction:
    """Where the class scores are among a graph's outputs, and what becomes of them.

    Attributes:
        index: Which output leaf holds them, None until a strategy needs it.
        tail: What the model computes from them at its end, None where it gives them as they are.
    """

    index: int | None = None
    tail: Tail | None = None


@dataclass(frozen=True)
class Capture:
    """How the model was captured.

    Attributes:
        models: Names of the models of a cascade, the last one being the full model; empty for a single model. The
            captured graph gives the predictions of the others after the full model's output leaves.
        places: Where compiled models among them have exits of their own.
    """

    front_end: Literal["export", "blocks"] = "export"
    models: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Costs of the captured graph for one row.

    Attributes:
        flops: Of each node, by name.
        seconds: Measured time of each node, by name, where it was asked for.
        full_flops: Of the full model, where the graph holds other models too.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    full_flops: float | None = None


@dataclass(frozen=True)
class Structure:
    """What was found in the captured graph.

    Attributes:
        block_pattern: The repeated unit that the user named, None for the best one found.
    """

    block_pattern: str | None = None
    blocks: tuple[Block, ...] = ()
    cuts: tuple[Cut, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Program:
    """A model on its way through the compiler.

    Attributes:
        graph_module: The graph at `level`. Flat tensors in, a flat tuple of tensors out.
        source: The captured graph, before any rewrite.
        marked: The graph at level "marked", kept by later levels: what is trained, saved and taken as the truth.
        signature: How a call of the user's model maps to the graph's inputs and outputs.
        choices: Gates, widths, halting steps and routers; iterating gives each as a `Choice`.
        stages: The work between two exits.
        settings: What can be set, as it was compiled.
        history: Snapshots after every pass, and the facts that they established.
    """

    graph_module: fx.GraphModule
    source: fx.GraphModule
    signature: Signature
    level: Level = "captured"
    marked: fx.GraphModule | None = None
    capture: Capture = field(default_factory=Capture)
    prediction: Prediction = field(default_factory=Prediction)
    costs: Costs = field(default_factory=Costs)
    structure: Structure = field(default_factory=Structure)
    exits: tuple[Exit, ...] = ()
    choices: ChoiceRecords = field(default_factory=ChoiceRecords)
    stages: tuple[Stage, ...] = ()
    settings: Settings = field(default_factory=Settings)
    history: History = field(default_factory=History)

    def replace(self, **changes: Any) -> Program:
        """With other fields; one of a group is given by its own name: `replace(blocks=...)`."""
        for name in [n for n in changes if n in GROUPED]:
            group = GROUPED[name]
            changes[group] = dataclasses.replace(changes.get(group, getattr(self, group)), **{name: changes.pop(name)})
        return dataclasses.replace(self, **changes)

    def establish(self, *facts: str) -> Program:
        """With facts that passes may require."""
        return self.replace(history=self.history.establish(*facts))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Places that were passed over, with the reason."""
        return tuple(r for snapshot in self.history for r in snapshot.refusals)

    @property
    def prediction_leaf(self) -> Leaf:
        """The output leaf with the class scores."""
        return self.signature.outputs[self.prediction.index or 0]

    @property
    def total_flops(self) -> float:
        """Cost of the unmodified model for one row; of a cascade's last model alone."""
        full = self.costs.full_flops
        return float(sum(self.costs.flops.values())) if full is None else full

    def share(self, flops: float) -> float:
        """FLOPs of a row as a fraction of the full model's."""
        return flops / (self.total_flops or 1.0)

    def restore(self, leaves: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> Any:
        """The model's own output type around what a graph gave for these flat inputs."""
        return self.signature.restore(leaves if self.prediction.tail is None else self.answer(leaves, flat), flat)

    def answer(self, leaves: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's output leaves, from those of a graph and the call's flat inputs."""
        found, tail = list(leaves), self.prediction.tail
        if tail is not None:
            assert self.prediction.index is not None
            values = tail.module(found[self.prediction.index], *flat)
            for i, value in zip(tail.slots, values, strict=True):
                found[i] = value
        return found


GROUPED = {
    f.name: group
    for group, record in (
        ("prediction", Prediction),
        ("capture", Capture),
        ("costs", Costs),
        ("structure", Structure),
        ("choices", ChoiceRecords),
    )
    for f in dataclasses.fields(record)
}
"""Group of each field that belongs to one, for `Program.replace`."""
