"""The command line through its real entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(5)))
        self.out = nn.Linear(8, 10)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net().eval()
"""


def call(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "eecompile", *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "net.py"
    path.write_text(MODEL)
    return f"{path}:build"


@pytest.fixture(scope="module")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "program"
    done = call("rewrite", model, "--input", "x=float32[4,1,8,8]", "--exits", "2", "-o", str(out), "--json")
    assert len(json.loads(done.stdout)["exits"]) == 2
    return out


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv=['eecompile','--help']\nfrom eecompile.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rewrite" in done.stdout


def test_a_saved_program_is_fitted_calibrated_evaluated_run_and_timed(saved: Path) -> None:
    report = json.loads(call("fit", str(saved), "--data", "digits", "--epochs", "1", "--json").stdout)
    assert report
    calibrated = json.loads(call("calibrate", str(saved), "--data", "digits:val", "--max-drop", "0.02", "--json").stdout)
    assert calibrated
    found = json.loads(call("evaluate", str(saved), "--data", "digits:test", "--json").stdout)
    assert found
    assert json.loads(call("run", str(saved), "--data", "digits:test", "--rows", "3", "--json").stdout)
    timed = json.loads(call("bench", str(saved), "--data", "digits:test", "--batch", "8", "--rounds", "3", "--json").stdout)
    assert timed["batch"] == 8
    assert timed["rows"][0]["name"] == "original"


@pytest.mark.parametrize("format", ["tree", "table", "code", "dot", "mermaid", "json"])
def test_inspect_in_every_format(saved: Path, format: str) -> None:
    text = call("inspect", str(saved), "--format", format).stdout
    assert "stage" in text
    if format == "json":
        assert json.loads(text)["exits"]


def test_diff_shows_what_was_inserted(saved: Path) -> None:
    assert "exit_0" in call("inspect", str(saved), "--format", "diff").stdout


def test_doctor_and_strategies() -> None:
    assert json.loads(call("doctor", "--json").stdout)["ok"]
    text = call("strategies", "--json").stdout
    assert json.loads(text)
    assert '"branchy"' in text
    assert '"mebert"' in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("inspect", "nowhere"), "nowhere"),
        (("inspect", "nowhere.py:build"), "nowhere.py"),
        (("evaluate", "nowhere", "--data", "digits"), "nowhere"),
        (("inspect", "MODEL", "--input", "x=float32[1,1,8,8]"), "batch of 1"),
        (("inspect", "MODEL", "--input", "x=float[4]"), "float"),
        (("inspect", "MODEL", "--input", "x=float32[4,1,8,8]", "--strategy", "branchi"), "branchy"),
        (("inspect", "MODEL", "--input", "x=float32[4,1,8,8]", "--exits", "blocks.9"), "no cut has this name"),
        (("evaluate", "SAVED", "--data", "digits:tset"), "digits"),
    ],
)
def test_bad_input_is_said_in_words_and_exits_with_2(model: str, saved: Path, args: tuple[str, ...], said: str) -> None:
    filled = [model if a == "MODEL" else str(saved) if a == "SAVED" else a for a in args]
    done = call(*filled, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


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
    found = json.loads(call("rewrite", *models, *given, *prepared, "-o", out, "--json").stdout)
    assert [(e["head"], e["cost"] < 0.1) for e in found["exits"]] == [("identity", True)]
    assert json.loads(call("run", out, "--data", "digits:test", "--rows", "3", "--json").stdout)
    done = call("rewrite", *models, *given, "-o", str(tmp_path / "other"), code=2)
    assert "does not run on the example" in done.stderr  # the small one reads 4 x 4
