"""DATA of the command line: a loader of the user's, a file of texts, the digits, or a set of the examples."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import eecompile
from eecompile.cli import names, rows, sources
from eecompile.cli.text import Texts
from eecompile.errors import EecompileError, MissingDependencyError, near
from eecompile.training.batches import split

PARTS = ("train", "val", "test")
ROWS = {"val": 360, "test": 360}  # of 1,797; the others are for training
SPLIT_SEED = 20240
MEAN, DEVIATION = 0.3056, 0.3764
ROWS_OF_EXAMPLE = 8


def loader(
    spec: str, batch_size: int | None = None, texts: Texts | None = None, *, shuffle: bool = False, labels: bool = True
) -> Iterable[Any]:
    """The loader that `--data` names.

    Args:
        batch_size: Of built-in data and files; a loader of the user's has its own.
        texts: How files of texts are read for the model.
        shuffle: Whether the rows of a file come in another order in each pass.
        labels: Whether the rows of a file must have labels.

    Raises:
        EecompileError: Unknown name, or what is named is no loader.
        MissingDependencyError: scikit-learn is needed and not installed.
    """
    if Path(spec).suffix in rows.FORMATS:
        if texts is None:
            raise EecompileError("a file of texts does not fit this model", got=spec, wanted="file.py:attr giving a loader")
        return texts.loader(Path(spec), batch_size, shuffle=shuffle, labels=labels)
    name, _, part = spec.partition(":")
    known = {n.partition(":")[0] for n in names.DATA}
    if name in known:
        part = part or "train"
        if part not in PARTS:
            raise EecompileError("no such part of the data", got=repr(spec), wanted=near(part, PARTS))
        if name == "digits":
            return digits(part, batch_size)
        return _of_examples(f"{name}:{part}", batch_size)
    if not sources.is_attribute(spec):
        raise EecompileError(
            "unknown data",
            got=repr(spec),
            wanted=f"file.py:attr giving a loader, a file ({', '.join(rows.FORMATS)}), or built in: {near(name, known)}",
        )
    found = sources.attribute(spec, "a loader")
    if callable(found) and not hasattr(found, "__iter__"):
        found = sources.made(found, spec, "a loader")
    if not hasattr(found, "__iter__"):
        raise EecompileError(
            "this is no loader",
            where=spec,
            got=type(found).__name__,
            wanted="something that can be iterated again and again and yields (inputs, labels)",
        )
    return found  # type: ignore[no-any-return]


def digits(part: str, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """The 8 x 8 digits: float32 [B, 1, 8, 8], normalised, and int64 [B]; split as in the examples."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    val, test = ROWS["val"], ROWS["test"]
    rows = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}[part]
    data = TensorDataset(images[rows], labels[rows])
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size=batch_size or 128, shuffle=part == "train", generator=generator)


def digit_images() -> tuple[Tensor, Tensor]:
    """All 1,797 digits of scikit-learn: float32 [N, 1, 8, 8] of mean 0 and deviation 1, int64 [N].

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn", got=str(error), hint="pip install 'eecompile[demo]'"
        ) from error
    values, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(values * 15.9375).to(torch.uint8).view(-1, 1, 8, 8)  # 0 to 16 becomes 0 to 255
    return images.float().div_(255).sub_(MEAN).div_(DEVIATION), torch.from_numpy(labels).long()


def _of_examples(spec: str, batch_size: int | None) -> Iterable[Any]:
    """A set of `examples/datasets.py`, which is in the source tree but not in an installed package."""
    roots = [Path.cwd(), Path(eecompile.__file__).resolve().parents[1]]
    root = next((r for r in roots if (r / "examples" / "datasets.py").is_file()), None)
    if root is None:
        raise EecompileError(
            "this data set belongs to the examples, which an installed eecompile does not contain",
            where=spec,
            got=f"no examples/datasets.py in {' or '.join(str(r) for r in roots)}",
            hint="run this in a copy of the source tree, or give file.py:attr; digits works everywhere",
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    datasets = sources.attribute("examples.datasets:loader", "the loaders of the examples")
    try:
        found: Iterable[Any] = datasets(spec, batch_size=batch_size)
    except RuntimeError as error:  # a DatasetError says what, where and the next step
        raise EecompileError("the data set cannot be had", where=spec, got=str(error)) from error
    return found


def first_rows(data: Iterable[Any], rows: int = ROWS_OF_EXAMPLE) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments and labels of the first `rows` rows, over as many batches as that takes.

    Raises:
        EecompileError: The loader is empty, or its items are not batches.
    """
    collected: list[Any] = []
    count = 0
    for index, item in enumerate(data):
        batch = split(item, index)
        tensors = [t for t in (*batch.args, *batch.kwargs.values()) if isinstance(t, Tensor) and t.ndim]
        if not tensors:
            raise EecompileError("the batches of this data hold no tensors", where=batch.where)
        collected.append(batch)
        count += len(tensors[0])
        if count >= rows:
            break
    if not collected:
        raise EecompileError("the data is empty", got="no batch", wanted=f"{rows} rows for an example")
    args = tuple(_joined([b.args[i] for b in collected], rows) for i in range(len(collected[0].args)))
    kwargs = {k: _joined([b.kwargs[k] for b in collected], rows) for k in collected[0].kwargs}
    return args, kwargs, _joined([b.labels for b in collected], rows)


def _joined(values: list[Any], rows: int) -> Any:
    """The first rows of tensors that may differ in length beyond the first axis; other values as they are."""
    if not isinstance(values[0], Tensor) or values[0].ndim == 0:
        return values[0]
    same = list(itertools.takewhile(lambda v: v.shape[1:] == values[0].shape[1:], values))
    return torch.cat(same)[:rows]
