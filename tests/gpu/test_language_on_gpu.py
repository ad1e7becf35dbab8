"""Generation on a CUDA device: passes recorded as graphs, and the kernel of the draft head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eecompile import eecompile, strategies
from eecompile.kernels._triton import LAUNCHES
from tests.language.decoders import decoder, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_on_a_gpu_is_the_models(implementation: str) -> None:
    model = decoder("llama", dtype=torch.float32).cuda()
    batch = {name: t.cuda() for name, t in prompts().items()}
    fast: Any = eecompile(model, strategies.SelfSpeculative(exit=2, threshold=0.0), example_kwargs=batch)
    fast.fit([prompts(8, 20)["input_ids"].cuda()], epochs=1, rank=16)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    before = LAUNCHES["head_confidence"]
    got = fast.run_generate(**batch, **options, cache_implementation=implementation)
    assert torch.equal(got.output, model.generate(**batch, **options))
    assert got.counts.drafted > 0 and LAUNCHES["head_confidence"] > before
