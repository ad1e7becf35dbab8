"""A full disk, or a kill at any moment of saving, leaves the old program or the new one, whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from eecompile import ArtifactError, load
from eecompile.artifact import files
from tests.artifact import programs
from tests.artifact.test_roundtrip import environment
from tests.capture.nets import rows

OLD, NEW = 0.25, 0.75


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "program"
    fast = programs.net()
    fast.set_thresholds(OLD)
    fast.save(place)
    return place


@pytest.fixture
def place(old: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "program"))


def threshold(place: Path) -> float:
    """Loads the program and gives its threshold."""
    fast = load(place)
    with torch.no_grad():
        fast(rows(3))
    return fast.exits[0].threshold


def whole(place: Path) -> str:
    """Every file that the manifest names is there and has the right content; gives the name of the heads' file."""
    data = files.manifest_of(place)
    for entry in data["files"].values():
        files.checked(place, entry)
    return str(data["files"]["heads"]["file"])


@pytest.mark.parametrize("stage", ["write", "fsync", "replace", "manifest"])
def test_a_full_disk_at_every_stage(place, monkeypatch, stage):
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    fast = load(place)
    fast.set_thresholds(NEW)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if stage == "write":
        monkeypatch.setattr("eecompile.artifact.write.save_file", full)
    elif stage == "manifest":
        monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b).name == files.MANIFEST else real["replace"](a, b))
    else:
        monkeypatch.setattr(os, stage, full)
    with pytest.raises(ArtifactError) as caught:
        fast.save(place)
    text = str(caught.value)
    assert "could not be saved; what was there before is unchanged" in text
    assert "No space left on device" in text
    assert "free some space" in text
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    fast.save(place)
    assert threshold(place) == NEW


LIMITED = """
import resource, sys
import eecompile

place, limit = sys.argv[1:]
fast = eecompile.load(place)
fast.set_thresholds(0.75)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    fast.save(place)
except eecompile.ArtifactError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.nightly
def test_files_that_really_cannot_grow(place):
    """safetensors and torch.export write with code of their own, whose errors are not OSErrors."""
    before = sorted(p.name for p in place.iterdir())
    sizes = sorted(p.stat().st_size for p in place.iterdir())
    for limit in (sizes[0] // 2, sizes[-1] // 2):  # the smallest file fails, then only the largest
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(place), str(limit)],
            capture_output=True,
            text=True,
            env=environment() | {"PYTHONPATH": str(Path(files.__file__).resolve().parents[2])},
        )
        assert done.returncode == 2, done.stderr[-2000:]
        assert "could not be saved" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(p.name for p in place.iterdir()) == before
    assert threshold(place) == OLD


KILLED = """
import os, signal, sys, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
import eecompile
import eecompile.artifact.write as writing

root = Path(sys.argv[1])
fast = eecompile.load(root / "program")
fast.set_thresholds(0.75)
with torch.no_grad():
    next(fast.heads.parameters()).mul_(2)
count = 0

def step(*_):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, half=None):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        step()
        result = real(*args, **kwargs)
        step()
        return result
    setattr(owner, name, wrapped)

def half_written(write):
    def wrapped(value, path):
        write(value, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        step()
        Path(path).write_bytes(content)
    return wrapped

writing.save_file = half_written(writing.save_file)
writing.files.save_program = half_written(writing.files.save_program)
for name in ("fsync", "replace"):
    around(os, name)
around(Path, "unlink")

at = 1
while True:
    place = root / f"killed{at}"
    shutil.copytree(root / "program", place)
    child = os.fork()
    if child == 0:
        fast.save(place)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    at += 1
print(at)
"""


def test_a_kill_at_every_step(place):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(place.parent)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment() | {"PYTHONPATH": str(Path(files.__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = int(done.stdout)
    assert steps >= 15, "three files: written by half, flushed, renamed; the old ones removed"
    before = whole(place)
    found = [whole(place.parent / f"killed{k}") for k in range(1, steps + 1)]
    after = found[-1]
    assert after != before
    turn = found.index(after)
    assert found == [before] * turn + [after] * (steps - turn), "old until one rename, new from then on"
    assert 0 < turn < steps - 1
    last, first = (place.parent / f"killed{k}" for k in (turn, turn + 1))
    assert threshold(last) == OLD
    assert threshold(first) == NEW
    load(last).save(last)
    kept = {e["file"] for e in files.manifest_of(last)["files"].values()}
    assert {p.name for p in last.iterdir()} == kept | {files.MANIFEST}, "the remains are cleaned up by the next save"


def test_files_of_somebody_else_are_neither_overwritten_nor_removed(place, tmp_path):
    fast = load(place)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("text")
    for target, said in ((other, "chapter.tex"), (other / "chapter.tex", "there is a file where the program should go")):
        with pytest.raises(ArtifactError) as caught:
            fast.save(target)
        assert said in str(caught.value)
        assert str(target) in str(caught.value)
    assert [p.name for p in other.iterdir()] == ["chapter.tex"]
    (place / "README.md").write_text("mine")
    (place / "eval.pt2").write_text("mine")
    fast.save(place)
    assert (place / "README.md").read_text() == (place / "eval.pt2").read_text() == "mine"
    empty = tmp_path / "a" / "new" / "place"
    fast.save(empty)
    assert threshold(empty) == OLD


def test_a_first_save_that_was_killed_can_be_repeated(place, tmp_path):
    fast = load(place)
    target = tmp_path / "first"
    target.mkdir()
    shutil.copy(next(place.glob("heads-*")), target)
    (target / ".eval.123.part.pt2").write_bytes(b"half")
    fast.save(target)
    assert threshold(target) == OLD
    assert len(list(target.iterdir())) == 3


def test_a_place_that_cannot_be_made(place, tmp_path):
    fast = load(place)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ArtifactError) as caught:
        fast.save(tmp_path / "file" / "below")
    assert "the directory cannot be made" in str(caught.value)


def test_saving_twice_keeps_one_set_of_files(place):
    fast = load(place)
    names = sorted(p.name for p in place.iterdir())
    fast.save(place)
    assert sorted(p.name for p in place.iterdir()) == names, "the same content has the same names"
    fast.set_thresholds(NEW)
    fast.save(place)
    assert len(list(place.iterdir())) == len(names)
    assert json.loads((place / files.MANIFEST).read_text())["exits"][0]["name"] == "exit_0"
