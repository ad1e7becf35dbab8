"""The submodule that runs each row through the arm of a choice that it takes: gates, halting steps, widths and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from eecompile.kernels.choose import is_open

Body = Callable[..., tuple[Tensor, ...]]


class Partition(nn.Module):
    """Groups rows by arm. An arm that has all rows runs on what it is given, and nothing is copied; one without rows does
    not run; else inputs are gathered along their batch axes, and values are written to the rows that they belong to.

    Args:
        bodies: By arm; `body(*inputs)` gives one value for each merge. Rows of an arm without one go past the region.
        takes: By arm, the positions of what its body is called with among the inputs.
        axes: Batch axis of each input, None without one.
        out_axes: Batch axis of each value.
    """

    def __init__(
        self,
        bodies: Mapping[int, fx.GraphModule],
        takes: Mapping[int, Sequence[int]],
        axes: Sequence[int | None],
        out_axes: Sequence[int],
    ) -> None:
        super().__init__()
        self.arms, self.bodies = tuple(bodies), nn.ModuleList(bodies.values())
        self.takes, self.axes, self.out_axes = [tuple(takes[k]) for k in bodies], tuple(axes), tuple(out_axes)
        self.prepare(lambda body: body.forward)

    def graphs(self) -> list[fx.GraphModule]:
        return list(self.bodies)  # type: ignore[arg-type]

    def prepare(self, make: Callable[[fx.GraphModule], Body]) -> None:
        """Puts other calls in place of the bodies': an executor has quicker ones."""
        given = [[(i, self.axes[i]) for i in takes] for takes in self.takes]
        self.calls = list(zip(self.arms, map(make, self.graphs()), given, strict=True))

    def forward(
        self, index: Tensor, past: tuple[Tensor, ...] | None, *inputs: Tensor, over: bool = False
    ) -> tuple[Tensor, ...]:
        """One value for each merge.

        Args:
            index: [n] which arm each row takes: int64; or bool or floating, of two arms, as `choose` reads it.
            past: What goes past the region; None where every arm has a body.
            over: Writes over `past` itself, not over a copy.
        """
        n, result, mine = index.shape[0], past, over
        taken = index if index.dtype == torch.int64 else is_open(index)
        for k, call, given in self.calls:
            here = taken == k if taken.dtype == torch.int64 else taken if k else ~taken
            rows = torch.nonzero(here).view(-1)
            count = rows.numel()
            if count == 0:
                continue
            if count == n:
                return call(*[inputs[i] for i, _ in given])
            values = call(*[inputs[i] if axis is None else inputs[i].index_select(axis, rows) for i, axis in given])
            if result is None:
                result, mine = tuple(self._empty(v, axis, n) for v, axis in zip(values, self.out_axes, strict=True)), True
            # What goes past may be needed again; a copy of it is not.
            write: Any = Tensor.index_copy_ if mine else Tensor.index_copy
            result = tuple(write(x, axis, rows, y) for x, y, axis in zip(result, values, self.out_axes, strict=True))
            mine = True
        assert result is not None  # a batch has rows
        return result

    @staticmethod
    def _empty(value: Tensor, axis: int, rows: int) -> Tensor:
        sizes = list(value.shape)
        sizes[axis] = rows
        return value.new_empty(sizes)


def opened(*decisions: Tensor) -> Tensor:
    """[n] int64: how many of a width's gates are open; an open gate has all before it open."""
    return torch.stack([is_open(d) for d in decisions]).sum(0)
