"""A model in a file of its own, and a program saved from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.shell import MODEL, found


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`file.py:attr` of a small convolutional network, float32 [B, 1, 8, 8] to [B, 10]."""
    path = tmp_path_factory.mktemp("cli") / "net.py"
    path.write_text(MODEL)
    return f"{path}:build"


@pytest.fixture(scope="package")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It with two exits, saved. Not to be changed: write elsewhere with -o."""
    out = tmp_path_factory.mktemp("saved") / "program"
    made = found("rewrite", model, "--input", "x=float32[4,1,8,8]", "--exits", "2", "-o", str(out))
    assert len(made["exits"]) == 2
    assert made["saved"] == str(out)
    return out
