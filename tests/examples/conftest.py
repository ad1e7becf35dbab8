"""What tests of the examples share: a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import _registry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no client that could fill it."""
    monkeypatch.setenv("EECOMPILE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EECOMPILE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(_registry.shutil, "which", lambda command: None)
    return tmp_path / "data"
