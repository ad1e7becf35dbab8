"""Every kernel on a CUDA device against its float64 definition: the cases of the interpreter, run by the card."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.kernels.test_interpreter import FILES, KERNELS, ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def report() -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.gpu.carried",
    ]
    command += ["-o", "python_files=interpreted*.py", "-o", "filterwarnings=default", *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_against_its_float64_definition(kernel: str, report: str) -> None:
    of_kernel = rf"(PASSED|FAILED|ERROR) \S+::test_{kernel}(?:_(?!gate)\w+)?(?:\[|\s|$)"
    outcomes = re.findall(of_kernel, report)
    assert outcomes, report[-4000:]
    assert set(outcomes) == {"PASSED"}, report[-8000:]
