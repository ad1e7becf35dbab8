"""Noise for sampling, keyed by seed, row and position: what is drawn does not depend on how tokens were drafted."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER, _MODULUS = 6364136223846793005, 2**63


def gumbel(seed: int, row: int, position: int, size: int) -> Tensor:
    """[size] float32 Gumbel noise: `argmax(scores + noise)` is a sample of `softmax(scores)` (Gumbel 1954)."""
    key = seed
    for part in (row, position):
        key = (key * _MULTIPLIER + 2 * part + 1) % _MODULUS
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    return -(-uniform.clamp(min=1e-300).log()).log().float()
