"""What an exported program says of itself: its inputs and outputs by name, and the settings that it was written with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eecompile.errors import ExportError
from eecompile.ir.settings import Settings
from eecompile.passes.lower_cond import input_names, output_names
from eecompile.program import Program

KEY = "eecompile"
"""Under which a file holds it, in whatever place its format has for such."""


@dataclass(frozen=True)
class Description:
    """An exported program, as data.

    Attributes:
        target: What it was exported for.
        inputs: Names of the input tensors, in order.
        outputs: Names of the output tensors, in order; `exit_index` and `confidence` come last.
        exits: Names of the exits that are in it; `exit_index` counts all exits of the compiled module.
        settings: Values of all settings by family and slot.
        batch_axes: Of a program that takes one row: the batch axis of every input, and of every output of the model.
    """

    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exits: tuple[str, ...]
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    batch_axes: tuple[Sequence[int | None], Sequence[int | None]] = ((), ())

    @staticmethod
    def of(program: Program, settings: Settings, target: str) -> Description:
        exits = tuple(program.exits[i].name for i in settings.open_exits)
        return Description(target, input_names(program), output_names(program), exits, settings.to_dict())

    def to_json(self) -> str:
        return json.dumps({"format": "eecompile export", "version": 1, **asdict(self)})

    @staticmethod
    def from_json(text: str | None, where: str) -> Description:
        """Raises `ExportError` where the file was not written by `export`."""
        try:
            data: dict[str, Any] = json.loads(text or "")
            if data.pop("format") != "eecompile export" or data.pop("version") != 1:
                raise ValueError("another format or version")
            inputs, outputs, exits = (tuple(map(str, data[k])) for k in ("inputs", "outputs", "exits"))
            takes, gives = data.get("batch_axes", ((), ()))
            return Description(str(data["target"]), inputs, outputs, exits, dict(data["settings"]), (takes, gives))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                "this is no exported program of eecompile",
                where=where,
                got=str(error),
                wanted="a file or directory written by fast.export(...)",
            ) from error
