"""Truncated, altered, foreign and hostile directories are refused by name, and nothing in them is run."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eecompile import ArtifactError, MissingDependencyError, load
from eecompile.artifact import files
from eecompile.signature import load_spec
from tests.artifact import programs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "program"
    programs.net(head=programs.Wide()).save(place)
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "program"))


def one(place: Path, pattern: str) -> Path:
    return next(place.glob(pattern))


def manifest(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = place / files.MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replaced(place: Path, key: str, content: bytes) -> Path:
    """Puts other content under a file's name, with a manifest that agrees: an attacker can write both."""
    entry = json.loads((place / files.MANIFEST).read_text())["files"][key]
    path = place / entry["file"]
    path.write_bytes(content)
    fresh = {"file": entry["file"], "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest(place, lambda data: data["files"].__setitem__(key, fresh))
    return path


@pytest.mark.parametrize("pattern", ["eval-*.pt2", "heads-*.safetensors", "head_exit_0-*.pt2"])
@pytest.mark.parametrize("how", ["truncated", "altered", "missing", "longer"])
def test_a_damaged_file_is_named(place, pattern, how):
    path = one(place, pattern)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-7])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "altered":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    with pytest.raises(ArtifactError) as caught:
        load(place)
    text = str(caught.value)
    assert str(path) in text
    assert {"truncated": "truncated or altered", "longer": "bytes", "altered": "is altered", "missing": "is missing"}[
        how
    ] in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d.update(version=99),
            ["another format version", "got:    99", f"wanted: {files.VERSION}", "install the eecompile version"],
        ),
        (lambda d: d.update(format="pickle"), ["not one of eecompile's"]),
        (lambda d: d.pop("exits"), ["does not describe a program", "KeyError: 'exits'"]),
        (lambda d: d.pop("files"), ["does not describe a program"]),
        (lambda d: d.update(strategy={"name": "nobody"}), ["strategy is not known here", "nobody", "branchy"]),
        (lambda d: d["exits"].pop(), ["do not fit one another", "1 exits, 2 heads"]),
        (lambda d: d["settings"]["evaluated"]["exits"].popitem(), ["settings do not fit the program", "another program"]),
        (lambda d: d["files"]["heads"].update(file="../program/eval.pt2"), ["outside its directory"]),
        (lambda d: d["files"]["heads"].update(file="/etc/passwd"), ["outside its directory"]),
        (lambda d: d.update(signature="text"), ["does not describe a program"]),
        (lambda d: d["heads"].update(exit_0={"kind": "nobody"}), ["does not describe a program"]),
    ],
)
def test_a_manifest_that_was_changed(place, change, said):
    manifest(place, change)
    with pytest.raises(ArtifactError) as caught:
        load(place)
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'"text"', b"null"])
def test_a_manifest_that_is_none(place, content):
    (place / files.MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest is (truncated or altered|not one of eecompile's)"):
        load(place)


def test_other_places(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("text")
    for name, got in (("model", f"no {files.MANIFEST} in it"), ("nowhere", "no such directory"), ("file", "no ")):
        with pytest.raises(ArtifactError) as caught:
            load(tmp_path / name)
        text = str(caught.value)
        assert "this is no saved program" in text
        assert str(tmp_path / name) in text
        assert got in text
        assert "written by fast.save" in text


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    trace = tmp_path / "it ran"
    content = pickle.dumps(Bomb(trace))
    pickle.loads(content)
    assert trace.exists(), "the bomb works"
    trace.unlink()
    return content, trace


@pytest.mark.parametrize("key", ["heads", "eval", "head exit_0"])
def test_a_pickle_in_place_of_a_file_is_not_run(place, bomb, key):
    content, trace = bomb
    path = replaced(place, key, content)
    with pytest.raises(ArtifactError) as caught:
        load(place)
    assert str(path) in str(caught.value)
    assert not trace.exists()


def test_a_file_of_torch_save_is_not_run(place, bomb):
    _, trace = bomb
    stream = io.BytesIO()
    torch.save(Bomb(trace), stream)
    for key in ("heads", "eval"):
        replaced(place, key, stream.getvalue())
        with pytest.raises(ArtifactError):
            load(place)
        assert not trace.exists()


@pytest.mark.parametrize("member", ["sample_inputs", "weights"])
def test_a_pickle_within_an_exported_program_is_not_run(place, bomb, member):
    """The archive of torch.export has places where torch would unpickle: example inputs, and tensors marked so."""
    content, trace = bomb
    stream = io.BytesIO()
    changed = False
    with zipfile.ZipFile(one(place, "eval-*.pt2")) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if member == "weights" and info.filename.endswith("_weights_config.json"):
                config = json.loads(data)
                for entry in config["config"].values():
                    entry["use_pickle"] = changed = True
                data = json.dumps(config).encode()
            if member == "sample_inputs" and "/sample_inputs/" in info.filename:
                data, changed = content, True
            new.writestr(info.filename, data)
    assert changed
    path = replaced(place, "eval", stream.getvalue())
    with pytest.raises(ArtifactError) as caught:
        load(place)
    assert "pickled" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not trace.exists()


def test_classes_in_a_file_are_not_imported_on_its_word(place, monkeypatch):
    text = json.loads((place / files.MANIFEST).read_text())["signature"]["out_spec"]
    assert load_spec(text).is_leaf()

    def named(name: str) -> str:
        return json.dumps([1, {"type": name, "context": "null", "children_spec": []}])

    with pytest.raises(ArtifactError) as caught:
        load_spec(named("antigravity.Answer"))
    assert "import antigravity before loading" in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        load_spec(named("transformers.nowhere.Answer"))
