"""Parts of data sets as several examples use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from examples import datasets

Parts = dict[str, DataLoader[Any]]


def drawn(loader: DataLoader[Any], rows: int, seed: int) -> DataLoader[Any]:
    """The same data, `rows` of them drawn anew for every pass."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(loader.dataset, num_samples=rows, generator=generator)  # type: ignore[arg-type]
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


def cifar_parts(epoch: int, held_out: Mapping[str, int], *, quick: bool, seed: int) -> tuple[DataLoader[Any], Parts]:
    """CIFAR-10 for training, augmented and `epoch` rows a pass, and the parts held out, so many rows of each.

    Args:
        quick: Takes the stand-in, all rows of its parts held out.
    """
    every = datasets.loader("cifar10:train", batch_size=32 if quick else 64, standin=quick, seed=seed, augmented=not quick)
    limits: dict[str, int | None] = dict.fromkeys(held_out) if quick else dict(held_out)
    found = {part: datasets.loader(f"cifar10:{part}", standin=quick, limit=n) for part, n in limits.items()}
    return drawn(every, epoch, seed), found


def imdb_parts(rows: Mapping[str, int], *, quick: bool, seed: int) -> Parts:
    """The parts of IMDB, as tokens for MiniLM, so many rows of each.

    Args:
        quick: Takes the stand-in.
    """
    train = datasets.TokenDataset(datasets.tokens("train", rows["train"], standin=quick))
    generator = torch.Generator().manual_seed(seed)
    found: Parts = {"train": DataLoader(train, 32, shuffle=True, generator=generator)}
    for part in ("val", "test"):
        found[part] = datasets.loader(f"minilm_imdb:{part}", limit=rows[part], standin=quick, batch_size=50)
    return found
