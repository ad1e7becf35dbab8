"""The identity, with a gradient that is multiplied by a number: only in training graphs, so there is no kernel.

`y = x`, `dL/dx = factor * dL/dy`. The result is a copy, so that in-place operators after it do no harm.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` as it is; its gradient times `factor`."""
    scaled: Tensor = _Scale.apply(x, factor)
    return scaled
