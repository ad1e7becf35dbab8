"""The frozen records of a router: what it reads, and where it may send rows."""

from __future__ import annotations

from dataclasses import dataclass

from eecompile.records import Anchor


@dataclass(frozen=True)
class Way:
    """One of a router's ways through the part of the model that branches stand beside.

    Attributes:
        name: As users know it; "full" is the model's own.
        module: Name of its submodule; empty for the model's own way.
        value: Name of the node that it hands on.
        sides: Names of the nodes that it is called with behind the value where branches begin.
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
        node: Name of the node with each row's value, behind the branches; empty for exits.
        x: Name of the node where branches begin; empty for exits.
        y: Name of the node that the model's own way hands on; empty for exits.
        batch_axis: Axis of the rows in it.
        ways: The branches and, last, the model's own way; none for exits.
        over: Names of the cuts between which branches lie, for users.
        depth: Fraction of the full model's cost before the router.
        unit_flops: Cost of the probabilities for one row.
        anchors: Of `reads`, `x` and `y`; None for an input of the model.
        stage: How many exits lie before the router; set by `stage`.
        way_stage: How many exits lie before the branches; set by `stage`.
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
    stage: int = 0
    way_stage: int = 0

    @property
    def to_exits(self) -> bool:
        return not self.ways

    @property
    def region(self) -> str:
        """The part of the model that has branches, for messages."""
        return " to ".join(self.over)
