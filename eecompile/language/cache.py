"""A cache of keys and values that is addressed by slot, so that the rows of a batch accept tokens at their own pace.

A token's slot is its place in the row, padding on the left included: the layout of plain decoding. What was written for a
rejected draft lies after the row's last token, where no query looks, and is overwritten by the next token there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 64  # slots that are added at a time


@dataclass(frozen=True)
class Slots:
    """Where the columns of one pass belong.

    Attributes:
        index: [B, Q] int64; slot of each column, -1 for a column that is none of the row's.
        padding: [B] int64; slots of padding at the start of each row.
        length: Number of slots that attention reads.
        together: Whether the columns are the same consecutive slots in every row.
        padded: Number of last columns that are none of any row's and are not written.
    """

    index: Tensor
    padding: Tensor
    length: int
    together: bool
    padded: int = 0

    @property
    def positions(self) -> Tensor:
        """[B, Q] int64: position of each column's token in its row, padding not counted."""
        return (self.index - self.padding[:, None]).clamp(min=0)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, length], added to attention's scores: 0 where a column looks, else the least finite number."""
        slot = torch.arange(self.length, device=self.index.device)
        at = self.index.clamp(min=0)[:, :, None]
        seen = (slot <= at) & (slot >= torch.minimum(self.padding[:, None, None], at))
        if window is not None:
            seen &= slot > at - window
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class Written(BaseException):
    """Ends a block's forward once its keys and values are there. No Exception, so that handlers let it through."""


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values `[B, H, 1 + slots, D]` of one layer; the first slot takes what columns without a place write."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros((*key_states.shape[:2], 1, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], 1, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.cache.slots
        missing = slots.length + 1 - self.keys.shape[2]
        if missing > 0:
            self.keys = _grown(self.keys, max(missing, self.cache.growth(slots.length)))
            self.values = _grown(self.values, max(missing, self.cache.growth(slots.length)))
        columns = slots.index.shape[1] - slots.padded
        for stored, given in ((self.keys, key_states), (self.values, value_states)):
            new = given[:, :, :columns]
            if slots.together:
                first = self.cache.first + 1
                stored[:, :, first : first + columns] = new
            else:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                stored[rows, :, slots.index[:, :columns] + 1] = new.transpose(1, 2)
        if self.cache.only_written:
            raise Written
        return self.keys[:, :, 1 : slots.length + 1], self.values[:, :, 1 : slots.length + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.slots.length, 0

    def get_seq_length(self) -> int:
        slots = self.cache.slots
        return slots.length - slots.index.shape[1] + slots.padded

    def get_max_length(self) -> int:
        return -1


def _grown(held: Tensor, by: int) -> Tensor:
    return torch.cat([held, held.new_zeros((*held.shape[:2], by, held.shape[3]))], dim=2)


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers of one generation.

    Args:
        layers: Number of layers.
        capacity: Most slots that a row can need; None where that is not known.
    """

    def __init__(self, layers: int, capacity: int | None = None) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
        self.capacity = capacity
        self.slots = Slots(torch.zeros((1, 0), dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0, True)
        self.first = 0
        self.only_written = False  # whether a layer's update ends the forward of its block

    def at(self, slots: Slots) -> None:
        """The slots that the next pass writes and reads."""
        self.slots = slots
        self.first = int(slots.index[0, 0]) if slots.together else 0

    def growth(self, length: int) -> int:
        room = GROWTH if self.capacity is None else min(GROWTH, max(self.capacity - length, 0))
        return room + 1

    def load(self, before: Cache, length: int) -> None:
        """Takes the first `length` slots from a cache of plain decoding."""
        batch = next(layer.keys.shape[0] for layer in before.layers if layer.keys is not None)
        index = torch.arange(length).expand(batch, -1)
        self.at(Slots(index, torch.zeros(batch, dtype=torch.int64), length, True))
        for layer, theirs in zip(self.layers, before.layers, strict=False):
            layer.update(theirs.keys, theirs.values)

    def plain(self, length: int, config: object) -> DynamicCache:
        """The first `length` slots as plain decoding would have left them."""
        found = DynamicCache(config=config)
        for i, layer in enumerate(self.layers):
            if layer.keys is not None and layer.values is not None:
                found.update(layer.keys[:, :, 1 : length + 1].clone(), layer.values[:, :, 1 : length + 1].clone(), i)
        return found
