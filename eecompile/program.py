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

from eecompile.criteria import Criterion
from eecompile.errors import PassError, near
from eecompile.signature import Signature
from eecompile.strategies.base import GateRecipe, HaltRecipe

Level = Literal["captured", "marked", "staged", "schedule"]


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone."""

    node: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Anchor:
    """Finds the same value in another capture of the same model: the n-th call of `target` inside module `path`."""

    path: str
    call: int
    target: str
    ordinal: int


@dataclass(frozen=True)
class Block:
    """One repeated unit of the model, as an interval of the graph in execution order.

    Attributes:
        name: Module path, `path@k` for the k-th further call of a shared module.
        kind: Class name of the module.
        first: Name of its first node.
        last: Name of its last node.
        output: Name of the tensor that it hands on.
        flops: Floating-point operations of one row.
    """

    name: str
    kind: str
    first: str
    last: str
    output: str
    flops: float = 0.0


@dataclass(frozen=True)
class Live:
    """A value that crosses a cut. `batch_axis` is None for tensors without a batch."""

    node: str
    batch_axis: int | None
    shape: tuple[int | str, ...]
    dtype: str
    trunk: bool = True


@dataclass(frozen=True)
class Cut:
    """A position in the graph where the work can stop.

    Attributes:
        name: Block or node that it lies behind, as shown to users and matched by `exits=`.
        after: Name of the last node before the cut.
        value: Name of the tensor that a head reads there.
        live: Everything that later nodes need, raw inputs included.
        depth: Fraction of the model's cost before the cut.
        is_block: Whether it is a block boundary.
        dominates: Whether every path from the input to the prediction goes through `value`.
    """

    name: str
    after: str
    value: str
    live: tuple[Live, ...]
    depth: float
    is_block: bool
    dominates: bool
    anchor: Anchor


@dataclass(frozen=True)
class Exit:
    """A classifier branch: where it is, what it runs, how sure it must be.

    Attributes:
        name: `exit_0`, `exit_1`, ...
        node: Name of the node whose value the head reads.
        after: Name of the last node of the trunk before the exit.
        cut: Name of the cut (block path or node) as users know it.
        depth: Fraction of the full model's cost spent before the exit's head.
        head: Name of the head's submodule in the graph.
        criterion: How its confidence is computed.
        head_flops: Cost of head and decision for one row.
        anchor: Where to find `node` in the training capture.
        head_inputs: Names of the nodes that the head is called with.
        combine: What it answers, given the exits before it: "last", "ensemble" or "confident".
    """

    name: str
    node: str
    after: str
    cut: str
    depth: float
    head: str
    criterion: Criterion
    head_flops: float
    anchor: Anchor
    head_inputs: tuple[str, ...] = ()
    head_kind: str = ""
    mask_input: str | None = None
    combine: str = "last"


@dataclass(frozen=True)
class Region:
    """A part of the graph that could be left out for a row: one value in, one of the same kind out.

    Attributes:
        name: The block, or `block:attention`, `block:mlp`, `block:part_k` for a residual part of it.
        kind: "block", "attention", "mlp" or "part".
        block: The block that it is or lies in.
        x: Name of the node whose value goes past it.
        y: Name of the node that it hands on.
        batch_axis: Axis of the rows in both.
        flops: Cost of one row.
        depth: Fraction of the model's cost before it.
        residual: Whether `x` reaches `y` through additions: what is left out is then a correction, not the value.
        anchors: Where to find `x` and `y` in another capture; None for an input of the model.
    """

    name: str
    kind: str
    block: str
    x: str
    y: str
    batch_axis: int
    flops: float
    depth: float
    residual: bool
    anchors: tuple[Anchor | None, Anchor | None]


@dataclass(frozen=True)
class Carry:
    """One value of a conditional region: `y` where the gate is open, else `x`, chosen by the `skip` at `node`."""

    y: str
    x: str
    node: str
    batch_axis: int


@dataclass(frozen=True)
class Gate:
    """A region that runs on the rows whose gate is open (SkipNet and relatives).

    Attributes:
        name: `gate_0`, `gate_1`, ...
        node: Name of the node that hands on the region's value or what went past it.
        region: Name of the region.
        kind: Of the region.
        depth: Fraction of the full model's cost before it.
        unit: Submodule that computes the score; empty where another gate's unit gives it too.
        score: Name of the node with the score `[B]` in [0, 1].
        decision: Name of the node with the decision `[B]`, 1 for open.
        flops: What a shut gate saves for one row.
        unit_flops: Cost of the score for one row.
        carries: What the region hands on.
        anchors: Of the region.
        needs: Name of a gate that has to be open too, empty for none.
        stage: How many exits lie before it; set by `stage`.
    """

    name: str
    node: str
    region: str
    kind: str
    depth: float
    unit: str
    score: str
    decision: str
    flops: float
    unit_flops: float
    carries: tuple[Carry, ...]
    anchors: tuple[Anchor | None, Anchor | None]
    needs: str = ""
    stage: int = 0


@dataclass(frozen=True)
class Report:
    """A value per row that a run tells besides its outputs: a gate's decision, steps taken.

    Attributes:
        node: Name of the node; its value has the batch on axis 0.
        beside: Name of a node of the same computation: where that is not needed, nothing is told.
        training_only: Told by the marked graph only, for objectives.
        stage: How many exits lie before it; rows that left earlier have zeros. Set by `stage`.
    """

    name: str
    node: str
    beside: str
    training_only: bool = False
    stage: int = 0


@dataclass(frozen=True)
class HaltStep:
    """One step of adaptive computation: a block, its halting unit, and the update of what has been given out.

    Attributes:
        name: `halt_0_step_1`, ...; the first step always runs.
        region: Name of the block.
        decision: Name of the node `[B]` that says which rows still run; empty for the first step.
        unit: Submodule of the halting score.
        flops: Cost of the block for one row.
        unit_flops: Cost of the score for one row.
        carries: What a row that has halted keeps instead; none for the first step.
        anchors: Of the block's `x` and `y`.
    """

    name: str
    region: str
    decision: str
    unit: str
    flops: float
    unit_flops: float
    carries: tuple[Carry, ...]
    anchors: tuple[Anchor | None, Anchor | None]


@dataclass(frozen=True)
class Halt:
    """A chain of steps that a row may stop after (Graves 2016).

    Attributes:
        name: `halt_0`, ...
        steps: In order.
        x: Name of the node that goes into the first step.
        ys: Name of the node that each step computes.
        output: Name of the node with the weighted state, which the model reads behind the chain.
        ledger: Name of the node with accumulated score, steps and ponder cost, `[B, 3]` or `[B, S, 3]`.
        repeated: Whether the steps are one block again and again, so that the model as it was takes the first alone.
        per_token: Whether every position halts by itself.
        depth: Fraction of the full model's cost before it.
        stage: How many exits lie before it; set by `stage`.
    """

    name: str
    steps: tuple[HaltStep, ...]
    x: str
    ys: tuple[str, ...]
    output: str
    ledger: str
    repeated: bool
    per_token: bool
    depth: float
    stage: int = 0


@dataclass(frozen=True)
class Route:
    """A place where each row is sent into one of several branches."""

    name: str
    node: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """The work between two exits.

    Attributes:
        inputs: Live values that it reads, in order.
        outputs: Live values that it hands on, in order.
        exit: Index of the exit at its end, None for the model's own end.
        flops: Cost of one row, head excluded.
        only_for: Cost of work that only some exits need, by those exits: `((0,), 1e6)` runs while exit 0 is open.
    """

    name: str
    inputs: tuple[Live, ...]
    outputs: tuple[Live, ...]
    exit: int | None
    flops: float
    nodes: int
    only_for: tuple[tuple[tuple[int, ...], float], ...] = ()


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
class Program:
    """A model on its way through the compiler.

    Attributes:
        graph_module: The graph at `level`. Flat tensors in, a flat tuple of tensors out.
        source: The captured graph, before any rewrite.
        marked: The graph at level "marked", kept by later levels: what is trained, saved and taken as the truth.
        signature: How a call of the user's model maps to the graph's inputs and outputs.
        prediction: Index of the output leaf that holds the class scores, None until a strategy needs it.
        flops: Cost of each node of the captured graph for one row, by name.
        seconds: Measured time of each node for one row, by name, where it was asked for.
        models: Names of the models of a cascade, the last one being the full model; empty for a single model. The
            captured graph gives the predictions of the others behind the full model's output leaves.
        full_flops: Cost of the full model for one row, where the graph holds other models too.
        facts: What has been established so far; passes declare what they need and give.
        gate_recipe: What the gates were inserted by, None without gates.
        reports: What a run tells for each row besides its outputs.
        refusals: Places that were passed over, with the reason.
    """

    graph_module: fx.GraphModule
    source: fx.GraphModule
    signature: Signature
    level: Level = "captured"
    marked: fx.GraphModule | None = None
    front_end: Literal["export", "blocks"] = "export"
    models: tuple[str, ...] = ()
    prediction: int | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    full_flops: float | None = None
    blocks: tuple[Block, ...] = ()
    cuts: tuple[Cut, ...] = ()
    regions: tuple[Region, ...] = ()
    exits: tuple[Exit, ...] = ()
    gates: tuple[Gate, ...] = ()
    gate_recipe: GateRecipe | None = None
    reports: tuple[Report, ...] = ()
    halts: tuple[Halt, ...] = ()
    halt_recipe: HaltRecipe | None = None
    routes: tuple[Route, ...] = ()
    stages: tuple[Stage, ...] = ()
    facts: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = ()
    history: History = field(default_factory=History)

    def replace(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)

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
        steps: [B] or [B, S] int64: steps taken, where the strategy halts; summed over several chains.
        ponder: [B] or [B, S] float32: ponder cost N + R, differentiable in train mode.
        final: [B] bool; rows that left by themselves. The others were stopped at `exit_index` by a deadline, a budget or
            an interrupt, or are still on their way in a stream.
        stopped: Why the call was stopped before every row was final: "deadline", "budget" or "interrupt".
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
    steps: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    final: torch.Tensor | None = None
    stopped: str | None = None
    late: bool = False
