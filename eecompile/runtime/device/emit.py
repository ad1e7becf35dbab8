"""Writes a module in pieces as nodes, at one number of rows: regions become a switch over how many rows are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from eecompile.kernels._lists import control_size
from eecompile.runtime.device.nodes import Body, Buffer, Call, Clone, Empty, Gather, If, Node, OpenRows, Scatter, Switch
from eecompile.runtime.device.parts import Conditional, Parts
from eecompile.runtime.device.shapes import Shapes


@dataclass(frozen=True)
class Rows:
    """How many rows code runs on, and the control with how many of them are live."""

    size: int
    control: str


class Emitter:
    """What the nodes of a program share: its buffers and modules."""

    def __init__(self, batch: int, buckets: Sequence[int], shapes: Shapes) -> None:
        self.batch, self.buckets, self.shapes = batch, tuple(buckets), shapes
        self.buffers: dict[str, Buffer] = {}
        self.modules: list[fx.GraphModule] = []
        self._index: dict[int, int] = {}

    def buffer(self, buffer: Buffer) -> None:
        self.buffers.setdefault(buffer.name, buffer)

    def add_modules(self, parts: Parts) -> None:
        """Numbers the straight pieces."""
        for piece in parts.pieces:
            if isinstance(piece, Conditional):
                self.add_modules(piece.inside)
            else:
                self._index[id(piece)] = len(self.modules)
                self.modules.append(piece.module)

    def parts(self, parts: Parts, named: Mapping[str, str], rows: Rows) -> list[Node]:
        """The nodes; `named` are values that go by another name outside."""
        nodes: list[Node] = []
        for piece in parts.pieces:
            if isinstance(piece, Conditional):
                nodes += self._region(piece, named, rows)
            else:
                inputs = tuple(named.get(n, n) for n in piece.inputs)
                nodes.append(Call(self._index[id(piece)], inputs, piece.outputs))
        return nodes

    def _region(self, piece: Conditional, named: Mapping[str, str], rows: Rows) -> list[Node]:
        opened = Rows(rows.size, f"{piece.name}.control")
        positions = f"{piece.name}.open"
        self.buffer(Buffer(positions, (self.batch,), torch.int64))
        self.buffer(Buffer(opened.control, (control_size(self.batch),), torch.int32, 0, once=True))
        decision = named.get(piece.decision, piece.decision)
        nodes: list[Node] = [OpenRows(decision, rows.control, positions, opened.control, rows.size)]
        if piece.past:
            nodes += [Clone(named.get(p, p), o) for p, o in zip(piece.past, piece.outputs, strict=True)]
        elif piece.first:
            nodes += [self._empty(o, axis, rows.size) for o, axis in zip(piece.outputs, piece.out_axes, strict=True)]
        if rows.size == 1:
            nodes.append(If(opened.control, self._alone(piece, named, opened, positions)))
            return nodes
        sizes = [b for b in self.buckets if b <= rows.size]
        bodies = tuple(self._some(piece, named, opened, positions, b) for b in sizes)
        nodes.append(Switch(opened.control, bodies))
        return nodes

    def _empty(self, name: str, axis: int, rows: int) -> Empty:
        whole = self.shapes.shape(name)
        return Empty(name, (*whole[:axis], rows, *whole[axis + 1 :]), self.shapes.dtype(name))

    def _alone(self, piece: Conditional, named: Mapping[str, str], opened: Rows, positions: str) -> Body:
        """A region for one row: nothing to gather."""
        inner = {t: named.get(s, s) for s, t in zip(piece.inputs, piece.inside.inputs, strict=True)}
        nodes = self.parts(piece.inside, inner, Rows(1, opened.control))
        return (*nodes, self._back(piece, inner, opened, positions))

    def _back(self, piece: Conditional, inner: Mapping[str, str], opened: Rows, positions: str) -> Scatter:
        values = tuple(inner.get(y, y) for y in piece.inside.outputs)
        return Scatter(values, piece.outputs, piece.out_axes, positions, opened.control)

    def _some(self, piece: Conditional, named: Mapping[str, str], opened: Rows, positions: str, size: int) -> Body:
        """A region for at most `size` open rows."""
        inner: dict[str, str] = {}
        gathered: list[tuple[str, str, int]] = []
        for source, target, axis in zip(piece.inputs, piece.inside.inputs, piece.axes, strict=True):
            name = named.get(source, source)
            if axis is None:
                inner[target] = name
            else:
                gathered.append((name, target, axis))
        nodes: list[Node] = []
        if gathered:
            sources, targets, axes = zip(*gathered, strict=True)
            nodes.append(Gather(sources, targets, axes, positions, opened.control, size))
        nodes += self.parts(piece.inside, inner, Rows(size, opened.control))
        return (*nodes, self._back(piece, inner, opened, positions))


def mutates(parts: Parts) -> bool:
    """Whether any operator of a module in pieces writes to what it is given."""
    return any(
        mutates(p.inside) if isinstance(p, Conditional) else any(_writes(n) for n in p.module.graph.nodes)
        for p in parts.pieces
    )


def _writes(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return n.op == "call_function" and schema is not None and bool(schema.is_mutable)
