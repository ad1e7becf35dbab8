"""Which operators treat every position of a sequence by itself, and along which axis their operands have the positions.

A value has its positions on an axis p of `[B, ...]`, or folded into the batch, `[B * S, ...]`. An operator is position-wise
along an axis if what it gives at one position depends on its operands there alone: linear layers, norms over the last axis,
element-wise operators, views that leave the axis whole. Attention is, in its queries.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from eecompile.passes import facts

aten = torch.ops.aten
FOLDED = -1
Layout = int  # axis of the positions, or FOLDED
Operands = list[tuple[fx.Node, Layout]]

COPIES = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.dropout.default)
VIEWS = (aten.view.default, aten.reshape.default)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
AXIS = (aten.slice.Tensor, aten.softmax.int, aten._softmax.default, *SPLITS)  # along one axis, given as an argument
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction, aten.amax.default)


class Positions:
    """The positions of one state `[B, S, ...]` in the values that it is computed from.

    Args:
        gm: Their graph.
        state: The node of the state.
    """

    def __init__(self, gm: fx.GraphModule, state: fx.Node) -> None:
        self.gm = gm
        self.batch, self.count = facts.shape(state)[:2]

    def split(self, node: fx.Node) -> bool:
        """Whether a value is `[B, S, ...]` by its sizes."""
        return facts.shape(node)[:2] == (self.batch, self.count)

    def operands(self, n: fx.Node, at: Layout) -> Operands | None:
        """The operands with positions that `n` needs for its own positions, and where they have them.

        None where `n` is not known to be position-wise along that axis.
        """
        args: Any = n.args
        if n.op != "call_function":
            return None
        if n.target is operator.getitem:
            return [(args[0], at)] if args[0].target in SPLITS else None
        if not isinstance(n.target, torch._ops.OpOverload) or n.target._schema.is_mutable:
            return None
        x: Any = args[0] if args and isinstance(args[0], fx.Node) else None
        if x is None and n.target is not aten.cat.default:
            return None
        axis = 0 if at == FOLDED else at
        if n.target is aten.linear.default or n.target in (aten.matmul.default, aten.mm.default, aten.addmm.default):
            return self._product(n, at)
        if n.target in VIEWS:
            return self._view(x, n, at)
        if n.target in (aten.transpose.int, aten.permute.default):
            return self._moved(x, n, at)
        if n.target is aten.scaled_dot_product_attention.default:
            fits = at == _rank(n) - 2 and all(a is not x for a in args[1:]) and not (len(args) > 4 and args[4])
            return [(x, at)] if fits else None
        if n.target is aten.cat.default:
            dim = int(args[1]) % _rank(n) if len(args) > 1 else 0
            return [(a, at) for a in args[0]] if dim > axis else None
        if n.target in NORMS:
            return [(x, at)] if len(args[1]) < _rank(n) - axis and _fixed(n, 2) else None
        if n.target in AXIS:
            given = args[2] if n.target in SPLITS and len(args) > 2 else None if n.target in SPLITS else args[1]
            dim = int(given if given is not None else 0) % _rank(x)
            return [(x, at)] if dim > axis else None
        if n.target in REDUCTIONS:
            dims = args[1] if len(args) > 1 else None
            return [(x, at)] if dims and all(d % _rank(x) > axis for d in dims) else None
        if n.target in COPIES:
            trains = n.target is aten.dropout.default and bool(args[2])
            return None if trains else [(x, at)]
        return self._pointwise(n, at) if torch.Tag.pointwise in n.target.tags else None

    def gathers(self, n: fx.Node, at: Layout) -> bool:
        """Whether `n` can run on any list of positions `[1, N, ...]`: no attention, no axes in other places."""
        if at not in (1, FOLDED) or n.target in (aten.transpose.int, aten.permute.default):
            return False
        if n.target is aten.matmul.default and not _fixed(n, 1):
            return False
        if n.target in VIEWS and not all(e.is_Integer for e in facts.shape(n)[1 if at == FOLDED else 2 :]):
            return False
        return n.target is not aten.scaled_dot_product_attention.default

    def _product(self, n: fx.Node, at: Layout) -> Operands | None:
        """A product with a weight in rows; that of two values in the rows of the first."""
        first = 1 if n.target is aten.addmm.default else 0
        x: Any = n.args[first]
        fixed = all(
            isinstance(a, fx.Node) and a.op == "get_attr" for i, a in enumerate(n.args) if i != first and a is not None
        )
        if n.target is aten.matmul.default and not fixed:
            return [(x, at)] if at == _rank(n) - 2 == _rank(x) - 2 and n.args[1] is not x else None
        return [(x, at)] if fixed and not n.kwargs and (at == FOLDED or at < _rank(n) - 1) else None

    def _view(self, x: fx.Node, n: fx.Node, at: Layout) -> Operands | None:
        before, after = facts.shape(x), facts.shape(n)
        if before == after:
            return [(x, at)]
        if at == 1 and self.split(n):
            if self.split(x):
                return [(x, 1)]
            return [(x, FOLDED)] if self._folded(x) else None
        if at == FOLDED and self._folded(n):
            return [(x, 1)] if self.split(x) else [(x, FOLDED)] if self._folded(x) else None
        return None

    def _folded(self, n: fx.Node) -> bool:
        return bool(facts.shape(n)[0] == self.batch * self.count)

    def _moved(self, x: fx.Node, n: fx.Node, at: Layout) -> Operands | None:
        args: Any = n.args
        if at == FOLDED:
            return None
        order = list(range(_rank(n)))
        if n.target is aten.permute.default:
            order = [d % _rank(n) for d in args[1]]
        else:
            a, b = (d % _rank(n) for d in args[1:])
            order[a], order[b] = order[b], order[a]
        return [(x, order[at])]

    def _pointwise(self, n: fx.Node, at: Layout) -> Operands | None:
        """Operands of the result's shape at the positions; others must be the same at every position of every row.

        On another axis than 1 nothing is gathered: masks and tables that vary along the positions may come in.
        """
        sizes = facts.shape(n)
        if at > 1:
            return [(a, at) for a in n.all_input_nodes if facts.shape(a) == sizes]
        found: Operands = []
        axis = 0 if at == FOLDED else at
        for a in n.all_input_nodes:
            own = self._sizes(a)
            if own is None:
                return None
            shift = len(sizes) - len(own)
            if shift == 0 and own[: axis + 1] == sizes[: axis + 1]:
                found.append((a, at))
            elif any(e != 1 for e in own[: max(axis + 1 - shift, 0)]):
                return None
        return found

    def _sizes(self, n: fx.Node) -> tuple[Any, ...] | None:
        """Sizes of a tensor; None of a number, which is not known to be the same for other positions."""
        if n.op == "get_attr" and not facts.is_tensor(n):
            found = facts.attribute(self.gm, str(n.target))
            return tuple(found.shape) if isinstance(found, torch.Tensor) else None
        return facts.shape(n) if facts.is_tensor(n) else None


def _rank(n: fx.Node) -> int:
    value = facts.value(n)
    return (value[0] if isinstance(value, tuple | list) else value).ndim  # type: ignore[no-any-return]


def _fixed(n: fx.Node, start: int) -> bool:
    """Whether the arguments from `start` on are parameters, buffers or numbers."""
    return all(a.op == "get_attr" for a in n.args[start:] if isinstance(a, fx.Node))


def work(n: fx.Node) -> float:
    """FLOPs of a product with a weight at one position; 0 for other operators, which move data and compute little."""
    if n.target not in (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default):
        return 0.0
    x: Any = n.args[1 if n.target is aten.addmm.default else 0]
    return float(2 * facts.shape(x)[-1] * facts.shape(n)[-1])


def width(n: fx.Node) -> float:
    """Elements of a value `[B, S, ...]` at one position."""
    return float(math.prod(facts.shape(n)[2:]))
