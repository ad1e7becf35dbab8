"""Checkpoints of a training run: a directory with `state.json` and `state.safetensors`, never a pickle.

A checkpoint is written next to its place, flushed to the disk and renamed, so that a kill or a full disk at
any moment leaves the older ones whole. The JSON holds the checksum of the tensors: an altered file is
refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from eecompile.errors import ArtifactError, EecompileError

FORMAT = 2
KEEP = 2
_NAME = re.compile(r"step-\d{10}-epoch-\d{5}")


class Checkpoints:
    """The checkpoints in one directory; keeps the newest `KEEP`.

    Args:
        directory: Made at the first save.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ArtifactError("checkpoint_dir is a file", where=str(directory), wanted="a directory")
        self._written: list[Path] = []

    def existing(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found)

    @property
    def latest(self) -> Path | None:
        found = self.existing()
        return found[-1] if found else None

    def save(self, step: int, epoch: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        """Writes one checkpoint, after `step` steps and `epoch` whole epochs.

        After it, only the newest ones of this run are left.

        Raises:
            EecompileError: The disk is full or cannot be written; checkpoints that were there are untouched.
        """
        target = self.directory / f"step-{step:010d}-epoch-{epoch:05d}"
        partial = self.directory / f".partial-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(".partial-*"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            data = save_tensors(dict(tensors))
            _write(partial / "state.safetensors", data)
            document = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **state}
            _write(partial / "state.json", json.dumps(document, allow_nan=False).encode())
            _flush(partial)
            if target.exists():
                target.rename(partial / "replaced")
            partial.rename(target)
            shutil.rmtree(target / "replaced", ignore_errors=True)
            _flush(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = f"; the last whole checkpoint, {self.latest}, is kept" if self.latest else ""
            raise EecompileError(
                "the checkpoint could not be written",
                where=str(target),
                got=str(error),
                hint=f"free some space or choose another checkpoint_dir, then call fit again{kept}",
            ) from error
        self._prune(target)
        return target

    def _prune(self, newest: Path) -> None:
        self._written = [path for path in self._written if path != newest] + [newest]
        kept = self._written[-KEEP:]
        for path in self.existing():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """State and tensors of one checkpoint.

        Raises:
            ArtifactError: A file is missing, truncated, altered or of another format; the message names it.
        """
        self._written = [path]
        text, data = _read(path / "state.json"), _read(path / "state.safetensors")
        hint = f"remove {path} to go on from an older checkpoint, or pass resume=False"
        try:
            state = json.loads(text)
            if not isinstance(state, dict):
                raise TypeError("not an object")
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                "the checkpoint is damaged", where=str(path / "state.json"), got=str(error), hint=hint
            ) from error
        if state.get("format") != FORMAT:
            raise ArtifactError(
                "the checkpoint has another format",
                where=str(path),
                got=state.get("format"),
                wanted=FORMAT,
                hint=hint,
            )
        tensors_file = str(path / "state.safetensors")
        if hashlib.sha256(data).hexdigest() != state.get("sha256"):
            raise ArtifactError("the checkpoint was altered or truncated", where=tensors_file, hint=hint)
        try:
            return state, load_tensors(data)
        except SafetensorError as error:
            raise ArtifactError("the checkpoint is damaged", where=tensors_file, got=str(error), hint=hint) from error


def resumed(
    checkpoints: Checkpoints, resume: bool | str, settings: Mapping[str, Any], error: type[EecompileError] = EecompileError
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """State and tensors of the newest checkpoint, None where the run starts anew.

    Args:
        settings: Of this run; the state's `settings` must be the same.
        error: The class to raise.

    Raises:
        EecompileError: There is none and `resume="must"`, or it is of a run with other settings.
        ArtifactError: It is damaged.
    """
    latest = checkpoints.latest if resume else None
    if latest is None:
        if resume == "must":
            raise error(
                "there is no checkpoint to resume from",
                where=str(checkpoints.directory),
                hint="check checkpoint_dir, or pass resume=True to start where there is none",
            )
        return None
    state, tensors = checkpoints.load(latest)
    differ = differences(state["settings"], settings)
    if differ:
        raise error(
            "the checkpoint is of a run with other settings",
            where=str(latest),
            got="; ".join(differ),
            hint="use the same settings, another checkpoint_dir, or resume=False to start anew",
        )
    return state, tensors


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a checkpoint and those of this call, one line each."""
    keys = [*saved, *(key for key in now if key not in saved)]
    return [
        f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in keys
        if saved.get(key) != now.get(key)
    ]


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            "a file of the checkpoint cannot be read",
            where=str(path),
            got=str(error),
            hint=f"remove {path.parent} to go on from an older checkpoint, or pass resume=False",
        ) from error
