"""Reading of `.pt2` archives."""

from __future__ import annotations

import importlib
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram


def load_archive(path: Path, extra_files: dict[str, Any] | None = None) -> ExportedProgram:
    """`torch.export.load`, with the operators of PT2E quantization, which torch has but does not register by itself.

    Raises:
        Exception: As `torch.export.load`, which raises many unrelated types on a file that is none of its own.
    """
    if _quantized(path):
        with suppress(ImportError):  # where it has moved, the loader says what is missing
            importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.export.load(path, extra_files=extra_files)


def _quantized(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(b"quantized_decomposed" in archive.read(n) for n in archive.namelist() if n.endswith("model.json"))
