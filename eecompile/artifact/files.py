"""The files of a saved program: named by content, listed with their hashes in one manifest that is replaced last.

A new save writes its files next to the old ones, then puts its manifest in place with one atomic rename, then removes what
the new manifest does not name. A full disk or a kill at any moment leaves the old program or the new one, whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch.export import ExportedProgram

from eecompile.errors import ArtifactError

MANIFEST = "eecompile.json"
FORMAT = "eecompile program"
VERSION = 3
WRITING_FAILS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have errors of their own for a full disk
OURS = re.compile(
    r"(?:eval|train|heads|weights|head_\w+|branch_\w+)-[0-9a-f]{12}\.(?:pt2|safetensors)|\.[\w.]+\.\d+\.part[\w.]*"
)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def free_place(path: Path) -> Path:
    """A directory to save in: new, empty, or one that holds a saved program or the remains of a save that was killed.

    Raises:
        ArtifactError: There is a file, or a directory with something else in it.
    """
    if path.exists() and not path.is_dir():
        raise ArtifactError("there is a file where the program should go", where=str(path), wanted="a directory")
    if path.is_dir() and not (path / MANIFEST).is_file():
        others = sorted(p.name for p in path.iterdir() if not OURS.fullmatch(p.name))
        if others:
            raise ArtifactError(
                "the directory holds something else",
                where=str(path),
                got=", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else ""),
                wanted="a new or empty directory, or one with a saved program",
            )
    return path


def put(directory: Path, stem: str, suffix: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Writes one file under a name that holds its hash; gives its entry for the manifest."""
    temporary = directory / f".{stem}.{os.getpid()}.part{suffix}"
    try:
        write(temporary)
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        digest = sha256(temporary)
        name = f"{stem}-{digest[:12]}{suffix}"
        size = temporary.stat().st_size
        os.replace(temporary, directory / name)
    except WRITING_FAILS as error:
        raise ArtifactError(
            "the program could not be saved; what was there before is unchanged",
            where=str(directory / f"{stem}{suffix}"),
            got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            hint="free some space or choose another directory",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": name, "sha256": digest, "bytes": size}


def commit(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Makes the new program the one that the directory holds, and removes the files of the old one."""
    text = json.dumps(manifest, indent=1, allow_nan=False)
    temporary = directory / f".{MANIFEST}.{os.getpid()}.part"
    try:
        with temporary.open("w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, directory / MANIFEST)
    except OSError as error:
        raise ArtifactError(
            "the program could not be saved; what was there before is unchanged",
            where=str(directory / MANIFEST),
            got=f"{type(error).__name__}: {error}",
            hint="free some space or choose another directory",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    kept = {MANIFEST, *(entry["file"] for entry in manifest["files"].values())}
    for path in directory.iterdir():  # only what `put` wrote: other files there are not ours
        if path.is_file() and OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


class _Remembered(io.RawIOBase):
    """A file whose errors are kept for later: torch's archive writer ends the whole process when a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def save_program(exported: ExportedProgram, path: Path) -> None:
    """`torch.export.save`, with an OSError where the disk is full.

    The archive holds no name of a file: the same program gives the same bytes.
    """
    with path.open("wb", buffering=0) as f:
        remembered = _Remembered(f)
        torch.export.save(exported, remembered)  # type: ignore[arg-type]
        if remembered.error is not None:
            raise remembered.error


def save(directory: Path, manifest: Mapping[str, Any], put_all: Callable[[dict[str, Any]], None]) -> None:
    """Makes the directory where it is missing, writes the files, then the manifest; a save that fails leaves none of them.

    Args:
        put_all: Writes every file but the manifest; adds its entry, as `put` gives it, to the dict that it is called with.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError("the directory cannot be made", where=str(directory), got=str(error)) from error
    entries: dict[str, Any] = {}
    try:
        put_all(entries)
        commit(directory, {**manifest, "files": entries})
    except ArtifactError:
        discard(directory, entries)
        raise


def discard(directory: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes the files of a save that failed, unless the program that is there has the very same ones."""
    try:
        kept = {entry["file"] for entry in manifest_of(directory)["files"].values()}
    except ArtifactError:  # no program there yet
        kept = set()
    for entry in entries.values():
        if entry["file"] not in kept:
            (directory / entry["file"]).unlink(missing_ok=True)


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest of a saved program.

    Raises:
        ArtifactError: No directory, no manifest, not one of ours, or of a later version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            "this is no saved program",
            where=str(directory),
            got="no such directory" if not directory.exists() else f"no {MANIFEST} in it",
            wanted="a directory written by fast.save(...)",
        )
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError("the manifest is truncated or altered", where=str(path), got=str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError("the manifest is not one of eecompile's", where=str(path), wanted=FORMAT)
    if data.get("version") != VERSION:
        raise ArtifactError(
            "the program was saved in another format version",
            where=str(path),
            got=data.get("version"),
            wanted=VERSION,
            hint="install the eecompile version that wrote it, or save it again",
        )
    return data


def checked(directory: Path, entry: Mapping[str, Any]) -> Path:
    """The path of a listed file, once its size and hash agree with the manifest.

    Raises:
        ArtifactError: It is missing, truncated or altered.
    """
    path = directory / str(entry["file"])
    if path.parent != directory:
        raise ArtifactError("the manifest names a file outside its directory", got=str(entry["file"]))
    if not path.is_file():
        raise ArtifactError("a file of the saved program is missing", where=str(path))
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(
            "a file of the saved program is truncated or altered",
            where=str(path),
            got=f"{size} bytes",
            wanted=f"{entry['bytes']} bytes",
        )
    digest = sha256(path)
    if digest != entry["sha256"]:
        raise ArtifactError(
            "a file of the saved program is altered", where=str(path), got=digest[:12], wanted=str(entry["sha256"])[:12]
        )
    return path


def refuse_pickles(path: Path) -> None:
    """Refuses a `.pt2` archive that would have torch unpickle something: it would run code of the file's author.

    Raises:
        ArtifactError: The file is no archive, or holds a pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(("_weights_config.json", "_constants_config.json")):
                    config = json.loads(archive.read(info)).get("config", {})
                    if any(entry.get("use_pickle") for entry in config.values()):
                        raise ArtifactError("the exported program holds pickled tensors", where=f"{path}: {info.filename}")
                elif "/sample_inputs/" in info.filename and info.file_size > 0:
                    raise ArtifactError("the exported program holds pickled inputs", where=f"{path}: {info.filename}")
                elif info.filename.endswith((".pkl", "custom_obj_0")) or "/custom_obj" in info.filename:
                    raise ArtifactError("the exported program holds a pickle", where=f"{path}: {info.filename}")
    except (zipfile.BadZipFile, json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            "the file is not a program of torch.export", where=str(path), got=f"{type(error).__name__}: {error}"
        ) from error
