"""`pickle` and `torch.save(fast)`: what `fast.save` writes, as one archive; the user's model does not travel."""

from __future__ import annotations

import copyreg
import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from eecompile.artifact.read import read
from eecompile.artifact.write import write
from eecompile.module import CompiledModule


def packed(fast: CompiledModule) -> tuple[Any, tuple[bytes]]:
    """How a compiled module is made again from its archive.

    Raises:
        ArtifactError: The program cannot be saved.
    """
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as directory:
        write(fast, Path(directory) / "program")
        with zipfile.ZipFile(buffer, "w") as archive:
            for file in sorted((Path(directory) / "program").rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(directory))
    return unpacked, (buffer.getvalue(),)


def unpacked(data: bytes) -> CompiledModule:
    """The program of such an archive, as `eecompile.load` gives it."""
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(directory)
        return read(Path(directory) / "program")


copyreg.pickle(CompiledModule, packed)  # as soon as the package is used: `api` imports this file
