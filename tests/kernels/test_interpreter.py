"""Runs `interpreted*.py` once, in a process with TRITON_INTERPRET=1, and reports on each kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eecompile.kernels._triton import HAVE_TRITON

ROOT = Path(__file__).parents[2]
FILES = ["tests/kernels/interpreted.py", "tests/kernels/interpreted_decisions.py", "tests/kernels/interpreted_programs.py"]
KERNELS = [
    "programs",
    "clock",
    "confidence",
    "decide",
    "gather",
    "scatter",
    "choose",
    "open_rows",
    "halt",
    "head_confidence",
]

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="no Triton on this platform")


def report_of(*options: str, **variables: str) -> str:
    """What pytest says of `FILES`, run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "python_files=interpreted*.py", *options, *FILES]
    environment = {**os.environ, "PYTEST_ADDOPTS": "", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def report() -> str:
    return report_of(TRITON_INTERPRET="1")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_against_its_float64_definition(kernel: str, report: str) -> None:
    all_passed(kernel, report)


def all_passed(kernel: str, report: str) -> None:
    """Every case of a kernel ran, and none failed."""
    of_kernel = rf"(PASSED|FAILED|ERROR) \S+::test_{kernel}(?:_\w+)?(?:\[|\s|$)"
    outcomes = re.findall(of_kernel, report)
    assert outcomes, report[-4000:]
    assert set(outcomes) == {"PASSED"}, report[-8000:]


def test_nothing_else_failed(report: str) -> None:
    assert not re.search(r"^(FAILED|ERROR) ", report, re.MULTILINE), report[-8000:]
