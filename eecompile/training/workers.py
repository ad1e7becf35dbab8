"""Several processes: training shares the rows by accelerate; measuring shares the batches, and each process ends with all.

A measurement (`evaluate`, `calibrate`, `report`, validation) reads the whole loader in every process, computes every P-th
batch in one of P processes, and exchanges what was computed of it. What follows is the same in every process, on the same
rows in the same order as in one process alone.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from eecompile.errors import EecompileError
from eecompile.training.batches import Batch
from eecompile.untrained import bytes_of

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """How many processes there are, and which of them this is; where a launcher started several, their group is started."""
    if not dist.is_available():
        return 1, 0
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def exchanged(make: Callable[[], T]) -> list[T]:
    """What every process makes, by rank; tensors are to be on the CPU.

    Raises:
        EecompileError: Another process failed. This one's own error is raised as it is.
    """
    count, _ = processes()
    if count == 1:
        return [make()]
    value, error = None, None
    try:
        value = make()
    except Exception as own:  # noqa: BLE001 (raised below, once the other processes know)
        error = own
    said: list[Any] = [None] * count
    dist.all_gather_object(said, (value, error and f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(said):
        if text is not None:
            raise EecompileError("another process failed", where=f"process {rank} of {count}", got=text)
    return [found for found, _ in said]


def main_only(do: Callable[[], T]) -> T:
    """What the first process makes; the others wait for it."""
    rank = processes()[1]
    found: Any = exchanged(lambda: do() if rank == 0 else None)[0]
    return found  # type: ignore[no-any-return]


def shared(batches: Iterable[Batch], compute: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
    """Each batch with what `compute` makes of it; several processes share the work, and each of them yields all of it.

    Args:
        batches: The same in every process, see `whole`.
        compute: Gives what can be pickled, with tensors on the CPU.

    Raises:
        EecompileError: The processes read different rows, or another one failed.
    """
    count, rank = processes()
    if count == 1:
        for batch in batches:
            yield batch, compute(batch)
        return
    stream, taken = iter(batches), list[Batch]()

    def turn() -> tuple[list[int], T | None]:
        taken[:] = islice(stream, count)
        return [checksum(batch) for batch in taken], compute(taken[rank]) if rank < len(taken) else None

    while True:
        found = exchanged(turn)
        if any(read != found[0][0] for read, _ in found):
            raise EecompileError(
                "the processes read different rows",
                where=f"{taken[0].where if taken else 'the last batch'} or one of the {count - 1} after it",
                wanted="the same rows in the same order in each process",
                hint="pass shuffle=False and no random augmentation",
            )
        for batch, (_, value) in zip(taken, found, strict=False):
            yield batch, value  # type: ignore[misc]
        if len(taken) < count:
            return


def checksum(batch: Batch) -> int:
    """Of every tensor among inputs and labels."""
    found, todo = 0, [batch.args, batch.kwargs, batch.labels]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            found = zlib.crc32(bytes_of(value), zlib.crc32(repr(value.shape).encode(), found))
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (tuple, list)):
            todo += value
    return found


def whole(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader of all rows, where accelerate or a `DistributedSampler` made one that gives a process its share of them."""
    if processes()[0] == 1 or not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDatasetShard):
        raise EecompileError(
            "this loader cannot be read as a whole in each process",
            got=f"{type(loader).__name__} of accelerate over a {type(loader.dataset).__name__}",
            wanted="the loader as it was before accelerator.prepare",
        )
    order: Any = loader.batch_sampler
    if isinstance(order, BatchSamplerShard):
        order = order.batch_sampler
    elif isinstance(loader.sampler, DistributedSampler):
        order = BatchSampler(SequentialSampler(loader.dataset), loader.batch_size or 1, loader.drop_last)  # type: ignore[arg-type]
    else:
        return loader
    return DataLoader(loader.dataset, batch_sampler=order, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def make_accelerator(given: Any = None) -> Any:
    """The caller's accelerator, or one that moves a model only where several processes need it to be moved.

    Raises:
        EecompileError: It accumulates gradients, or knows another number of processes than torch.
    """
    count, _ = processes()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a closed gate's part, an exit that none reaches
    found = Accelerator(device_placement=count > 1, kwargs_handlers=[unused]) if given is None else given
    if getattr(found, "gradient_accumulation_steps", 1) != 1:
        raise EecompileError(
            "gradient accumulation is not supported by fit",
            got=f"gradient_accumulation_steps={found.gradient_accumulation_steps}",
            wanted="1",
            hint="use larger batches, or a training loop of your own with fast.run and fast.loss",
        )
    if found.num_processes != count:
        raise EecompileError(
            "accelerate does not know the processes that torch.distributed has",
            got=f"{found.num_processes} against {count}",
            hint="start them with `torchrun` or `accelerate launch`, which set RANK, LOCAL_RANK and WORLD_SIZE",
        )
    return found


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


def only_trained_is_reduced(step: nn.Module, trained: Iterable[Tensor]) -> None:
    """`DistributedDataParallel` of this module waits for no gradient of what is frozen."""
    known = {id(p) for p in trained}
    step.__dict__["_ddp_params_and_buffers_to_ignore"] = [n for n, p in step.named_parameters() if id(p) not in known]


def of_the_first(tensors: Iterable[Tensor]) -> None:
    """The first process's numbers in every process: running statistics are those of a process's own rows."""
    if processes()[0] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
