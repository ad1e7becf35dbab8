"""The frozen records of the IR: what was found in a graph and what was put into it.

Nodes are named, not referenced: names survive a copy of the graph, node objects do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from eecompile.criteria import Criterion


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
class Place:
    """A position that is offered as a cut whatever the search finds: the value there, and the last node before it."""

    name: str
    value: Anchor
    after: Anchor


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
        name: Block or node that it follows, as shown to users and matched by `exits=`.
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
        combine: What it answers, given the exits before it: "last", "ensemble", "confident" or "weighted".
        routed: Name of the node `[B, E]` with a router's confidences, where one sends rows here; else empty.
        gate: Name of the gate before which it lies, where its head is the rest of the model without the regions of that
            gate and all later ones; else empty.
        sides: Where to find `head_inputs[1:]` in the training capture; None for inputs of the model.
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
    routed: str = ""
    gate: str = ""
    sides: tuple[Anchor | None, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all nodes that head and decision need."""
        return (*self.head_inputs, self.routed) if self.routed else self.head_inputs


@dataclass(frozen=True)
class Region:
    """A part of the graph that could be left out for a row: one value in, one of the same kind out.

    Attributes:
        name: The block, or `block:attention`, `block:mlp`, `block:part_k` for a residual part of it, `block:branch`.
        kind: "block", "attention", "mlp", "part", "branch" for a block without the activation after its addition, or
            "width" for layers that always run, at one of several widths.
        block: The block that it is or lies in.
        x: Name of the node whose value goes past it.
        y: Name of the node that it hands on.
        batch_axis: Axis of the rows in both.
        flops: Cost of one row.
        depth: Fraction of the model's cost before it.
        residual: Whether `x` reaches `y` through additions: what is left out is then a correction, not the value. Or both
            are what recurrent layers of one shape hand on.
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
    """One value of a conditional region: `y` where the gate is open, else `x`, picked by the `choose` at `node`."""

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
        flops: What a closed gate saves for one row.
        unit_flops: Cost of the score for one row.
        carries: What the region hands on.
        anchors: Of the region.
        needs: Name of a gate that has to be open too, empty for none.
        width: Share of the channels that the region runs with where this gate is the last open one; 0 where its width
            is never chosen.
        group: Which of the program's gate recipes it was inserted by.
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
    width: float = 0.0
    group: int = 0


@dataclass(frozen=True)
class Width:
    """A region that runs at one of several widths for each row: with the first so many of its channels (Yu et al. 2019).

    Each width is a gate that needs the one before it to be open.

    Attributes:
        name: `width_0`, `width_1`, ...
        region: Name of the region.
        x: Name of the node that goes into it.
        fractions: Shares of the channels, ascending; the last is 1, the region as it was.
        channels: For each group of channels in the region, in graph order, how many of them run at each share.
        skips: Whether a row may skip the region altogether; else the smallest width always runs.
        gates: Names of the gates, in order: one for each share, without the first where that always runs.
        values: Names of the nodes with the region's value at each share, before `choose`; set by `insert_gates`.
    """

    name: str
    region: str
    x: str
    fractions: tuple[float, ...]
    channels: tuple[tuple[int, ...], ...]
    skips: bool
    gates: tuple[str, ...]
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """One of a router's branches, the part of the model that they replace among them.

    Attributes:
        name: As users know it; "full" is the model's own.
        module: Name of its submodule; empty for the model's own way.
        value: Name of the node that it hands on.
        sides: Names of the nodes that it is called with after the value where branches begin.
        side_anchors: Of those nodes; None for an input of the model.
        flops: Cost of one row.
        left_out: Names of the blocks that a light version leaves out.
        custom: Whether it is a module of the user's.
    """

    name: str
    module: str
    value: str
    sides: tuple[str, ...]
    side_anchors: tuple[Anchor | None, ...]
    flops: float
    left_out: tuple[str, ...] = ()
    custom: bool = False


@dataclass(frozen=True)
class Route:
    """A router: what it reads, and where each row goes.

    Attributes:
        name: `route`.
        at: The place that it reads, as users know it.
        reads: Name of the node with the value there.
        mask: Name of the input that marks padding there, None without one.
        unit: Submodule that gives the probabilities.
        weights: Name of the node with them, `[B, K]`; the model's own way is the last.
        choice: Name of the node that says where rows go: `[B]` int64, the way of each row. For exits `[B, E]`, the
            probability that the row needs at most exit k.
        admitted: Name of the node `[B, K]` whose largest entry is the way; empty for exits.
        node: Name of the node where the branches meet; empty for exits.
        x: Name of the node where branches begin; empty for exits.
        y: Name of the node that the model's own way hands on; empty for exits.
        batch_axis: Axis of the rows in it.
        ways: The branches and, last, the model's own way; none for exits.
        over: Names of the cuts between which branches lie, for users.
        depth: Fraction of the full model's cost before the router.
        unit_flops: Cost of the probabilities for one row.
        anchors: Of `reads`, `x` and `y`; None for an input of the model.
    """

    name: str
    at: str
    reads: str
    mask: str | None
    unit: str
    weights: str
    choice: str
    admitted: str
    node: str
    x: str
    y: str
    batch_axis: int
    ways: tuple[Way, ...]
    over: tuple[str, str]
    depth: float
    unit_flops: float
    anchors: tuple[Anchor | None, ...]

    @property
    def to_exits(self) -> bool:
        return not self.ways

    @property
    def region(self) -> str:
        """The part of the model that has branches, for messages."""
        return " to ".join(self.over)


@dataclass(frozen=True)
class Report:
    """A value per row that a run reports with its outputs: a gate's decision, steps taken.

    Attributes:
        node: Name of the node; its value has the batch on axis 0.
        owner: Name of a node of the same computation: where that is not needed, nothing is reported.
        training_only: Reported by the marked graph only, for objectives.
        stage: How many exits lie before it; rows that left earlier have zeros. Set by `stage`.
    """

    name: str
    node: str
    owner: str
    training_only: bool = False
    stage: int = 0


@dataclass(frozen=True)
class TokenPart:
    """A position-wise part of a step: what it gives at one position of a sequence depends on its inputs there alone. Where
    every position halts by itself it runs at those that have not halted, the live ones.

    Attributes:
        name: `halt_0_step_1_tokens_0`, ...
        node: Name of the node `[B, S, ...]` that it hands on, the last of `nodes`.
        nodes: Names of its nodes, in graph order.
        inputs: Names of the nodes `[B, S, ...]` that it reads at the live positions.
        past: Name of the node with the value of the positions that have halted; empty where that is not read.
        kept: Name of the node that chooses between the two, empty without `past`.
        flops: Cost for one row, all positions live.
        most_live: Share of live positions above which all are computed, because gathering would take longer.
    """

    name: str
    node: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    past: str
    kept: str
    flops: float
    most_live: float


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
        value: Name of the node with the rows' value after it: the block's, or what a halted row keeps.
        last: Name of the last node of the step: an exit may follow it.
        live: Name of the node `[B, S]` that says which positions still run, where each halts by itself; empty for the first
            step and where rows halt as a whole.
    """

    name: str
    region: str
    decision: str
    unit: str
    flops: float
    unit_flops: float
    carries: tuple[Carry, ...]
    anchors: tuple[Anchor | None, Anchor | None]
    value: str = ""
    last: str = ""
    live: str = ""


