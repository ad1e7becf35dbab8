"""Front ends: from a user's model to a flat graph and its calling convention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from eecompile.capture.archive import load_archive
from eecompile.capture.axes import BatchAxis
from eecompile.capture.blocks import capture_blocks
from eecompile.capture.export import Captured, capture_export
from eecompile.capture.exported import capture_program
from eecompile.capture.quiet import quiet
from eecompile.errors import CaptureError, check_name

FRONT_ENDS = ("export", "blocks")


def capture(
    model: nn.Module | ExportedProgram | str | Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    front_end: str = "export",
    batch_axis: BatchAxis = 0,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    blocks: str | None = None,
) -> Captured:
    """Captures a model, a program of `torch.export`, or a `.pt2` file.

    Raises:
        CaptureError: Unknown front end, unreadable file, or the front end's own reasons.
    """
    check_name("way to capture", front_end, FRONT_ENDS, CaptureError)
    if isinstance(model, str | Path):
        model = read_pt2(Path(model))
    if isinstance(model, ExportedProgram):
        if front_end == "blocks":
            raise CaptureError(
                'capture="blocks" taps the modules of a Python model, which an exported program no longer has',
                got=type(model).__name__,
                hint='pass the model itself, or leave capture="export"',
            )
        return capture_program(model, args, kwargs)
    if front_end == "blocks":
        return capture_blocks(model, args, kwargs, batch_axis=batch_axis, dynamic=dynamic, pattern=blocks)
    return capture_export(model, args, kwargs, batch_axis=batch_axis, dynamic=dynamic)


def read_pt2(path: Path) -> ExportedProgram:
    """Reads a `.pt2` file.

    Raises:
        CaptureError: It is missing or not a program of `torch.export`.
    """
    if not path.is_file():
        raise CaptureError("there is no such file", where=str(path), wanted="a .pt2 file of torch.export.save")
    try:
        with quiet():
            return load_archive(path)
    except Exception as error:  # torch raises many unrelated types on a foreign file
        raise CaptureError(
            "the file is not a program of torch.export", where=str(path), got=f"{type(error).__name__}: {error}"[:300]
        ) from error


__all__ = ["FRONT_ENDS", "BatchAxis", "Captured", "capture", "capture_blocks", "capture_export", "capture_program"]
