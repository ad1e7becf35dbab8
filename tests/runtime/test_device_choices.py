"""Device programs of routers between branches: each branch runs its own rows."""

from __future__ import annotations

import torch

from eecompile.runtime.device.machine import Simulator
from eecompile.runtime.device.nodes import Call, Empty, OpenRows, Switch
from eecompile.strategies import Branchy, Router
from tests.runtime.devices import simulated
from tests.support import again
from tests.zoo import ZOO


def routed(bert):
    """A router after the first layer whose probabilities differ from row to row."""
    fast = again(bert, Branchy(router=Router(at="bert.encoder.layer.0", to={"light": 0.5}, unit="linear")))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for p in fast.route_units.unit.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return fast


class Counting(Simulator):
    """Keeps the shapes that straight code is called with."""

    def node(self, node):
        if isinstance(node, Call):
            self.shapes.append([tuple(v.shape) for n in node.inputs if hasattr(v := self.values[n], "shape")])
        super().node(node)


def test_each_branch_runs_the_bucket_of_its_rows(bert, monkeypatch):
    """Five rows one way and two the other: bodies of 8 and 2 rows, however they lie in the batch."""
    fast = routed(bert)
    _, kwargs = ZOO["bert"].inputs(8, seed=2)
    weights = fast.observe(**kwargs).trace.route_weights
    lead = (weights[:, 0] - weights[:, 1]).sort().values
    at = float(lead[5] + lead[6]) / 2  # two rows take the light way
    fast.set_route_margins([max(at, 0.0), max(-at, 0.0)])
    program = fast.device_program(**kwargs)
    assert program.count(OpenRows) == 2
    assert program.count(Empty) == 1
    assert program.count(Switch) >= 2
    shapes: list[list[tuple[int, ...]]] = []
    monkeypatch.setattr(Counting, "shapes", shapes, raising=False)
    monkeypatch.setattr("eecompile.runtime.device.executor.Simulator", Counting)
    simulated(fast, **kwargs)
    batches = [max(s[0] for s in found if len(s) == 3) for found in shapes if any(len(s) == 3 for s in found)]
    assert {2, 8} <= set(batches)
    assert batches.count(2) == 1