@dataclass(frozen=True)
class HaltingChain:
    """A chain of steps that a row may stop after (Graves 2016).

    Attributes:
        name: `halt_0`, ...
        steps: In order.
        x: Name of the node that goes into the first step.
        ys: Name of the node that each step computes.
        output: Name of the node with the weighted state, which the model reads after the chain.
        ledger: Name of the node with accumulated score, steps and ponder cost, `[B, 3]` or `[B, S, 3]`.
        repeated: Whether the steps are one block again and again, so that the model as it was takes the first alone.
        per_token: Whether every position halts by itself.
        depth: Fraction of the full model's cost before it.
        group: Which of the program's halting recipes it was inserted by.
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
    group: int = 0


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
class Arm:
    """One of the things that may run for a row.

    Attributes:
        name: "skip", "run", the number of a width, or a branch as users know it.
        values: Names of the nodes that it hands on, one for each merge.
        skips: Whether nothing runs: the values are what goes past the region.
        module: Name of the submodule that is all of it; empty where nodes of the graph compute it.
        inputs: Names of the nodes that the module is called with; none of a module of the user's.
    """

    name: str
    values: tuple[str, ...]
    skips: bool = False
    module: str = ""
    inputs: tuple[str, ...] = ()

    @property
    def custom(self) -> bool:
        """Whether it is a module of the user's."""
        return bool(self.module) and not self.inputs


@dataclass(frozen=True)
class Merge:
    """Where the arms of a choice meet: the `choose` at `node`."""

    node: str
    batch_axis: int


@dataclass(frozen=True)
class Choice:
    """A region in which each row takes one of several arms: a gate, a halting step, a width or a router's branches.

    Attributes:
        name: Of the gate, step, width or router.
        region: Name of the region, for messages.
        index: Names of the nodes that say which arm a row takes: one `[B]` with its number, or for every arm but the first
            one that is open from that arm on.
        arms: In order; for branches and widths the last is the model as it was.
        merges: One for each value.
        family: Family of the settings that say which arms are possible.
        usual: Number of the arm that the model as it was takes.
        gates: Names of the gates that open one arm after the other.
        scores: Names of the nodes with the gates' scores.
        needs: Name of a gate of an earlier choice that has to be open too, empty for none.
        reads: Names of further nodes that lie before the region; for branches first the value that they begin with.
        inner: Names of nodes between the arms' values and the merge.
        live: Name of the node `[B, S]` that says which positions run, where positions choose one by one.
        parts: What runs at the live positions only.
    """

    name: str
    region: str
    index: tuple[str, ...]
    arms: tuple[Arm, ...]
    merges: tuple[Merge, ...]
    family: str
    usual: int
    gates: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    needs: str = ""
    reads: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    live: str = ""
    parts: tuple[TokenPart, ...] = ()


@dataclass(frozen=True)
class Decider:
    """A unit that gives the numbers which are compared with settings.

    Attributes:
        name: Of the gate, step or router.
        unit: Submodule that computes them.
        family: Family of the settings.
        slots: Those of its numbers that open what the unit decides on.
        node: Name of the node that says what was decided.
        end: Name of the node that hands on what was chosen; empty where rows are sent to exits.
        flops: Cost for one row.
    """

    name: str
    unit: str
    family: str
    slots: tuple[str, ...]
    node: str
    end: str
    flops: float


@dataclass(frozen=True)
class Charge:
    """What a row pays for where it runs: a gated region, a step of a chain, a branch.

    Attributes:
        name: Of the gate or step; of a branch `route.light`.
        flops: Cost for one row.
        usual: Whether the model as it was runs it.
        node: Name of a node where it lies: rows that exited before do not run it.
        end: Name of the node that hands on its value.
        unit_flops: Further cost while rows may halt: of a step's score.
        live_flops: Of `flops`, what runs at live positions only.
    """

    name: str
    flops: float
    usual: bool
    node: str
    end: str
    unit_flops: float = 0.0
    live_flops: float = 0.0
