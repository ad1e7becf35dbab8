"""`fit`, `calibrate`, `evaluate` and `report` in two processes: the figures of one process, in both of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from eecompile import EecompileError
from eecompile.training import workers
from tests.training.several_processes import measured

SCRIPT = Path(__file__).with_name("several_processes.py")
ROOT = SCRIPT.parents[2]
TIMEOUT = 240


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "PYTEST"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def read(folder: Path) -> dict[str, Any]:
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By process: this one alone, and two that a launcher such as torchrun started."""
    folder, at = tmp_path_factory.mktemp("processes"), port()
    command = [sys.executable, str(SCRIPT), str(folder)]
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at}
    each = [{**launched, "RANK": r, "LOCAL_RANK": r} for r in "01"]
    with ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(command, env=environment(**e))) for e in each]
        for process in running:
            stack.callback(process.kill)
        alone = json.loads(json.dumps(measured(folder)))
        assert [process.wait(TIMEOUT) for process in running] == [0, 0]
    return read(folder) | {"0 of 1": alone}


@pytest.mark.parametrize("what", ["evaluate", "calibrate", "thresholds"])
@pytest.mark.parametrize("given", ["loader", "list", "prepared", "sampler"])
def test_every_process_has_the_figures_of_one(said: dict[str, Any], what: str, given: str) -> None:
    want = said["0 of 1"][f"{what} loader"]
    for rank in (0, 1):
        assert said[f"{rank} of 2"][f"{what} {given}"] == want
    assert "seconds" not in want
    assert what != "thresholds" or min(want) < 1, "nothing is calibrated"


@pytest.mark.parametrize("what", ["calibrate gates", "groups", "report"])
def test_other_passes(said: dict[str, Any], what: str) -> None:
    assert said["0 of 2"][what] == said["1 of 2"][what] == said["0 of 1"][what]
    assert said["0 of 1"][what]


def test_training_ends_alike(said: dict[str, Any]) -> None:
    first, second = (said[f"{rank} of 2"]["trained"] for rank in (0, 1))
    assert first == second
    rows = first["fit"]["rows"]
    assert len(rows) == 2
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[1]["val_loss"] > 0
    assert "2 processes share the training" in first["fit"]["batch_by_batch"]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("another order", "read different rows", "read different rows"),
        ("fewer batches", "read different rows", "read different rows"),
        ("labels", "others do not", "others do not"),
        ("one fails", "another process failed", "no figures today"),
        ("unwritable", "cannot be written", "cannot be written"),
    ],
)
def test_an_error_in_one_is_one_in_all(said: dict[str, Any], case: str, first: str, second: str) -> None:
    assert first in said["0 of 2"]["failed"][case]
    assert second in said["1 of 2"]["failed"][case]


def test_processes_that_accelerate_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train on its own."""
    monkeypatch.setattr(workers, "processes", lambda: (2, 0))
    with pytest.raises(EecompileError, match="accelerate does not know the processes"):
        workers.make_accelerator()


@pytest.mark.nightly
def test_launched_by_torchrun(said: dict[str, Any], tmp_path: Path) -> None:
    """`accelerate launch --cpu` starts a single process where there is no MPI."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]
    command += [str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path)
    for rank in ("0 of 2", "1 of 2"):
        assert found[rank].pop("failed").keys() == said[rank]["failed"].keys(), "their texts name processes"
        assert found[rank] == {name: value for name, value in said[rank].items() if name != "failed"}
