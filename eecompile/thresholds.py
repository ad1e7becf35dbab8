"""Exits, gates, widths and halting as users see them, and what they may pass as thresholds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from eecompile.criteria import Criterion
from eecompile.untrained import is_untrained


@dataclass(frozen=True)
class ExitRecord:
    """One exit as users see it.

    Attributes:
        name: `exit_0`, `exit_1`, ...
        node: Name of the graph node whose value the head reads.
        cut: Block or node that it lies behind.
        depth: Fraction of the full model's cost spent before it.
        threshold: Confidence from which a sample leaves; above 1 the exit is closed.
        head: The head's module.
        head_cost: Cost of head and decision, as a fraction of the full model's.
        combine: What it answers, given the open exits before it: "last", "ensemble", "confident" or "weighted".
        units: What must be trained before it says anything.
    """

    name: str
    node: str
    cut: str
    depth: float
    threshold: float
    temperature: float
    head: nn.Module
    head_kind: str
    head_cost: float
    criterion: Criterion
    combine: str = "last"
    units: tuple[nn.Module, ...] = field(default=(), repr=False)

    @property
    def is_open(self) -> bool:
        return self.threshold <= 1.0

    @property
    def trained(self) -> bool:
        """Whether its weights are others than those that it was inserted with."""
        return not any(map(is_untrained, self.units))


@dataclass(frozen=True)
class GateRecord:
    """One gate as users see it.

    Attributes:
        name: `gate_0`, `gate_1`, ...
        node: Name of the graph node that hands on the region's value or what went past it.
        region: What it may skip: a block, or a part of one; "... at 50%" where it opens a width of it.
        kind: "block", "attention", "mlp", "part", "branch", or "width" where it only makes its part wider.
        depth: Fraction of the full model's cost spent before it.
        threshold: Score from which it is open; 0 is always open, above 1 always shut.
        head: The unit that gives the score; one for all gates where it is a policy.
        saves: What it saves when shut, as a fraction of the full model's cost.
        head_cost: Cost of the score, as a fraction of the full model's.
    """

    name: str
    node: str
    region: str
    kind: str
    depth: float
    threshold: float
    head: nn.Module
    head_kind: str
    saves: float
    head_cost: float

    @property
    def trained(self) -> bool:
        """Whether the unit's weights are others than those that it was inserted with."""
        return not is_untrained(self.head)


@dataclass(frozen=True)
class WidthRecord:
    """One part of the model that runs at one of several widths, as users see it.

    Attributes:
        name: `width_0`, `width_1`, ...
        region: The block, half of a block, or pair of layers.
        fractions: Shares of its hidden channels that a row may run with.
        channels: How many channels these are, for each group of channels in it.
        skips: Whether a row may skip it altogether.
        gates: Names of the gates that open one width after the other.
        saves: What the least of it saves, as a fraction of the full model's cost.
    """

    name: str
    region: str
    fractions: tuple[float, ...]
    channels: tuple[tuple[int, ...], ...]
    skips: bool
    gates: tuple[str, ...]
    saves: float


@dataclass(frozen=True)
class HaltStepRecord:
    """One step of a chain that rows halt in, as users see it.

    Attributes:
        name: `halt_0_step_0`, ...
        region: The block that it runs.
        unit: What gives its halting score: "linear", or "token" for one at every position.
        cost: Cost of the block for one row, as a fraction of the full model's.
        unit_cost: Cost of the score.
        live_cost: Of `cost`, what runs at positions that have not halted only, where every position halts by itself.
    """

    name: str
    region: str
    unit: str
    cost: float
    unit_cost: float
    live_cost: float = 0.0


@dataclass(frozen=True)
class HaltRecord:
    """One chain of steps that rows halt in, as users see it.

    Attributes:
        name: `halt_0`, ...
        depth: Fraction of the full model's cost spent before it.
        threshold: What scores must add up to; above 1 no row halts. All chains share it.
        rule: "mean", the output is the mean of the states under the scores, or "stop", the state that a row stopped at.
        repeated: Whether the steps are one block again and again.
        per_token: Whether every position halts by itself.
    """

    name: str
    depth: float
    threshold: float
    rule: str
    repeated: bool
    per_token: bool
    steps: tuple[HaltStepRecord, ...]
