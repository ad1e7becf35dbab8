"""Each example as a user runs it: ``python -m examples.NAME --quick``, with no network and an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache that the programs share, and no registry within reach."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EECOMPILE")}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    return kept | nowhere | {"EECOMPILE_DATA": str(cache / "data"), "EECOMPILE_RUNS": str(cache / "runs")}


def run(name: str, environment: dict[str, str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"examples.{name}", "--quick", "--threads", "1", "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def check_row(row: dict[str, Any], sizes: set[str]) -> None:
    """Figures that hang together: the saving is there, at a price that was allowed, and time was taken."""
    assert sum(row["share"].values()) == pytest.approx(1)
    assert 0 < row["cost"] < 1
    assert row["accuracy"] > row["full_accuracy"] - 0.05
    assert row["full_accuracy"] > 0.85
    assert set(row["speedup"]) == set(row["seconds"]) == sizes
    assert row["calibration"]["qualified"]


def test_branchy_lenet(environment: dict[str, str], tmp_path: Path) -> None:
    trained = run("branchy_lenet", environment, tmp_path, "--until", "train")
    assert "done until 'train'" in trained.stderr
    assert not list(tmp_path.iterdir())
    done = run("branchy_lenet", environment, tmp_path, "--json")
    assert "epoch" not in done.stderr  # what was trained is kept
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "branchy_lenet-quick.json").read_text())
    assert [(row["what"], row["thresholds"]) for row in found["rows"]] == [
        (label, promise) for label in ("MNIST", "Fashion-MNIST") for promise in ("guaranteed", "empirical")
    ]
    for row in found["rows"]:
        check_row(row, {"1", "32", "256"})
        assert [e["after"] for e in row["exits"]] == ["relu", "relu_1"]
    assert found["mnist"]["rows"] == {"train": 1024, "val": 512, "test": 512}
