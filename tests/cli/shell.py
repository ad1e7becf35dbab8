"""The command line in this process, where torch is imported already, and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import eecompile
from eecompile.cli.app import app

ROOT = Path(eecompile.__file__).resolve().parents[1]

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


def call(*args: str, code: int = 0, env: dict[str, str] | None = None) -> Result:
    """One command in this process."""
    done = CliRunner().invoke(app, list(args), env=env, prog_name="eecompile")
    assert done.exit_code == code, (done.exit_code, done.stdout[-2000:], done.stderr[-2000:], done.exception)
    return done


def found(*args: str) -> Any:
    """What a command reports: JSON, and nothing else, on standard output."""
    return json.loads(call(*args, "--json").stdout)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def process(*args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "eecompile", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**env))
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done
