"""`eecompile export`: a file, what it reports, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.cli.shell import call, found


def test_a_file_and_its_report(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    made = found(
        "export", str(saved), "-o", str(out), "--threshold", "0.11", "--verify", "digits:test", "--batch-size", "16"
    )
    assert made["exported"] == str(out)
    assert made["bytes"] == out.stat().st_size
    assert made["outputs"] == ["output", "exit_index", "confidence"]
    assert made["exits"] == ["exit_0", "exit_1"]
    assert made["verified"]["ok"] is True
    assert torch.export.load(out).module()(torch.randn(3, 1, 8, 8))[1].shape == (3,)


def test_what_is_refused(saved: Path, tmp_path: Path) -> None:
    assert "did you mean onnx" in call("export", str(saved), "-o", "net.onnx", "--target", "onxx", code=2).stderr
    assert "does not fit" in call("export", str(saved), "-o", "net.onnx", code=2).stderr
    assert "could not be written" in call("export", str(saved), "-o", str(tmp_path / "no" / "net.pt2"), code=2).stderr
    assert not list(tmp_path.iterdir())
