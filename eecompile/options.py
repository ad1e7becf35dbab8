"""Options of a compilation, as one value: what `eecompile(...)` and the command line take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from eecompile.capture import BatchAxis
from eecompile.errors import CaptureError, StrategyError
from eecompile.plain import check_kind, check_number, check_switches, plain

Prediction = str | int | Sequence[str | int | None] | None


@dataclass(frozen=True)
class CompileOptions:
    """How a model is captured, rewritten and run.

    Args:
        prediction: Which output holds the class scores, by name or index; None to find it. For a cascade also a list, one
            entry for each model.
        executor: "auto" or the name of an executor.
        backend: "eager", "inductor" or "onnxruntime".
        batch_axis: Axis of the batch in every tensor input, or by input name.
        capture: "export" or "blocks".
        dynamic: Further free axes by input name; None to find them.
        blocks: The repeated unit, as a module path with `*`; None to find it.
        measure: Whether exits are placed by measured time.
        seed: Seed of the new units' weights.
    """

    prediction: Prediction = None
    executor: str = "auto"
    backend: str = "eager"
    batch_axis: BatchAxis = 0
    capture: str = "export"
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    blocks: str | None = None
    measure: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name), f.name))
        check_switches(type(self), vars(self))
        check_number("seed", self.seed, whole=True)
        if not callable(self.batch_axis) and not isinstance(self.batch_axis, Mapping):
            check_number("batch_axis", self.batch_axis, least=0, whole=True, error=CaptureError)
        named = self.prediction if isinstance(self.prediction, list | tuple) else [self.prediction]
        for one in named:
            if one is not None and not isinstance(one, bool):
                check_kind("prediction", one, (str, int), "the name or index of an output", StrategyError)
        free: Any = self.dynamic
        if free is not None and not (isinstance(free, Mapping) and all(isinstance(a, Mapping) for a in free.values())):
            raise CaptureError(
                "dynamic= names further free axes by input",
                got=repr(free),
                wanted='{"input_ids": {1: "seq"}}, {} for no other axis than the batch, or None to find them',
            )
