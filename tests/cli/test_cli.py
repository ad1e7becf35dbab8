"""Every command does its work, says it in JSON alone where asked, and leaves what it was given as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eecompile import load
from eecompile.cli import demo, names
from tests.cli.shell import MODEL, call, environment, found, process

assert MODEL  # other tests of commands take it from here


def test_from_a_model_to_a_measured_program(saved: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    out = str(tmp_path / "fast")
    report = found("fit", str(saved), "--data", "digits", "--epochs", "2", "--val", "digits:val", "-o", out)
    assert report["saved"] == out
    assert [(row["stage"], row["val_loss"] is not None) for row in report["rows"]] == [("heads", True)]
    assert [row["exit"] for row in report["heads"]] == [e.name for e in load(out).exits]
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before, "with -o the first program stays"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast"], "checkpoints are gone once training is done"
    calibrated = found("calibrate", out, "--data", "digits:val", "--max-drop", "0.05", "--no-guarantee")
    assert calibrated["saved"] == out
    kept = [e.threshold for e in load(out).exits]
    assert kept == pytest.approx([e["threshold"] for e in calibrated["exits"][: len(kept)]])
    parts = ("--conditional", "--groups", "classes", "--control-groups")
    careful = found("calibrate", out, "--data", "digits:val", "--max-drop", "0.2", *parts, "-o", str(tmp_path / "careful"))
    assert careful["conditional"]
    assert careful["groups_controlled"]
    assert len(careful["by_group"]) == 10
    evaluated = found("evaluate", out, "--data", "digits:test", "--curve", "3")
    assert evaluated["samples"] == 360
    assert len(evaluated["curve"]) == 3
    ran = found("run", out, "--data", "digits:test", "--rows", "3")
    assert len(ran["exit_index"]) == len(ran["confidence"]) == len(ran["cost"]) == 3
    timed = found("bench", out, "--data", "digits:test", "--batch", "8", "--rounds", "3")
    assert timed["batch"] == 8
    assert timed["rows"][0]["name"] == "original"
    assert timed["original"] == "its captured graph"


def test_the_same_for_people(model: str, saved: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "fast")
    done = call("rewrite", model, "--input", "float32[4,1,8,8]", "--exits", "blocks.1", "--exits", "0.6", "-o", out)
    assert "exit_0" in done.stdout
    assert "blocks.1" in done.stdout
    assert f"saved in {out}\n" in done.stdout
    assert f"next: eecompile fit {out} --data ...\n" in done.stdout, "a command stands in one line, to be copied"
    assert "capture" in done.stderr, "progress goes to standard error"
    done = call("fit", out, "--data", "digits")
    assert f"saved in {out}\n" in done.stdout
    assert f"next: eecompile calibrate {out} --data ...\n" in done.stdout
    assert "loss" in done.stdout
    assert "exit_1" in call("calibrate", out, "--data", "digits:val").stdout
    done = call("evaluate", out, "--data", "digits:test", "--threshold", "0.5", "--threshold", "2")
    assert "accuracy" in done.stdout
    done = call("run", out, "--input", "x=float32[2,1,8,8]", "--threshold", "0")
    assert "row 0: " in done.stdout
    assert "exit_0" in done.stdout
    done = call("bench", out, "--input", "float32[2,1,8,8]", "--rounds", "3", "--model", model, "--threads", "1")
    assert "original: its Python model" in done.stdout
    assert [e.threshold for e in load(saved).exits] == [2.0, 2.0], "--threshold is for one run"


@pytest.mark.parametrize("format", ["tree", "table", "code", "dot", "mermaid", "json", "diff"])
def test_inspect_in_every_format(saved: Path, format: str) -> None:
    text = call("inspect", str(saved), "--format", format).stdout
    assert ("stage" in text) or format == "diff"
    assert "exit_0" in text
    if format == "json":
        assert json.loads(text)["exits"]
        again = found("inspect", str(saved))
        assert {k: v for k, v in json.loads(text).items() if k != "passes"} == {k: again[k] for k in again if k != "passes"}


def test_inspect_at_every_level_and_before_anything_is_saved(model: str) -> None:
    shape = ("--input", "x=float32[4,1,8,8]")
    passes = found("inspect", model, *shape)["passes"]
    assert {p["name"] for p in passes} <= set(names.LEVELS), "completion knows every pass"
    for level in ("source", "find_cuts", "insert_exits", "staged"):
        text = call("inspect", model, *shape, "--after", level, "--format", "code").stdout
        assert "def forward" in text
        assert ("exit_0_head" in text) == (level in ("insert_exits", "staged")), level
    done = call("inspect", model, *shape, "--after", "find_cut", code=2)
    assert "did you mean find_cuts" in done.stderr.replace("\n", " ")
    assert "without a trace" in call("inspect", model, *shape, "--capture", "blocks").stdout


def test_strategies_and_doctor() -> None:
    listed = {s["name"]: s for s in found("strategies")["strategies"]}
    assert {"branchy", "mebert"} <= set(listed)
    assert listed["branchy"]["defaults"]["exits"] == 3
    assert "2016" in call("strategies").stdout
    checks = found("doctor")
    assert checks["ok"]
    names = {c["name"] for c in checks["checks"]}
    assert {"torch", "operators", "executor compact", "self-test: save and load"} <= names
    assert "self-test" not in call("doctor", "--no-self-test").stdout


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "FIT_EPOCHS", 1)
    monkeypatch.setattr(demo, "ROUNDS", 3)
    out = str(tmp_path / "digits")
    report = found("demo", "-o", out)
    assert report["saved"] == out
    assert {"fit", "calibration", "evaluation", "benchmark", "program"} <= set(report)
    assert sum(report["rows"].values()) == 1797
    assert len(load(out).exits) == len(report["program"]["exits"])


def test_what_a_model_prints_does_not_get_into_the_json(tmp_path: Path) -> None:
    path = tmp_path / "talks.py"
    path.write_text(MODEL + "\nprint('imported')\n")
    done = call("inspect", f"{path}:build", "--input", "x=float32[4,1,8,8]", "--json")
    assert json.loads(done.stdout)["exits"]
    assert "imported" in done.stderr


LOADER = """
import torch, time
class Slow:
    def __iter__(self):
        for k in range(100):
            print("batch", k, flush=True)
            time.sleep(0.05)
            yield torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(k)), torch.arange(4)
    def __len__(self):
        return 100
