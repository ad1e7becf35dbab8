"""A region with widths, to run each row at its own: rows are grouped by width, and each group runs its channels only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from eecompile.kernels.choose import is_open
from eecompile.program import Gate, Program


@dataclass(frozen=True)
class Chain:
    """The gates of one region with widths, and its value with so many of them open.

    Attributes:
        values: One more than gates: what goes past the region, or its value at the smallest width, then the others.
        skips: Whether the first of `values` goes past the region.
        stops: Where the region ends on the way back: its input and the decisions.
    """

    name: str
    gates: tuple[Gate, ...]
    values: tuple[fx.Node, ...]
    skips: bool
    stops: frozenset[fx.Node]

    @property
    def computed(self) -> list[fx.Node]:
        """The region's value at every width."""
        return list(self.values[1:] if self.skips else self.values)


class Chains:
    """The chains of a marked graph, by the names of their gates."""

    def __init__(self, program: Program, names: Mapping[str, fx.Node]) -> None:
        gates = {g.name: g for g in program.gates}
        self.part_of: dict[str, Chain] = {}
        for w in program.widths:
            mine = tuple(gates[name] for name in w.gates)
            values = [names[v] for v in w.values]
            stops = {names[w.x], *(names[g.decision] for g in mine)}
            if w.skips:
                values.insert(0, names[w.x])
            chain = Chain(w.name, mine, tuple(values), w.skips, frozenset(stops))
            self.part_of |= dict.fromkeys(w.gates, chain)


class Widened(nn.Module):
    """Runs a row through one of several bodies.

    Args:
        bodies: `body(*inputs)` gives `(value,)`, narrower ones first; None for rows that go past.
        takes: For each body the indices of its inputs.
        axes: Batch axis of each input, None without one.
        axis: Batch axis of the value.
    """

    def __init__(
        self,
        bodies: Sequence[fx.GraphModule | None],
        takes: Sequence[Sequence[int]],
        axes: Sequence[int | None],
        axis: int,
    ) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(nn.Identity() if b is None else b for b in bodies)
        self.passes = tuple(b is None for b in bodies)
        self.takes, self.axes, self.axis = tuple(map(tuple, takes)), tuple(axes), axis
        self.calls: list[Callable[..., Any]] = [b.forward for b in self.bodies]

    def prepare(self, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Quicker ways to call the bodies."""
        self.calls = [b if p else make(b) for b, p in zip(self.bodies, self.passes, strict=True)]

    def forward(self, decisions: tuple[Tensor, ...], past: Tensor | None, *inputs: Tensor) -> tuple[Tensor]:
        """`decisions` `[n]` open one body after the other; `past` is the value of rows that go by."""
        chosen = torch.stack([is_open(d) for d in decisions]).sum(0)  # an open gate has all before it open
        counts = torch.bincount(chosen, minlength=len(self.passes)).tolist()
        if max(counts) == chosen.shape[0]:
            k = counts.index(max(counts))
            return (past if self.passes[k] else self._run(k, inputs),)  # type: ignore[return-value]
        order = torch.split(torch.argsort(chosen, stable=True), counts)
        result = past
        for k, rows in enumerate(order):
            if counts[k] == 0 or self.passes[k]:
                continue
            value = self._run(k, inputs, rows)
            if result is None:
                sizes = list(value.shape)
                sizes[self.axis] = chosen.shape[0]
                result = value.new_empty(sizes)
            # What goes past may be needed again; a copy of it is not.
            write = result.index_copy if result is past else result.index_copy_
            result = write(self.axis, rows, value)
        assert result is not None
        return (result,)

    def _run(self, k: int, inputs: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        taken = [inputs[i] for i in self.takes[k]]
        if rows is not None:
            axes = [self.axes[i] for i in self.takes[k]]
            taken = [t if a is None else t.index_select(a, rows) for t, a in zip(taken, axes, strict=True)]
        value: Tensor = self.calls[k](*taken)[0]
        return value
