"""The way into a compiled module: a call's arguments as flat tensors, refused where the graph would not be the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eecompile.program import Program
from eecompile.runtime.changed import ModelWatch
from eecompile.runtime.dtypes import DtypeCheck
from eecompile.runtime.precision import AutocastCheck, any_autocast
from eecompile.signature import OtherDtypes


class Entry:
    """Flattens calls of one program.

    Args:
        program: What is called.
        model: The user's model, which what was captured is compared with; None for a loaded program.
        captured: What was captured: that model, or all models of a cascade.
        autocast: Names of dtypes under whose autocast the graph was found to be the model, as a saved program says.
    """

    def __init__(
        self, program: Program, model: nn.Module | None, captured: nn.Module | None, autocast: Sequence[str] = ()
    ) -> None:
        self.signature = program.signature
        self.autocast = AutocastCheck(program, model, autocast)
        self.dtypes = DtypeCheck(program, model)
        self.watch = ModelWatch(program, captured)

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in graph order.

        Raises:
            CaptureError: The graph does not take these arguments, or is not the model any more.
        """
        try:
            flat = self.signature.flatten(args, kwargs)
        except OtherDtypes as error:
            self.watch.weights()  # a model that was converted gets inputs of its own dtype
            flat = self.dtypes(error)
        self.watch(flat)
        if any_autocast():
            self.autocast(flat)
        return flat
