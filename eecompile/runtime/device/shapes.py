"""What a segment gives, without running it: its pieces under fake tensors at the full batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eecompile.runtime.device.parts import Conditional, Parts
from eecompile.runtime.device.watched import Watched


class Shapes:
    """Fake values by name.

    Attributes:
        values: Tensors, and the numbers that cross from one piece to the next.
    """

    def __init__(self, flat: Sequence[Tensor], names: Sequence[str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            made = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in flat]
        self.values: dict[str, Any] = dict(zip(names, made, strict=True))

    def run(self, parts: Parts, inputs: Sequence[str]) -> None:
        """Adds what a module in pieces makes, when it is called with the values named `inputs`."""
        self.values |= {n: self.values[i] for n, i in zip(parts.inputs, inputs, strict=True)}
        for piece in parts.pieces:
            if isinstance(piece, Conditional):  # what goes past a region looks like what comes out of it
                self.values |= {o: self.values[p] for o, p in zip(piece.outputs, piece.past, strict=False)}
                self.run(piece.inside, piece.inputs)
                if piece.first and not piece.past:
                    self.values |= {o: self.values[y] for o, y in zip(piece.outputs, piece.inside.outputs, strict=True)}
                continue
            with torch.no_grad(), self.mode:
                given = Watched(piece.module).run(*(self.values[i] for i in piece.inputs))
            self.values |= zip(piece.outputs, given, strict=True)

    def put(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """A tensor on the inputs' device."""
        like = next(iter(self.values.values()))
        with self.mode:
            self.values[name] = torch.empty(tuple(shape), dtype=dtype, device=like.device)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(s) for s in self.values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self.values[name].dtype
        return found
