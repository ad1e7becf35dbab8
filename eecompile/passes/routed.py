"""The branches of a router taken out of the graph, each to run on the rows that were sent there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

Body = Callable[..., tuple[Tensor, ...]]


class Routed(nn.Module):
    """Groups rows by branch: one that has all rows runs on what it is given, one without rows does not run.

    Args:
        bodies: Each gives a tuple of one value.
        takes: For each the positions of what it is called with among the inputs.
        axes: Batch axis of each input, None without one.
        out_axis: Batch axis of the value.
    """

    def __init__(
        self,
        bodies: Sequence[fx.GraphModule],
        takes: Sequence[Sequence[int]],
        axes: Sequence[int | None],
        out_axis: int,
    ) -> None:
        super().__init__()
        self.graphs = list(bodies)
        self.bodies = nn.ModuleList(bodies)
        self.takes, self.axes, self.out_axis = [tuple(t) for t in takes], tuple(axes), out_axis
        self.calls: list[Body] = [b.forward for b in bodies]

    def prepare(self, ready: Callable[[fx.GraphModule], Body]) -> None:
        """Puts quicker calls in place of the bodies'."""
        self.calls = [ready(body) for body in self.graphs]

    def forward(self, choice: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        """`choice` [n] int64, the branch of each row."""
        n = choice.shape[0]
        result: Tensor | None = None
        for k, (call, takes) in enumerate(zip(self.calls, self.takes, strict=True)):
            rows = torch.nonzero(choice == k).view(-1)
            if rows.numel() == 0:
                continue
            given = [(inputs[i], self.axes[i]) for i in takes]
            if rows.numel() == n:
                return (call(*(t for t, _ in given))[0],)
            (value,) = call(*(t if axis is None else t.index_select(axis, rows) for t, axis in given))
            if result is None:
                shape = [n if i == self.out_axis else s for i, s in enumerate(value.shape)]
                result = value.new_empty(shape)
            result = result.index_copy_(self.out_axis, rows, value)
        assert result is not None  # a batch has rows
        return (result,)
