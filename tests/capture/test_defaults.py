"""Calls that name an option which the example left out: its default is accepted, another value refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, eecompile, load, strategies
from tests.support import equal_bits


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 3))

    def forward(self, x: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
        return self.layers(x * scale + float(flag))


def test_defaults_may_be_said(tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    model = Scaled().eval()
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_inputs=(x,))
    fast.save(tmp_path / "saved")
    for one in (fast, load(tmp_path / "saved")):
        with torch.no_grad():
            for args, kwargs in (((x, 1.0), {}), ((x,), {"scale": 1.0}), ((x,), {"flag": False, "scale": 1.0})):
                equal_bits(one(*args, **kwargs), model(*args, **kwargs))
        for kwargs in ({"scale": 2.0}, {"flag": True}, {"flag": 0}):
            with pytest.raises(CaptureError, match="other arguments"):
                one(x, **kwargs)