train = Slow()
"""


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(saved: Path, tmp_path: Path) -> None:
    program = Path(shutil.copytree(saved, tmp_path / "program"))
    before = {p.name: p.read_bytes() for p in program.iterdir()}
    (tmp_path / "data.py").write_text(LOADER)
    command = [sys.executable, "-m", "eecompile", "fit", str(program), "--data", f"{tmp_path}/data.py:train"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as running:
        assert running.stdout is not None
        assert any("batch 5" in line for line in running.stdout), "it trains"
        os.kill(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    text = err.replace("\n", " ")
    assert "stopped by Ctrl-C after step" in text
    assert "the same command goes on from there" in text
    assert {p.name: p.read_bytes() for p in program.iterdir()} == before, "the program is as it was"
    kept = [p for p in tmp_path.iterdir() if p.name.startswith("program.fit-")]
    assert len(kept) == 1
    (tmp_path / "data.py").write_text(LOADER.replace("0.05", "0"))
    report = found("fit", str(program), "--data", f"{tmp_path}/data.py:train")
    assert report["resumed_from"] == 0  # the pass over the data starts anew, heads that are fitted are kept
    assert not kept[0].exists()


@pytest.mark.nightly
def test_a_reader_that_goes_away_is_no_error(saved: Path) -> None:
    line = f"{sys.executable} -m eecompile inspect {saved} --format code | head -n 2"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, env=environment())
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.nightly
def test_a_process_of_its_own(saved: Path) -> None:
    start = time.perf_counter()
    done = process("run", str(saved), "--input", "x=float32[3,1,8,8]", "--json")
    assert json.loads(done.stdout)["exit_index"]
    assert time.perf_counter() - start < 120


def test_several_models_are_rewritten_as_a_cascade(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "torch.manual_seed(0)\n"
        "halve = nn.AvgPool2d(2)\n"
        "small = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).eval()\n"
        "large = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()\n"
    )
    nets, out = tmp_path / "nets.py", str(tmp_path / "program")
    models, given = (f"{nets}:small", f"{nets}:large"), ("--input", "float32[4,1,8,8]", "--strategy", "cascade")
    prepared = ("--prepare", f"{nets}:halve", "--prepare", "-")
    made = found("rewrite", *models, *given, *prepared, "-o", out)
    assert [(e["head"], e["cost"] < 0.1) for e in made["exits"]] == [("identity", True)]
    assert found("run", out, "--data", "digits:test", "--rows", "3")
    done = call("rewrite", *models, *given, "-o", str(tmp_path / "other"), code=2)
    assert "does not run on the example" in done.stderr  # the small one reads 4 x 4


@pytest.mark.nightly
def test_three_models_and_a_sum_of_strategies(tmp_path: Path) -> None:
    """`rewrite A B C --strategy cascade`, and heads inside of the models in addition."""
    (tmp_path / "nets.py").write_text(
        MODEL + "\ndef sized(width, seed):\n"
        "    torch.manual_seed(seed)\n"
        "    model = Net()\n"
        "    model.stem = nn.Conv2d(1, width, 3, padding=1)\n"
        "    blocks = (nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(5))\n"
        "    model.blocks = nn.Sequential(*blocks)\n"
        "    model.out = nn.Linear(width, 10)\n"
        "    return model.eval()\n"
        "a, b, c = sized(4, 1), sized(8, 2), sized(16, 3)\n"
    )
    models = tuple(f"{tmp_path}/nets.py:{n}" for n in "abc")
    given = ("--input", "x=float32[4,1,8,8]", "-o", str(tmp_path / "program"))
    made = found("rewrite", *models, *given, "--strategy", "cascade")
    assert [e["after"] for e in made["exits"]] == ["net_0", "net_1"]
    made = found("rewrite", *models, *given, "--strategy", "cascade+branchy")
    cuts = [e["after"] for e in made["exits"]]
    assert [c for c in cuts if "." not in c] == ["net_0", "net_1"]
    assert {c.split(".")[0] for c in cuts} == {"net_0", "net_1", "net_2"}
    done = call("rewrite", *models, *given, "--strategy", "branchy+anytime", code=2)
    assert "branchy(exits=3) + anytime(exits='everywhere')" in " ".join(done.stderr.split())
