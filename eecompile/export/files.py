"""Writes files so that a failure leaves what was there before, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eecompile.errors import ExportError

FOLDER = "program.json"
"""What a folder holds that `export` wrote."""


@contextlib.contextmanager
def placing(path: Path, folder: bool) -> Iterator[Path]:
    """A path to write to, in a directory of its own next to `path`; what lies there in the end is moved into place.

    Args:
        folder: Whether a folder is written, not a file.

    Raises:
        ExportError: The place cannot be written to; before anything is written where that shows.
    """
    try:
        _check_free(path, folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield scratch / path.name
        _check_free(path, folder)  # writing takes a while
        written = sorted(scratch.iterdir(), key=lambda p: p.name == path.name)  # the file that names the others comes last
        for p in written:
            _replace(p, path.parent / p.name, scratch)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_free(path: Path, folder: bool) -> None:
    """Raises `OSError` where `path` is a directory with other files in it, or a file for a folder or the other way round."""
    if path.is_dir() and any(path.iterdir()) and not (path / FOLDER).is_file():
        raise IsADirectoryError(f"{path} is a directory with something else in it")
    if path.exists() and path.is_dir() != folder:
        raise OSError(f"{path} is {'a directory' if path.is_dir() else 'a file'}")


def _replace(new: Path, old: Path, scratch: Path) -> None:
    if new.is_file():
        with new.open("rb+") as f:
            os.fsync(f.fileno())
    elif old.is_dir():  # a directory cannot take another one's place
        os.replace(old, scratch / f"{old.name}.before")
    os.replace(new, old)


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(
        "the program could not be written; what was there before is unchanged",
        where=str(path),
        got=f"{type(error).__name__}: {error}",
        wanted="a file name in a directory that exists and can be written to",
    )
