"""What is written into a graph, what it replaces, where cuts are then, and how its places are found again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile.errors import PassError
from eecompile.ir.graph import Counterparts, anchors
from eecompile.ir.records import Anchor, Cut, Live
from eecompile.ir.writer import GraphWriter, Span

aten = torch.ops.aten


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = aten.relu.default(x)
        z = aten.relu.default(aten.neg.default(y))
        return aten.add.Tensor(aten.tanh_.default(z), y)


@pytest.fixture
def graph() -> fx.GraphModule:
    with torch._subclasses.FakeTensorMode() as mode:
        x = mode.from_tensor(torch.zeros(4, 3))
        found = torch.fx.symbolic_trace(Model())
        env: dict[Any, Any] = {}
        for n in found.graph.nodes:
            if n.op == "placeholder":
                n.meta["val"] = env[n] = x
            elif n.op == "call_function":
                n.meta["val"] = env[n] = n.target(*fx.node.map_arg(n.args, lambda a: env[a]))
    return found


def cut(value: str, after: str) -> Cut:
    live = (Live(value, 0, ("batch", 3), "float32"),)
    return Cut(value, after, value, live, 0.5, True, True, Anchor("", 0, "", 0))


def test_new_nodes_follow_one_another_with_values(graph: fx.GraphModule) -> None:
    writer = GraphWriter(graph, stack=(("added", 0, "Added"),))
    writer.at = writer.names["neg_default"]
    first = writer.call("first", aten.mul.Tensor, writer.at, 2.0)
    second = writer.call("second", aten.sum.dim_IntList, first, [1])
    assert [n.name for n in graph.graph.nodes][2:5] == ["neg_default", "first", "second"]
    assert second.meta["val"].shape == (4,)
    assert first.meta["stack"] == (("added", 0, "Added"),)


def test_what_is_replaced_is_read_no_more_but_by_what_was_written(graph: fx.GraphModule) -> None:
    """And what is handed on as it was is not overwritten."""
    writer = GraphWriter(graph)
    x, y, z = (writer.names[n] for n in ("relu_default", "neg_default", "relu_default_1"))
    writer.at = z
    chosen = writer.choose("chosen", torch.ones(4), [x, z], 0)  # type: ignore[arg-type]
    writer.keep(x, z)
    writer.replace(z, chosen)
    writer.finish()
    assert set(z.users) == {chosen}
    (tanh,) = chosen.users
    assert tanh.target is aten.tanh.default, "the in-place operator would write over what was chosen"
    assert writer.now("relu_default_1") is chosen and writer.now("neg_default") is y


def test_cuts_follow_what_is_replaced_and_none_is_inside(graph: fx.GraphModule) -> None:
    writer = GraphWriter(graph)
    z = writer.names["relu_default_1"]
    writer.at = z
    writer.replace(z, writer.call("chosen", aten.neg.default, z))
    writer.spans.append(Span(writer.position[writer.names["neg_default"]], writer.position[z], "a row may skip it"))
    inside, at_end = cut("neg_default", "neg_default"), cut("relu_default_1", "relu_default_1")
    kept, refused = writer.moved_cuts([inside, at_end], "rule")
    assert [(r.node, r.rule, r.reason) for r in refused] == [("neg_default", "rule", "a row may skip it")]
    assert [(c.value, c.after, c.live[0].node) for c in kept] == [("chosen", "chosen", "chosen")]
    writer.spans[0] = replace(writer.spans[0], between={"neg_default": "last_of_step"})
    kept, refused = writer.moved_cuts([inside, at_end], "rule")
    assert not refused
    assert (kept[0].value, kept[0].after) == ("neg_default", "last_of_step")


def test_counterparts_are_found_by_anchor_and_inputs_by_name(graph: fx.GraphModule) -> None:
    again = torch.fx.symbolic_trace(Model())
    for n in again.graph.nodes:
        if n.op == "call_function":
            n._rename(f"other_{n.name}")
    there = Counterparts(again, "a test")
    for node, anchor in anchors(graph.graph.nodes).items():
        assert there.name(anchor, node.name, "here") == f"other_{node.name}"
    assert there.name(None, "x", "here") == "x"
    with pytest.raises(PassError, match="a value that a test needs is not in the other capture"):
        there.name(Anchor("", 0, "aten.cos.default", 0), "cos", "here")
    with pytest.raises(PassError, match="not in the other capture"):
        there.name(None, "neg_default", "here")
