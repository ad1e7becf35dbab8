"""Lower and upper part with fixed shapes: the form that CUDA graphs record. `generate(..., cache_implementation="static")`.

Attention reads all slots of the cache and a mask hides what is not there; where columns belong is a tensor. So a pass has
the same operators and addresses each time. On CUDA each is recorded once and replayed, which no GPU has run so far;
elsewhere the same code runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from eecompile.language.cache import SlotCache, Slots
from eecompile.language.split import Split

WARM_UP = 3  # passes before one is recorded


class StaticSplit(Split):
    """A split whose passes of lower and upper part have one column or `widest`, and read `length` slots.

    Args:
        widest: Most columns of a pass.
        length: Most slots that a row can need.
    """

    def __init__(self, model: nn.Module, blocks: str, exit: int, widest: int, length: int) -> None:
        super().__init__(model, blocks, exit, (1, *[widest] * (widest - 1)))
        self.length = length
        self.passes: dict[tuple[str, int], FixedPass] = {}

    def lower(self, ids: Tensor, slots: Slots, cache: SlotCache) -> Tensor:
        def run(ids: Tensor, index: Tensor, padding: Tensor) -> Tensor:
            return Split.lower(self, ids, Slots(index, padding, self.length, False), cache)

        return self._fixed("lower", run, ids, slots)

    def upper(self, ids: Tensor, hidden: Tensor, slots: Slots, cache: SlotCache) -> Tensor:
        def run(ids: Tensor, index: Tensor, padding: Tensor, hidden: Tensor) -> Tensor:
            return Split.upper(self, ids, hidden, Slots(index, padding, self.length, False), cache)

        return self._fixed("upper", run, ids, slots, hidden)

    def _fixed(self, name: str, run: Callable[..., Tensor], ids: Tensor, slots: Slots, *hidden: Tensor) -> Tensor:
        """The pass on columns without a place added up to its width; their output is left out."""
        given, (ids, slots) = ids.shape[1], self.padded(ids, slots)
        inputs = [ids, slots.index, slots.padding, *(functional.pad(h, (0, 0, 0, slots.padded)) for h in hidden)]
        key = name, ids.shape[1]
        if key not in self.passes:
            self.passes[key] = FixedPass(run, inputs)
        return self.passes[key](*inputs)[:, :given]


class FixedPass:
    """A function of tensors that is always called with the same shapes; on CUDA recorded as a graph.

    Args:
        run: The function; it may write to tensors of its own, as a cache is, always the same ones.
        inputs: Its arguments in the first call.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        self.run, self.inputs = run, [t.clone() for t in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        if inputs[0].is_cuda:
            self._record()

    def _record(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given)
        if self.graph is None:
            return self.run(*self.inputs)
        self.graph.replay()
        return self.output.clone()  # the next replay writes there
