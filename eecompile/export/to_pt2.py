"""An exported program as a `.pt2` file that torch loads alone."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch._export.serde.serialize import SerializeError
from torch.export import ExportedProgram

from eecompile.errors import ExportError
from eecompile.export.description import KEY, Description
from eecompile.ir.settings import Settings
from eecompile.passes.lower_cond import lower_cond
from eecompile.program import Program


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Writes the program; thresholds and temperatures are buffers of it."""
    path.write_bytes(archive(lower_cond(program, settings), description))


def archive(exported: ExportedProgram, description: Description) -> bytes:
    """A `.pt2` archive; torch's writer ends the process where a disk is full, so it writes to memory."""
    memory = io.BytesIO()
    try:
        torch.export.save(exported, memory, extra_files={f"{KEY}.json": description.to_json()})
    except SerializeError as error:
        raise ExportError(
            "torch.export cannot save the program",
            got=" ".join(str(error).split())[:400],
            hint="a unit of your own that makes a tensor from numbers must keep it as a buffer instead",
        ) from error
    return memory.getvalue()
