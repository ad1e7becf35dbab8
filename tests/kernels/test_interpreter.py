"""Runs `interpreted*.py` once, in a process with TRITON_INTERPRET=1, and reports on each kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eecompile.kernels._triton import HAVE_TRITON
from tests.support import nightly

ROOT = Path(__file__).parents[2]
ON_GPU = ["tests/kernels/interpreted.py", "tests/kernels/interpreted_decisions.py"]
"""Those that run on a GPU too, compiled: without TRITON_INTERPRET their tensors are there."""
FILES = [*ON_GPU, "tests/kernels/interpreted_programs.py"]
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


@pytest.fixture(scope="module", params=["not nightly", nightly("nightly")])
def report(request: pytest.FixtureRequest) -> str:
    """What pytest says of `FILES`, run in a process of their own; sizes past one block of columns by themselves."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", "-m", request.param]
    command += ["-o", "python_files=interpreted*.py", *FILES]
    environment = {**os.environ, "PYTEST_ADDOPTS": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_against_its_float64_definition(kernel: str, report: str, request: pytest.FixtureRequest) -> None:
    of_kernel = rf"(PASSED|FAILED|ERROR) \S+::test_{kernel}(?:_\w+)?(?:\[|\s|$)"
    outcomes = re.findall(of_kernel, report)
    if request.node.get_closest_marker("nightly") is None:
        assert outcomes, report[-4000:]
    assert set(outcomes) <= {"PASSED"}, report[-8000:]


def test_nothing_else_failed(report: str) -> None:
    assert not re.search(r"^(FAILED|ERROR) ", report, re.MULTILINE), report[-8000:]
