"""Splits a stack of recurrent layers, one operator to PyTorch, into one call for each layer.

    out, h_n, c_n = lstm(x, (h_0, c_0), weights, layers=L)          becomes, with the batch first,
    out_k, _, c_k = lstm(dropout(out_{k-1}), (h_0[k], c_0[k]), weights of layer k, layers=1)

The final hidden states are read off the outputs: the last step of the forward direction, the first one of the backward
direction. So a layer gives one value `[B, S, D * H]`, and an LSTM its cell states too, where they are read. Every number
stays the same bit for bit: PyTorch itself runs layer after layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from eecompile.passes import facts

aten = torch.ops.aten
OPERATORS = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
}
PACKED = torch.ops.eecompile.packed_rnn.default  # a layer over packed sequences
CELLS = {*OPERATORS, PACKED}
EVERYTHING = 1 << 62  # the end of an open slice


def split_layers(graph_module: fx.GraphModule) -> int:
    """Rewrites every recurrent stack of the graph; gives the number of layers."""
    found = [n for n in graph_module.graph.nodes if n.target in OPERATORS]
    return sum(_Stack(graph_module, n).split() for n in found) + _packed_layers(graph_module)


def _packed_layers(graph_module: fx.GraphModule) -> int:
    """Names the layers of packed stacks, and reads the final states of single layers off those; gives their number."""
    found = graph_module.graph.find_nodes(op="call_function", target=PACKED)
    stacks: dict[Any, list[fx.Node]] = {}
    for n in found:
        stacks.setdefault(facts.stack(n)[-1:], []).append(n)
    for (*_, (path, call, _)), layers in ((k, v) for k, v in stacks.items() if k and len(v) > 1):
        for n in layers:
            for part in (n, *n.users):
                mode = str(n.args[4]).partition("_")[0]
                part.meta["stack"] = (*facts.stack(part), (f"{path}.{n.args[7]}", call, mode))
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.cat.default):
        states = list(node.args[0])
        if not all(s.target is operator.getitem and s.args[0] in found and s.args[1] for s in states):
            continue
        per = int(facts.value(states[0]).shape[0])
        for u in list(node.users):
            args = u.args
            if u.target is aten.select.int and args[1] == 0 and isinstance(args[2], int):
                i = args[2] % (per * len(states))
                u.args = (states[i // per], 0, i % per)
    return len(found)


@dataclass(frozen=True)
class _Layer:
    out: fx.Node  # [B, S, D * H]
    cells: fx.Node | None  # [D, B, H]


class _Stack:
    """One operator with its layers; new nodes go before it.

    `aten.lstm(x, [h, c], weights, biases, layers, dropout, train, bidirectional, batch_first)`; the others take h alone.
    """

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.graph, self.node = graph_module, graph_module.graph, node
        args: tuple[Any, ...] = node.args
        self.x, states, weights, self.biases = args[:4]
        self.count = int(args[4])
        self.dropout, self.train, self.both, self.batch_first = args[5:9]
        self.states = list(states) if isinstance(states, list | tuple) else [states]
        self.weights = list(weights)
        self.directions = 2 if self.both else 1
        self.stack = facts.stack(node)
        self.mode = facts.value(self.x).fake_mode

    def split(self) -> int:
        if self.count == 1 and self.batch_first and not any(u.users and u.args[1] for u in self.node.users):
            return 0
        layers: list[_Layer] = []
        with self.graph.inserting_before(self.node):
            value = self.x
            if not self.batch_first:
                twice = value.target is aten.transpose.int and set(value.args[1:]) == {0, 1}
                value = value.args[0] if twice else self.call(aten.transpose.int, value, 0, 1)
            for k in range(self.count):
                layers.append(self.layer(k, value))
                value = layers[-1].out
            for user in list(self.node.users):
                assert user.target is operator.getitem
                kind = user.args[1]
                if kind == 0:
                    self.outputs(user, layers[-1].out)
                else:
                    self.finals(user, layers, hidden=bool(kind == 1))
        self.graph.erase_node(self.node)
        return self.count

    def layer(self, k: int, value: fx.Node) -> _Layer:
        if k and self.train and self.dropout:
            value = self.call(aten.dropout.default, value, self.dropout, True, layer=k)
        per = len(self.weights) // self.count
        states = [self.first(s, k) for s in self.states]
        target = self.node.target
        lstm = OPERATORS[target] == "LSTM"  # type: ignore[index]
        args = (value, states if lstm else states[0], self.weights[per * k : per * (k + 1)])
        with self.mode:
            x = facts.value(value)
            h, c = facts.value(states[0]), facts.value(states[-1])
            out = x.new_empty((x.shape[0], x.shape[1], self.directions * h.shape[2]))
            given = (out, h.new_empty(h.shape), *((c.new_empty(c.shape),) if lstm else ()))
        node = self.graph.call_function(target, (*args, self.biases, 1, 0.0, self.train, self.both, True))  # type: ignore[arg-type]
        self.note(node, given, k)
        read = any(u.args[1] == 2 and u.users for u in self.node.users)
        return _Layer(self.item(node, 0, k), self.item(node, 2, k) if read else None)

    def first(self, states: fx.Node, k: int) -> fx.Node:
        """The initial states of layer k, `[D, B, H]`."""
        d = self.directions
        if states.target is aten.zeros.default:
            args: tuple[Any, ...] = states.args
            size = [d, *args[0][1:]]
            return self.call(aten.zeros.default, size, layer=k, **states.kwargs)
        return self.call(aten.slice.Tensor, states, 0, d * k, d * (k + 1), layer=k)

    def outputs(self, user: fx.Node, out: fx.Node) -> None:
        user.replace_all_uses_with(out if self.batch_first else self.call(aten.transpose.int, out, 0, 1))
        self.graph.erase_node(user)

    def finals(self, user: fx.Node, layers: Sequence[_Layer], hidden: bool) -> None:
        """Puts the states of single layers in place of `h_n` or `c_n` `[L * D, B, H]`, or all of them stacked."""
        made: dict[int, fx.Node] = {}
        count = self.count * self.directions

        def state(i: int) -> fx.Node:
            if i not in made:
                made[i] = self.final(layers[i // self.directions], i % self.directions, hidden)
            return made[i]

        for u in list(user.users):
            args: tuple[Any, ...] = u.args
            if u.target is aten.select.int and args[1] == 0 and isinstance(args[2], int):
                u.replace_all_uses_with(state(args[2] % count))
            elif u.target is aten.slice.Tensor and _constant(args[1:]):
                axis, start, end, step = (*args[1:], None, None, None, None)[:4]
                if axis:
                    continue
                wanted = range(count)[slice(start, end if end is None else min(end, EVERYTHING), step)]
                u.replace_all_uses_with(self.call(aten.stack.default, [state(i) for i in wanted]))
            else:
                continue
            self.graph.erase_node(u)
        if user.users:
            user.replace_all_uses_with(self.call(aten.stack.default, [state(i) for i in range(count)]))
        self.graph.erase_node(user)

    def final(self, layer: _Layer, direction: int, hidden: bool) -> fx.Node:
        """The final state `[B, H]` of one direction of a layer."""
        if not hidden:
            assert layer.cells is not None
            return self.call(aten.select.int, layer.cells, 0, direction)
        value = layer.out
        if self.both:
            width = facts.value(value).shape[2] // 2
            value = self.call(aten.slice.Tensor, value, 2, direction * width, (direction + 1) * width)
        return self.call(aten.select.int, value, 1, 0 if direction else -1)

    def item(self, node: fx.Node, i: int, k: int) -> fx.Node:
        found = self.graph.call_function(operator.getitem, (node, i))
        return self.note(found, node.meta["val"][i], k)

    def call(self, target: Any, *args: Any, layer: int | None = None, **kwargs: Any) -> fx.Node:
        """A node with the value that the operator gives on fake tensors; in a layer of its own where `layer` says so."""
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            value = target(*fx.node.map_arg(args, facts.value), **fx.node.map_arg(kwargs, facts.value))
        return self.note(node, value, layer)

    def note(self, node: fx.Node, value: Any, layer: int | None) -> fx.Node:
        node.meta = {k: v for k, v in self.node.meta.items() if k not in ("val", "stack")}
        node.meta["val"] = value
        stack = self.stack
        if self.count == 1:  # the module is the layer; what only reads it lies outside
            stack = stack if layer is not None else stack[:-1]
        elif layer is not None and stack:
            path, call, _ = stack[-1]
            stack = (*stack, (f"{path}.{layer}", call, OPERATORS[self.node.target]))  # type: ignore[index]
        node.meta["stack"] = stack
        return node


def hidden(node: fx.Node) -> bool:
    """Whether a value is what a recurrent layer hands on at every step, up to dropout."""
    while node.target is aten.dropout.default:
        node = node.all_input_nodes[0]
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in CELLS and bool(node.args[1] == 0)


def _constant(args: Sequence[Any]) -> bool:
    return not any(isinstance(a, fx.Node | torch.SymInt) for a in args)
