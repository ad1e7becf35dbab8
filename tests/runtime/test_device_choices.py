"""Device programs of regions with widths and of routers between branches: each width and branch runs its own rows."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile import eecompile
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.machine import Simulator
from eecompile.runtime.device.nodes import Call, Empty, OpenRows, Switch
from eecompile.strategies import Branchy, Router, SelfAdaptive
from tests.routing.test_routed_models import Squash, settings
from tests.runtime.devices import reference, simulated
from tests.support import CLOSED, again, same_result, separating
from tests.zoo import ZOO

SIZES = ((1, "nested"), (6, "nested"), (9, "machine"))
LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]


def routed(bert, kind: str):
    """A router behind the embeddings whose probabilities differ from row to row."""
    if kind == "light":
        strategy = Branchy(router=Router(at=LAYERS[0], to={"light": 0.5}, unit="linear"))
    else:  # an exit before the branches, and the user's own among them
        sent = Router(at=LAYERS[0], to={"squash": Squash(), "none": 0.01}, over=(LAYERS[1], LAYERS[2]), unit="linear")
        strategy = Branchy(exits=(LAYERS[0],), router=sent, max_head_share=1e9)
    fast = again(bert, strategy)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for p in fast.route_units.unit.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return fast


@pytest.mark.parametrize("kind", ["light", "several"])
def test_branches_of_a_router_agree_with_the_reference(bert, kind):
    fast, rng, seen = routed(bert, kind), random.Random(4), set()
    for batch, structure in SIZES:
        fast.device_options = Options(structure=structure)
        args, kwargs = ZOO["bert"].inputs(batch, seed=2)
        for _ in range(2):
            settings(fast, args, kwargs, rng)
            got, want = simulated(fast, **kwargs), reference(fast, **kwargs)
            same_result(got, want)
            assert torch.equal(got.route, want.route)
            torch.testing.assert_close(got.cost, want.cost, atol=1e-6, rtol=0)
            seen.add(len(set(got.route.tolist())))
    assert max(seen) > 1
    report = fast.check_no_sync()
    assert report.ok, str(report)


def adaptive(exits=2):
    entry = ZOO["bert"]
    _, kwargs = entry.inputs(4)
    strategy = SelfAdaptive(exits=exits, widths=(0.25, 0.5, 1.0), parts="mlp", open_bias=0.0, always_on=("*layer.2*",))
    return eecompile(entry.model(), strategy, example_kwargs=kwargs)


def scattered(fast, kwargs, rng):
    """Thresholds at which widths differ from row to row."""
    fast.set_thresholds(CLOSED)
    fast.set_gate_thresholds(0.0)
    found = fast.observe(**kwargs).gate_scores
    fast.set_gate_thresholds([rng.choice([0.0, CLOSED, *[separating(s, rng)] * 6]) for s in found.T])
    confidences = fast.observe(**kwargs).confidences[:-1]
    fast.set_thresholds([separating(c, rng) if rng.random() < 0.5 else CLOSED for c in confidences])


def test_widths_agree_with_the_reference():
    fast, rng, seen = adaptive(), random.Random(1), set()
    for batch, structure in SIZES:
        fast.device_options = Options(structure=structure)
        _, kwargs = ZOO["bert"].inputs(batch, seed=6)
        for _ in range(2):
            scattered(fast, kwargs, rng)
            got, want = simulated(fast, **kwargs), reference(fast, **kwargs)
            same_result(got, want)
            assert torch.equal(got.widths, want.widths)
            torch.testing.assert_close(got.cost, want.cost, atol=1e-6, rtol=0)
            seen |= set(got.widths.flatten().tolist())
    assert len(seen) >= 3
    report = fast.check_no_sync()
    assert report.ok, str(report)


class Counting(Simulator):
    """Keeps the shapes that straight code is called with."""

    def node(self, node):
        if isinstance(node, Call):
            self.shapes.append([tuple(v.shape) for n in node.inputs if hasattr(v := self.values[n], "shape")])
        super().node(node)


def test_each_branch_runs_the_bucket_of_its_rows(bert, monkeypatch):
    """Five rows one way and two the other: bodies of 8 and 2 rows, however they lie in the batch."""
    fast = routed(bert, "light")
    _, kwargs = ZOO["bert"].inputs(8, seed=2)
    weights = fast.observe(**kwargs).route_weights
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
