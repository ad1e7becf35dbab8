"""Recipes: what a strategy wants in a graph, for the passes to place and insert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from eecompile.criteria import Criterion
from eecompile.errors import StrategyError

FULL, CUSTOM = "full", "custom"
"""Name of a router's way that is the model's own, and what stands for a module of the user's in JSON data."""

Where = int | str | float | Sequence[str | float]


@dataclass(frozen=True)
class ExitRecipe:
    """Exits to insert.

    Attributes:
        where: A number spaced by cost, "every-block", "everywhere" that pays, names of blocks, modules or nodes with
            wildcards, fractions of the model's cost, "predictions" (those of the earlier models in the graph), or
            "gates": before every gate, what the model would say if it skipped that gate's region and all later ones.
        head: A head's name, "auto", "shared" (the model's own final layers), "identity" (the value there is class
            scores already), a module, or a factory over a `Site`.
        criterion: How sure an exit is.
        threshold: Confidence from which a sample leaves, before calibration; one or one per exit.
        mask: Name of the input that marks padding, None to find it.
        max_head_share: An exit whose head costs more than this fraction of what it can save is refused.
        combine: What an exit answers, given the exits before it: "last", "ensemble", "confident" or "weighted".
    """

    where: Where
    head: Any
    criterion: Criterion
    threshold: float | tuple[float, ...]
    mask: str | None = None
    max_head_share: float = 1.0
    combine: str = "last"


@dataclass(frozen=True)
class GateRecipe:
    """Gates to insert.

    Attributes:
        where: "every-block", "halves" (attention and MLP parts where a block has them, else the block), "attention",
            "mlp", or names of regions or blocks with wildcards.
        unit: What scores a row: "auto", "conv", "linear", "recurrent", "policy" or "depth" (`eecompile.gates`).
        threshold: Score from which a gate is open; one, or one per gate.
        open_bias: Logit of the score that untrained units start near.
        always_on: Names with wildcards of regions that stay without a gate.
        min_open: At least this many gates let a row in.
        ungated: The first so many regions stay without a gate, so that every row runs them.
        monotone: A gate that is closed for a row closes all later ones.
        mask: Name of the input that marks padding, None to find it.
        max_unit_share: A gate whose score costs more than this fraction of its region is refused.
        widths: Shares of hidden channels, ascending, that regions and pairs of layers elsewhere may run with; empty for
            none. The last is 1.
    """

    where: Any = "every-block"
    unit: str = "auto"
    threshold: float | tuple[float, ...] = 0.5
    open_bias: float = 2.0
    always_on: tuple[str, ...] = ()
    min_open: int = 0
    ungated: int = 0
    monotone: bool = False
    mask: str | None = None
    max_unit_share: float = 0.5
    widths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.monotone and self.min_open:
            raise StrategyError(
                "min_open= and monotone contradict each other",
                got=f"min_open={self.min_open}, monotone: a closed gate closes all later ones, which min_open would open",
                wanted="one of them",
                hint=f"ungated={self.min_open} runs the first regions for every row",
            )


@dataclass(frozen=True)
class HaltRecipe:
    """Halting units to insert (adaptive computation time).

    Attributes:
        where: "every-block", or names of blocks with wildcards. Blocks of one shape in a row form a chain.
        repeat: 0 to halt over the depth of a chain; else each block is repeated up to so many times for each row.
        unit: "linear" (one score for a row) or "token" (one for every position of a sequence).
        epsilon: A row halts once its scores add up to `1 - epsilon`.
        bias: Logit that untrained scores start near; None: scores add up to one near the last step.
        mask: Name of the input that marks padding, None to find it.
        rule: What scores mean: "mean", they add up and the output is the mean of the states under them (Graves 2016), or
            "stop", each is the probability of stopping here for a row that got here, and the output is the state that it
            stopped at (Banino et al. 2021).
        threshold: What scores, or with "stop" the probability of having stopped, must add up to before calibration.
    """

    where: Any = "every-block"
    repeat: int = 0
    unit: str = "linear"
    epsilon: float = 0.01
    bias: float | None = None
    mask: str | None = None
    rule: str = "mean"
    threshold: float = 1.0


@dataclass(frozen=True)
class RouteRecipe:
    """A router to insert.

    Attributes:
        at: What the router reads: "input", the name of an input, or of a cut.
        branches: Where rows may go apart from the model's own way, by name: the share of the blocks that a light version
            keeps, or a module. None of them: rows go straight to exits.
        over: Names of the cuts where branches begin and end, "input" and "output" among them; None for from `at` to the
            end of the last block.
        unit: What scores a row: "auto", "conv", "linear" or "mlp" (`eecompile.routers`).
        bias: Logit of the model's own way that an untrained router starts near, the others at 0.
        mask: Name of the input that marks padding, None to find it.
    """

    at: str = "input"
    branches: tuple[tuple[str, Any], ...] = ()
    over: tuple[str, str] | None = None
    unit: str = "auto"
    bias: float = 0.0
    mask: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; modules are named, not kept."""
        named = [[name, CUSTOM if isinstance(what, nn.Module) else what] for name, what in self.branches]
        return {**vars(self), "branches": named, "over": None if self.over is None else list(self.over)}


@dataclass(frozen=True)
class Recipe:
    """Everything that a strategy wants in the graph.

    Attributes:
        equilibrium: Whether gradients are scaled at the exits of the training graph (Li et al. 2019).
    """

    exits: ExitRecipe | None = None
    gates: GateRecipe | None = None
    halting: HaltRecipe | None = None
    routes: RouteRecipe | None = None
    equilibrium: bool = False


@dataclass(frozen=True)
class TrainingStage:
    """One stage of training, as a strategy asks for it.

    Attributes:
        name: As reports show it.
        share: Share of the epochs of `fit`, relative to the other stages.
        gate_mode: How gates and routers decide meanwhile: "soft", "hard", "sample", "gumbel", "uniform",
            "dropped", "every" or "open".
        objective: Added to the task's objective, as JSON data; None for the task alone.
        kept_open: Share of the gates, the first ones, that stay open meanwhile: a curriculum from the last gate on.
        full_share: Share of the rows of each batch, the first ones, that every gate lets in.
    """

    name: str
    share: float
    gate_mode: str = "hard"
    objective: Mapping[str, Any] | None = None
    kept_open: float = 0.0
    full_share: float = 0.0
