"""`verify_export`: what is wrong with an artifact is found and named."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import ExportError
from eecompile.export import runtimes, verify
from eecompile.measuring import Rounds
from tests.kinds import KINDS, Program


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    program = KINDS["exits by margin"].build()
    (x,), _ = program.kind.call(64, 1)
    confidences = program.fast.observe(x).confidences
    program.fast.set_thresholds([float(c.quantile(0.6)) + 1e-4 for c in confidences[:-1]])
    return program, program.fast.export(tmp_path_factory.mktemp("pt2") / "net.pt2")


@pytest.fixture(autouse=True)
def times_say_nothing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Calls of small models on a busy machine."""
    if "every_branch" not in request.node.name:
        monkeypatch.setattr(verify, "QUICK", 1e9)


def loader(program: Program) -> list[Any]:
    return [(program.kind.call(16, seed)[0][0], torch.zeros(16)) for seed in (1, 2)]


def pretending(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Tensor]], None]) -> None:
    """A runtime that changes what comes out."""
    usual = runtimes.OPENERS["pt2"]

    def opener(path: Path) -> runtimes.Opened:
        found = usual(path)

        def call(flat: Any) -> list[Tensor]:
            outputs = list(found.call(flat))
            change(outputs)
            return outputs

        return replace(found, call=call)

    monkeypatch.setitem(runtimes.OPENERS, "pt2", opener)


def test_a_right_program_is_ok(written: tuple[Program, Path]) -> None:
    program, path = written
    report = program.fast.verify_export(path, loader(program), rounds=3)
    assert report.ok, str(report)
    assert report.sizes == [1, 2, 5, 16, 64]
    assert {t["name"] for t in report.times} == {"exit_0", "exit_1", "the end"}
    assert report.rows == 1 + 2 + 5 + 64 + 16 + 16
    assert report.largest_difference < 1e-5
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "leaves at" in str(report)


def test_settings_are_those_of_the_file(written: tuple[Program, Path]) -> None:
    program, path = written
    before = program.fast.settings
    program.fast.set_thresholds(2.0)
    assert program.fast.verify_export(path, loader(program), rounds=3).ok
    program.fast.settings = before


def test_a_row_that_leaves_elsewhere_is_a_problem(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pretending(monkeypatch, lambda out: out[-2].clamp_(max=1))
    report = written[0].fast.verify_export(written[1], loader(written[0]), rounds=3)
    assert not report.ok
    assert "leave elsewhere" in report.problems[0]


def test_another_output_is_a_problem(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pretending(monkeypatch, lambda out: out[0].mul_(1.01))
    report = written[0].fast.verify_export(written[1], loader(written[0]), rounds=3)
    assert any("output differs" in p for p in report.problems)


def test_a_runtime_that_computes_every_branch_is_named(
    written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretending(monkeypatch, lambda out: time.sleep(0.03))
    report = written[0].fast.verify_export(written[1], loader(written[0]), rounds=3)
    assert [p for p in report.problems if p.startswith("the runtime computes every branch")]


def test_a_busy_machine_is_no_fault_of_the_program(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As slow as if every branch were computed, but in the last measurement."""
    monkeypatch.setattr(verify, "QUICK", 1e-3)
    measurements = 0

    def rounds_of(calls: dict[str, Any], rounds: int, **_: Any) -> Rounds:
        nonlocal measurements
        measurements += 1
        quick = 0.002 if measurements == verify.TRIES else 0.02
        return Rounds({name: [0.03, quick if name == "0" else 0.02] for name in calls})

    monkeypatch.setattr(verify, "rounds_of", rounds_of)
    assert written[0].fast.verify_export(written[1], loader(written[0])).ok
    assert measurements == verify.TRIES
    assert not written[0].fast.verify_export(written[1], loader(written[0])).ok, "in every measurement"


def test_a_row_next_to_a_threshold_is_listed_apart(written: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    program, path = written
    monkeypatch.setattr(verify, "NEAR", 10.0)
    pretending(monkeypatch, lambda out: out[-2].fill_(9))
    report = program.fast.verify_export(path, loader(program), rounds=3)
    assert report.ok
    assert len(report.near) == 32


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no exported program"), (b"nothing", "could not load"), (b"PK\5\6" + bytes(18), "could")],
)
def test_files_of_others_are_refused(
    written: tuple[Program, Path], tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "net.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=says):
        written[0].fast.verify_export(path, loader(written[0]))


def test_a_program_of_torch_alone_is_refused(written: tuple[Program, Path], tmp_path: Path) -> None:
    exported = torch.export.export(torch.nn.Linear(9, 2), (torch.randn(2, 9),))
    torch.export.save(exported, tmp_path / "net.pt2")
    with pytest.raises(ExportError, match="no exported program of eecompile"):
        written[0].fast.verify_export(tmp_path / "net.pt2", loader(written[0]))


def test_another_rank_is_refused(written: tuple[Program, Path]) -> None:
    with pytest.raises(ExportError, match="could not run"):
        runtimes.opened(written[1]).run([torch.randn(2, 9, 1)])


def test_a_newer_file_than_torch_reads_is_refused(written: tuple[Program, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(written[1]) as old, zipfile.ZipFile(tmp_path / "net.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, re.sub(rb'("schema_version": ?\{"major": ?)\d+', rb"\g<1>99", data))
    with pytest.raises(ExportError, match="could not load the program") as refused:
        runtimes.opened(tmp_path / "net.pt2")
    assert f"torch {torch.__version__}" in str(refused.value)


@pytest.mark.nightly
@pytest.mark.parametrize(("target", "name"), [("onnx", "net.onnx"), ("openvino", "net.xml")])
def test_every_runtime_is_right(written: tuple[Program, Path], tmp_path: Path, target: str, name: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    program = written[0]
    path = program.fast.export(tmp_path / name, target=target)
    assert sorted(tmp_path.iterdir()) == sorted({path, *tmp_path.glob("net.bin")})
    report = program.fast.verify_export(path, loader(program), rounds=3)
    assert report.ok, str(report)
    with pytest.raises(ExportError, match="could not run"):
        runtimes.opened(path).run([torch.randn(2, 9, 1)])
