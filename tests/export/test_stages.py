"""Programs as one file for each stage, with the conditions in a driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eecompile import ExportError, strategies
from eecompile.export import verify
from tests.export.cases import same_as_reference, undecided
from tests.kinds import KINDS, Program, text
from tests.support import close, run_by

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from eecompile.export.driver import Program as Stages

OTHERS = ("exits by energy", "exits by a learned score", "anytime", "cascade", "router to exits")
STATEFUL = ("patience", "ensemble", "weighted ensemble")


def thresholds_of(fast: Any) -> dict[str, float]:
    return {e.name: e.threshold for e in fast.exits}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    program = KINDS["exits by margin"].build()
    (x,), _ = program.kind.call(64, 1)
    confidences = program.fast.observe(x).confidences
    program.fast.set_thresholds([float(c.quantile(0.6)) + 1e-4 for c in confidences[:-1]])
    return program, program.fast.export(tmp_path_factory.mktemp("stages") / "net", target="stages")


def runner(program: Program, path: Path) -> Any:
    stages = Stages(path, threads=1)
    names = [i["name"] for i in stages.data["inputs"]]

    def run(flat: Any, settings: Any) -> Any:
        stages.thresholds |= {k: v for k, v in thresholds_of(program.fast).items() if k in stages.thresholds}
        found = stages({n: t.numpy() for n, t in zip(names, flat, strict=True)})
        assert 0 not in stages.rows, "a stage was entered without rows"
        return list(found.values())

    return run


def test_the_driver_gives_what_the_reference_gives(written: tuple[Program, Path]) -> None:
    program, path = written
    before = program.fast.settings
    assert len(same_as_reference(program.fast, program.kind.call, runner(program, path))) > 1
    program.fast.settings = before


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_the_driver_serves_every_kind_of_exit(name: str, tmp_path: Path) -> None:
    program = KINDS[name].build()
    undecided(program.fast)
    path = program.fast.export(tmp_path / "net", target="stages")
    assert len(same_as_reference(program.fast, program.kind.call, runner(program, path))) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", STATEFUL)
def test_states_travel_with_the_rows(name: str, tmp_path: Path) -> None:
    program = KINDS[name].build()
    fast = program.fast
    fast.set_thresholds(0.9)
    (x,), _ = program.kind.call(64, 1)
    confidences = fast.observe(x).confidences
    fast.set_thresholds(0.9 if name == "patience" else [float(c.quantile(0.6)) + 1e-4 for c in confidences[:-1]])
    stages = Stages(fast.export(tmp_path / "net", target="stages"))
    for size in (1, 2, 5, 64):
        (x,), _ = program.kind.call(size, 1)
        want = run_by("reference", fast, x)
        found = stages({"x": x.numpy()})
        assert found["exit_index"].tolist() == want.exit_index.tolist()
        close(torch.as_tensor(found["output"]), want.output)
    stages.thresholds["exit_0"] = 2.0
    with pytest.raises(ValueError, match="exporting again"):
        stages({"x": x.numpy()})


def test_numpy_and_onnx_runtime_are_enough(written: tuple[Program, Path], tmp_path: Path) -> None:
    program, path = written
    (x,), _ = program.kind.call(9, 5)
    np.savez(tmp_path / "in.npz", x=x.numpy())
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['eecompile'] = None\n"
        f"sys.argv = ['run.py', {str(tmp_path / 'in.npz')!r}, {str(tmp_path / 'out.npz')!r}]\n"
        f"runpy.run_path({str(path / 'run.py')!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    want = run_by("reference", program.fast, x).exit_index
    assert np.load(tmp_path / "out.npz")["exit_index"].tolist() == want.tolist()


HEADER = os.environ.get("ONNXRUNTIME_INCLUDE", "")
"""The folder of onnxruntime_c_api.h: wheels have the library alone."""


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver of examples/cpp, built against the library of the wheel."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("build")
    library = folder / "libonnxruntime.so.1"  # the name that it is loaded by; the wheel has it with all of its version
    library.symlink_to(next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))
    source = Path(__file__).parents[2] / "examples/cpp"
    given = [f"-DONNXRUNTIME_INCLUDE={HEADER}", f"-DONNXRUNTIME_LIB={library}"]
    for command in (["cmake", "-S", source, "-B", folder, *given], ["cmake", "--build", folder]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "stages"


@pytest.mark.nightly
@pytest.mark.skipif(not HEADER or shutil.which("cmake") is None, reason="no cmake, or no ONNXRUNTIME_INCLUDE")
class TestCpp:
    @pytest.mark.parametrize("name", ["exits by margin", "ensemble", "weighted ensemble", "cascade", "text"])
    def test_rows_are_the_references(self, name: str, cpp: Path, tmp_path: Path) -> None:
        program = (KINDS | {"text": text(lambda: strategies.MeBert(exits=2, criterion="margin"))})[name].build()
        fast = program.fast
        fast.set_thresholds(1.0)  # all are in the file
        args, kwargs = program.kind.call(64, 1)
        confidences = fast.observe(*args, **kwargs).confidences
        fast.set_thresholds([float(c.quantile(0.4)) + 1e-4 for c in confidences[:-1]])
        path = fast.export(tmp_path / "net", target="stages")
        for size in (1, 5, 64):
            args, kwargs = program.kind.call(size, 1)
            want = run_by("reference", fast, *args, **kwargs)
            files = []
            for i, t in enumerate(fast.program.signature.flatten(args, kwargs)):
                files.append(tmp_path / f"{i}.bin")
                t.numpy().tofile(files[-1])
            done = subprocess.run([*map(str, (cpp, path, size, *files))], capture_output=True, text=True, check=False)
            assert not done.returncode, done.stderr
            found = [line.split() for line in done.stdout.splitlines()]
            assert size < 64 or len(set(want.exit_index.tolist())) > 1
            assert [int(exit) for _, exit, _ in found] == want.exit_index.tolist()
            assert [int(label) for label, _, _ in found] == fast.prediction_of(want.output).argmax(-1).tolist()
            close(torch.tensor([float(sure) for *_, sure in found]), want.confidence)

    def test_what_is_refused(self, written: tuple[Program, Path], cpp: Path, tmp_path: Path) -> None:
        _, path = written
        (tmp_path / "x.bin").write_bytes(bytes(7))
        cases = {
            "cannot read": [tmp_path, 1, tmp_path / "x.bin"],
            "x.bin has another size": [path, 2, tmp_path / "x.bin"],
            "wanted 1": [path, 2, tmp_path / "x.bin", tmp_path / "x.bin"],
            "wanted 1 or more": [path, 0, tmp_path / "x.bin"],
        }
        for message, arguments in cases.items():
            done = subprocess.run([*map(str, (cpp, *arguments))], capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert message in done.stderr


def test_the_folder_says_what_is_in_it(written: tuple[Program, Path]) -> None:
    program, path = written
    data = json.loads((path / "program.json").read_text())
    assert [s["file"] for s in data["stages"]] == ["stage_0.onnx", "stage_1.onnx", "stage_2.onnx"]
    assert [s["exit"] for s in data["stages"]] == [0, 1, None]
    assert [s["threshold"] for s in data["stages"][:2]] == [e.threshold for e in program.fast.exits]
    assert data["stages"][0]["cost"] < data["stages"][1]["cost"]
    assert {p.name for p in path.iterdir()} == {"program.json", "run.py", *data["files"]}


def test_rows_that_reach_each_stage(written: tuple[Program, Path]) -> None:
    program, _ = written
    (x,), _ = program.kind.call(64, 1)
    index = run_by("reference", program.fast, x).exit_index
    found = program.fast.stage_inputs([(x, None), (x[index == 0], None)])
    counts = {name: [next(iter(f.values())).shape[0] for f in feeds] for name, feeds in found.items()}
    left = [int((index >= k).sum()) for k in range(3)]
    assert counts == {"stage_0.onnx": [64, 64 - left[1]], "stage_1.onnx": [left[1]], "stage_2.onnx": [left[2]]}


def test_verified_like_every_other_target(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    program, path = written
    loader = [(program.kind.call(16, seed)[0][0], None) for seed in (1, 2)]
    monkeypatch.setattr(verify, "QUICK", 1e9)  # times say nothing on a busy machine
    report = program.fast.verify_export(path, loader, rounds=3)
    assert report.ok, str(report)
    assert report.target == "stages"


def test_what_is_refused(written: tuple[Program, Path], tmp_path: Path) -> None:
    program, path = written
    with pytest.raises(ValueError, match=r"input x: got float32 \[2, 9, 1\]"):
        Stages(path)({"x": np.zeros((2, 9, 1), np.float32)})
    stages = Stages(path)
    for thresholds in ({"exit_0": 0.5}, {**stages.thresholds, "exit_9": 0.5}, [0.5, 0.5]):
        stages.thresholds = thresholds  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"one number for each of \['exit_0', 'exit_1'\]"):
            stages({"x": np.zeros((2, 9), np.float32)})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="something else in it"):
        program.fast.export(tmp_path / "taken", target="stages")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "mine.txt"]
    gates = KINDS["gates"].build().fast
    undecided(gates)
    with pytest.raises(ExportError, match="rows part ways within one"):
        gates.export(tmp_path / "net", target="stages")
    assert not (tmp_path / "net").exists()
