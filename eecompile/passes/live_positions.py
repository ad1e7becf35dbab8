"""Runs position-wise parts of a halting step at the positions of a sequence that have not halted.

The live positions of all rows are one list: what a part reads is gathered from `[n, S, ...]` to `[1, N, ...]`, the part
runs, and its value is written over what the halted positions keep. While no position has halted nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from eecompile.ir.records import Choice, TokenPart
from eecompile.passes import facts
from eecompile.passes.extract import Extractor
from eecompile.passes.positionwise import VIEWS, Positions


class LivePositions(nn.Module):
    """Runs `body` on a list of positions.

    Args:
        body: `body(*inputs)` gives `(value,)`, all of them `[1, N, ...]`.
        most_live: Share of live positions above which all are computed.
    """

    def __init__(self, body: fx.GraphModule, most_live: float) -> None:
        super().__init__()
        self.body, self.most_live = body, most_live
        self.call: Callable[..., tuple[Tensor, ...]] = body.forward  # an executor may put a quicker one here

    def forward(self, live: Tensor, past: Tensor | None, *inputs: Tensor) -> Tensor:
        """`[n, S, ...]`: the value at live positions, at the others that of `past`, zeros without it.

        Args:
            live: `[n, S]` bool.
            past: Like the value.
            inputs: `[n, S, ...]` each.
        """
        rows, count = live.shape
        at = torch.nonzero(live.reshape(-1)).view(-1)
        if at.numel() > self.most_live * rows * count:
            y = self.call(*(t.reshape(1, rows * count, *t.shape[2:]) for t in inputs))[0]
            y = y.view(rows, count, *y.shape[2:])
            if past is None or at.numel() == rows * count:
                return y
            return torch.where(live.view(rows, count, *(1,) * (y.ndim - 2)), y, past)
        y = self.call(*(_taken(t, at).unsqueeze(0) for t in inputs))[0].squeeze(0)
        if past is None:
            filled = y.new_zeros((rows * count, *y.shape[1:])).index_copy_(0, at, y)
        else:
            filled = past.reshape(rows * count, *y.shape[1:]).index_copy(0, at, y)
        return filled.view(rows, count, *y.shape[1:])


def _taken(t: Tensor, at: Tensor) -> Tensor:
    """`[N, ...]`: a value `[n, S, ...]` at positions counted through all rows."""
    if t.is_contiguous():
        return t.flatten(0, 1).index_select(0, at)
    return t[at // t.shape[1], at % t.shape[1]]  # attention hands on a transposed value: no copy of all of it


def extract_at_live(
    source: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    name: str,
    choice: Choice,
) -> fx.GraphModule:
    """As `extract`, with the step's parts as submodules that run at its live positions."""
    names = facts.by_name(source)
    part = Extractor(source)
    for n in inputs:
        part.placeholder(n)
    mine = {n.name for n in nodes}
    whole = [p for p in choice.parts if mine.issuperset(p.nodes)]
    ends = {names[p.node]: p for p in whole}
    hidden = {name for p in whole for name in p.nodes}
    for n in nodes:
        p = ends.get(n)
        if p is None:
            if n.name not in hidden:
                part.copy_unless_outer(n)
            continue
        part.modules[p.name] = LivePositions(_body(source, p), p.most_live)
        past = part.resolve(names[p.past]) if p.past else None
        call = part.graph.call_module(
            p.name, (part.resolve(names[choice.live]), past, *(part.resolve(names[i]) for i in p.inputs))
        )
        call.meta = {key: v for key, v in n.meta.items() if key in ("val", "stack")}
        part.env[n] = call
        if p.kept:
            part.env[names[p.kept]] = call
    return part.finish([part.resolve(n) for n in outputs], name)


def _body(source: fx.GraphModule, p: TokenPart) -> fx.GraphModule:
    """A part on a list of positions; views keep the axes after the positions."""
    names = facts.by_name(source)
    positions = Positions(source, names[p.node])
    part = Extractor(source)
    for i in p.inputs:
        part.placeholder(names[i])
    for n in (names[name] for name in p.nodes):
        new = part.copy(n)
        if n.target in VIEWS:
            sizes = [int(e) for e in facts.shape(n)[2 if positions.split(n) else 1 :]]
            new.args = (new.args[0], [1, -1, *sizes] if positions.split(n) else [-1, *sizes])
    return part.finish([part.env[names[p.node]]], "LivePart")
