"""Every model of the zoo on a CUDA device in three precisions: `device` against `reference`. Never run yet."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile.runtime.device.executor import Options
from tests.gpu.moving import agree, compiled, moved, run, wide
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_device_agrees_with_the_reference(name, dtype):
    check(name, dtype, "cuda", "device")


def check(name, dtype, device, executor, structures=("nested", "machine"), batches=(1, 7)):
    """On the CPU the same with the simulator, which is how this test is tested."""
    try:
        entry, fast = compiled(name, dtype, device)
    except (RuntimeError, NotImplementedError) as error:
        if dtype == torch.float32:
            raise
        pytest.skip(f"the model itself does not run in {dtype}: {str(error)[:200]}")
    for structure in structures:
        fast.device_options = Options(structure=structure)
        for batch in batches:
            args, kwargs = moved(entry.inputs(batch, seed=1), device, dtype)
            confidences = [c.cpu() for c in fast.observe(*args, **kwargs).confidences[:-1]]
            for seed in (batch, batch + 1):  # the second time with other thresholds, and no other capture
                thresholds = wide(confidences, random.Random(seed))
                fast.set_thresholds(thresholds)
                got, want = run(fast, executor, args, kwargs), run(fast, "reference", args, kwargs)
                agree(fast, got, want, confidences, thresholds)
