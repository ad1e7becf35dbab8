"""accelerate: one process by default, several without a change of the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader

from eecompile.errors import EecompileError


def make_accelerator(given: Any = None) -> Any:
    """The caller's accelerator, or one that moves a model only where several processes need it to be
    moved."""
    if given is None:
        several = PartialState().num_processes > 1
        return Accelerator(device_placement=several)
    if getattr(given, "gradient_accumulation_steps", 1) != 1:
        raise EecompileError(
            "gradient accumulation is not supported by fit",
            got=f"gradient_accumulation_steps={given.gradient_accumulation_steps}",
            wanted="1",
            hint="use larger batches, or a training loop of your own with fast.run and fast.loss",
        )
    return given


def shard(accelerator: Any, loader: Iterable[Any]) -> Any:
    """The loader, or this process's share of it."""
    if accelerator.num_processes == 1:
        return loader
    if not isinstance(loader, DataLoader):
        raise EecompileError(
            "several processes need a torch DataLoader to share the data",
            got=type(loader).__name__,
            wanted="torch.utils.data.DataLoader",
        )
    return accelerator.prepare_data_loader(loader)
