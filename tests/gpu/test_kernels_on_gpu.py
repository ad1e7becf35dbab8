"""Every kernel on a CUDA device against its float64 definition: the cases of the interpreter, run by the card."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_interpreter import KERNELS, ROOT, all_passed, report_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def report() -> str:
    options = ("-p", "tests.gpu.carried", "-o", "filterwarnings=default")
    return report_of(*options, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_against_its_float64_definition(kernel: str, report: str) -> None:
    all_passed(kernel, report)
