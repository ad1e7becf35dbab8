"""Programs as ONNX files, run by ONNX Runtime, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eecompile import ExportError, MissingDependencyError
from eecompile.export import description, runtimes, targets
from eecompile.ir.settings import THRESHOLDS_BUFFER
from eecompile.onnx import IR, session
from tests.export.cases import same_as_reference, undecided
from tests.export.test_pt2 import REFUSED
from tests.kinds import KINDS, Program
from tests.support import run_by

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
KIND = [pytest.param(k, marks=pytest.mark.nightly) for k in KINDS if k not in REFUSED]


def runner(path: Path) -> Any:
    """Runs a file with the settings that are inputs of it."""
    of = session(path)
    names = [i.name for i in of.get_inputs()]
    held = [i.name for i in of.get_overridable_initializers()]

    def run(flat: Any, settings: dict[str, Tensor]) -> Any:
        given = {n: t.numpy() for n, t in zip(names, flat, strict=True)}
        return of.run(None, given | {n: settings[n].numpy() for n in held})

    return run


@pytest.mark.parametrize("name", KIND)
def test_a_file_is_the_reference_at_every_batch_size(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    fast = kind.build().fast
    undecided(fast)
    path = fast.export(tmp_path / "net.onnx", target="onnx")
    taken = same_as_reference(fast, kind.call, runner(path))
    if fast.exits:
        assert len(taken) > 1
    size = sum(p.numel() * p.element_size() for p in fast.parameters())
    assert path.stat().st_size <= 1.02 * size + 100_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    program = KINDS["exits by entropy, mlp heads"].build()
    program.fast.set_thresholds(0.5)
    return program, program.fast.export(tmp_path_factory.mktemp("onnx") / "net.onnx", target="onnx")


def test_onnx_runtime_gives_what_the_reference_gives(written: tuple[Program, Path]) -> None:
    program, path = written
    assert len(same_as_reference(program.fast, program.kind.call, runner(path))) > 1
    program.fast.set_thresholds(0.5)


def test_thresholds_that_are_not_given_are_those_of_the_export(written: tuple[Program, Path]) -> None:
    program, path = written
    (x,), _ = program.kind.call(64, 8)
    index = session(path).run(["exit_index"], {"x": x.numpy()})[0]
    assert index.tolist() == run_by("reference", program.fast, x).exit_index.tolist()


def test_weights_lie_in_the_branch_that_reads_them(written: tuple[Program, Path]) -> None:
    program, path = written
    outer, *branches = graphs(onnx.load(path).graph)
    weights = [t.name for g in (outer, *branches) for t in g.initializer]
    assert len(weights) == len(set(weights))
    assert sum(len(t.dims) > 1 for g in branches for t in g.initializer) >= len(program.fast.exits)
    for t in outer.initializer:  # read there, or in more branches than one
        readers = [g for g in (outer, *branches) if any(t.name in n.input for n in g.node)]
        assert readers != [g for g in readers[:1] if g is not outer], t.name


def graphs(graph: Any) -> list[Any]:
    """A graph and the branches in it."""
    below = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(g for b in below for g in graphs(b))]


def test_names_sizes_and_opset(written: tuple[Program, Path]) -> None:
    program, path = written
    model = onnx.load(path)
    assert model.opset_import[0].version >= 20
    assert [o.name for o in model.graph.output] == ["output", "exit_index", "confidence"]
    assert model.graph.input[0].name == "x"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    size = sum(p.numel() * p.element_size() for p in program.fast.parameters())
    assert path.stat().st_size <= 1.02 * size + 100_000, "a weight is there twice"
    kept = {p.key: p.value for p in model.metadata_props}
    said = description.Description.from_json(kept[description.KEY], str(path))
    assert said.exits == ("exit_0", "exit_1")
    assert said.settings == program.fast.settings.to_dict()


@pytest.mark.parametrize(
    "given",
    [
        {"x": (2, 9, 1)},
        {"x": (2, 8)},
        {"x": (2, 9), THRESHOLDS_BUFFER: (3,)},
        {"x": (2, 9), "eecompile_temperatures": (2, 1)},
    ],
)
def test_the_runtime_refuses_other_shapes(written: tuple[Program, Path], given: dict[str, tuple[int, ...]]) -> None:
    import numpy as np

    with pytest.raises(Exception, match=r"(?i)invalid|dimension|rank"):
        session(written[1]).run(None, {n: np.full(s, 0.5, np.float32) for n, s in given.items()})


@pytest.mark.parametrize(("field", "says"), [("ir_version", "IR version: 99"), ("opset", "opset")])
def test_a_runtime_that_is_too_old_is_named(written: tuple[Program, Path], tmp_path: Path, field: str, says: str) -> None:
    model = onnx.load(written[1])
    assert model.ir_version == IR, "the lowest that the opset has, so that older runtimes read it"
    if field == "opset":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="the runtime is too old") as refused:
        runtimes.opened(tmp_path / "net.onnx")
    assert says in str(refused.value)
    assert f"onnxruntime {ort.__version__}" in str(refused.value)


@pytest.mark.nightly
def test_weights_that_do_not_fit_into_one_file_lie_beside_it(
    written: tuple[Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eecompile.onnx.EXTERNAL", 0)
    program, _ = written
    path = program.fast.export(tmp_path / "net.onnx", target="onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert path.stat().st_size < 100_000
    (x,), _ = program.kind.call(64, 8)
    index = session(path).run(["exit_index"], {"x": x.numpy()})[0]
    assert index.tolist() == run_by("reference", program.fast, x).exit_index.tolist()


def test_a_package_that_is_missing_is_named(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.TARGETS, "onnx", targets.Target(".onnx", "onnx", ("no_such_package",), None))  # type: ignore[arg-type]
    with pytest.raises(MissingDependencyError, match=r"pip install 'eecompile\[onnx\]'"):
        written[0].fast.export("net.onnx", target="onnx")


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("net.onnx", "onxx", "unknown target"),
        ("net.onnx", ["onnx"], "unknown target"),
        (3, "onnx", "path= is a path"),
        ("net.pt2", "onnx", "does not fit the target"),
        ("net.onnx", "pt2", "does not fit the target"),
        ("nowhere/net.pt2", "pt2", "could not be written"),
        ("taken.pt2", "pt2", "could not be written"),
        ("file/net.onnx", "onnx", "could not be written"),
        ("file", "stages", "could not be written"),
    ],
)
def test_what_cannot_be_written(written: tuple[Program, Path], tmp_path: Path, name: Any, target: Any, says: str) -> None:
    (tmp_path / "taken.pt2").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=says):
        written[0].fast.export(tmp_path / name if isinstance(name, str) else name, target=target)
    assert sorted(tmp_path.rglob("*")) == before, "something half-written stays"


def test_a_full_disk_leaves_the_file_that_was_there(
    written: tuple[Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("before")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left"):
        written[0].fast.export(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
