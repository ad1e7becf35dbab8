"""Models that write their own buffers in eval mode are refused with the buffers' names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eecompile import UnsupportedModelError
from tests.capture.nets import WIDTH, Net
from tests.support import compiled as eecompile

X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))


class Counting(Net):
    """A running mean of what it has seen, read by the classifier."""

    def __init__(self, only_in_training: bool = False) -> None:
        super().__init__()
        self.only_in_training = only_in_training
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        if self.training or not self.only_in_training:
            self.seen.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.out(h - self.seen)


def test_a_model_that_writes_in_eval_is_refused():
    model = Counting().eval()
    with pytest.raises(UnsupportedModelError, match="writes its own buffers in eval mode") as caught:
        eecompile(model, "branchy", example_inputs=(X,))
    assert "seen" in str(caught.value)
    assert not bool(model.seen.any()), "capturing wrote it"
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=False)
    with pytest.raises(UnsupportedModelError, match="writes its own buffers in eval mode"):
        eecompile(program, "branchy", example_inputs=(X,))


def test_a_model_that_writes_in_training_alone_is_taken():
    model = Counting(only_in_training=True).eval()
    fast = eecompile(model, "branchy", example_inputs=(X,))
    fast.set_thresholds(2.0)
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))
        fast.executor = "reference"
        assert torch.equal(fast(X), model(X))
    assert not bool(model.seen.any())
    y = torch.randint(0, 3, (6,))
    fast.fit([(X, y)], trunk=True, progress=False)
    assert bool(fast.running.seen.any()), "training writes it, as the model itself would"
    assert not bool(model.seen.any()), "in the copy that is trained"
