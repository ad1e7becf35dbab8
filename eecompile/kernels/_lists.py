"""The list of rows that stay, as device buffers: where what lies in `control`, and the list's definition."""

from __future__ import annotations

import torch
from torch import Tensor

LIVE, BUCKET, ALIVE, COUNTER, FLAGS = 0, 1, 2, 3, 4
"""Elements of `control`: how many stay, the bucket for them, 1 if anybody does. The rest is scratch of
kernels."""


def control_size(capacity: int) -> int:
    """Elements of `control`, int32; all zero before the first launch."""
    return FLAGS + capacity


def write_lists(stay: Tensor, rows: Tensor, buckets: Tensor, survivors: Tensor, positions: Tensor, control: Tensor) -> None:
    """The definition: `positions` gets the indices of `stay` `[capacity]` in order, then -1.

    `survivors` gets `rows` there, then -1; `control` the count, the index of the smallest of the ascending
    `buckets` that holds it (their number for no row) and whether there is a row. No value is needed on the
    host.
    """
    index = torch.arange(stay.shape[0], device=stay.device)
    order = torch.sort(stay, descending=True, stable=True).indices
    found = stay.sum()
    positions.copy_(torch.where(index < found, order, -1))
    survivors.copy_(torch.where(index < found, rows[order], -1))
    bucket = (buckets < found).sum().clamp(max=buckets.numel() - 1)
    alive = found > 0
    control[:COUNTER].copy_(torch.stack((found, torch.where(alive, bucket, buckets.numel()), alive.long())))
