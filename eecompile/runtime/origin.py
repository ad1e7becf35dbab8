"""Origin of a compiled module: the model as it was given, the one whose weights run, and the captures of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from eecompile.capture.export import Captured
from eecompile.program import Program


@dataclass
class Origin:
    """What a program was made from. No module, so that what it holds is not registered: the graph owns the parameters.

    Attributes:
        model: The model as it was given; None for a loaded program.
        captured: What was captured: that model, or all models of a cascade.
        running: The model whose weights run: the one given, or its copy once the trunk has been trained.
        given: Graph of the model as it was given, once the trunk has been trained.
        example: Flat example inputs.
        exported: The capture as `torch.export` gave it, for `save`.
        capture_training: Captures `captured` in train mode for a program; None where that cannot be done.
        notes: What is to be said about capture and training.
        autocast: Names of dtypes under whose autocast the graph was found to be the model, as a saved program says.
    """

    model: nn.Module | None = None
    captured: nn.Module | None = None
    running: nn.Module | None = None
    given: fx.GraphModule | None = None
    example: tuple[Tensor, ...] | None = None
    exported: ExportedProgram | None = None
    capture_training: Callable[[Program, nn.Module | None], Captured] | None = None
    notes: Sequence[str] = ()
    autocast: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.captured = self.model if self.captured is None else self.captured
        self.running = self.model if self.running is None else self.running
