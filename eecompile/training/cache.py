"""Tensors kept by name and block: in memory up to a limit, past it in files of a temporary directory.

A block holds some rows, the same ones under every name. Files are mapped, so that what is read of them is the system's to
keep or drop. The directory goes with the cache, also where an exception ends its use.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from eecompile.errors import EecompileError

DISK = 2**34


class Cache:
    """Append-only storage of tensors.

    Args:
        limit: Bytes kept in memory.
        disk_limit: Bytes kept in files; less where the disk has less, of which a tenth stays free.
    """

    def __init__(self, limit: int, disk_limit: int = DISK) -> None:
        self.limit, self.disk_limit = limit, disk_limit
        self.in_memory = self.on_disk = 0
        self.directory: Path | None = None
        self._blocks: dict[str, list[Tensor | Callable[[], Tensor]]] = {}
        self._bytes: dict[str, int] = {}

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._blocks.clear()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None

    def room_for(self, size: int) -> bool:
        """Whether so many more bytes fit, in memory or on the disk."""
        if self.in_memory + size <= self.limit:
            return True
        free = 0.9 * shutil.disk_usage(self.directory or tempfile.gettempdir()).free
        return size <= min(self.disk_limit - self.on_disk, free)

    def add(self, name: str, value: Tensor) -> None:
        """Keeps a block of `name`, detached and on the CPU.

        Raises:
            EecompileError: There is no more room, or the file cannot be written.
        """
        value = value.detach().to("cpu").contiguous()
        size = value.numel() * value.element_size()
        blocks = self._blocks.setdefault(name, [])
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            self._bytes[name] = self._bytes.get(name, 0) + size
            blocks.append(value.clone())
            return
        if not self.room_for(size):
            raise EecompileError(
                "features fit neither in memory nor on the disk",
                where=str(self.directory or tempfile.gettempdir()),
                got=f"{(self.in_memory + self.on_disk + size) / 2**20:.0f} MiB so far",
                hint="pass cached=False to train batch by batch",
            )
        self.on_disk += size
        blocks.append(self._written(name, len(blocks), value))

    def drop(self, name: str) -> None:
        """Forgets all blocks of `name`; memory is free again, files go with the directory."""
        self._blocks.pop(name, None)
        self.in_memory -= self._bytes.pop(name, 0)
        if self.directory is not None:
            for file in self.directory.glob(f"{name}.*.bin"):
                self.on_disk -= file.stat().st_size
                file.unlink()

    def block(self, name: str, index: int) -> Tensor:
        """One block; of a file, mapped: what is written to it stays in memory alone."""
        found = self._blocks[name][index]
        return found if isinstance(found, Tensor) else found()

    def __contains__(self, name: str) -> bool:
        return name in self._blocks

    def _written(self, name: str, index: int, value: Tensor) -> Callable[[], Tensor]:
        try:
            if self.directory is None:
                self.directory = Path(tempfile.mkdtemp(prefix="eecompile-features-"))
            path = self.directory / f"{name}.{index}.bin"
            value.flatten().view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise EecompileError(
                "features cannot be kept on the disk",
                where=str(self.directory or tempfile.gettempdir()),
                got=str(error),
                hint="free some space there, set TMPDIR to another disk, or pass cached=False to train batch by batch",
            ) from error
        shape, dtype = value.shape, value.dtype

        def mapped() -> Tensor:
            if value_is_empty:
                return torch.empty(shape, dtype=dtype)
            return torch.from_numpy(np.memmap(path, np.uint8, "c")).view(dtype).view(shape)

        value_is_empty = value.numel() == 0
        return mapped
