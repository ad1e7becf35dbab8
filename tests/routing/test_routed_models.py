"""Routers on real models: only what a row needs runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from eecompile import CompiledModule, load, strategies
from eecompile.artifact.files import MANIFEST
from eecompile.strategies import Branchy, Router
from tests.compositions import Squash
from tests.gates.adaptive import rows, tower
from tests.support import CLOSED, again, agree, close, gelu_of, run_by, same_result, separating, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO


def test_branches_are_saved_again_with_other_weights(zoo, tmp_path):
    """The file of before goes, and what a killed save leaves is known as the program's."""
    layers = [f"bert.encoder.layer.{i}" for i in range(3)]
    fast, _, _ = bert(zoo, Router(at=layers[0], to={"squash": Squash()}, over=(layers[0], layers[2]), unit="linear"))
    place = tmp_path / "program"
    fast.save(place)
    branches = sorted(place.glob("branch_*"))
    assert branches
    with torch.no_grad():
        fast.route_units.branch_squash.scale.mul_(2)
    fast.save(place)
    again = sorted(place.glob("branch_*"))
    assert len(again) == len(branches)
    assert again != branches
    (place / MANIFEST).unlink()
    fast.save(place)


def bert(zoo, router: Router, **options):
    base = zoo("bert").fast
    fast = again(base, Branchy(router=router, **options))
    fast.origin.exported = base.origin.exported  # what `again` leaves out
    return fast, *ZOO["bert"].inputs(6, seed=3)


def test_only_the_head_of_its_own_exit_runs_for_a_row(zoo):
    names = ("bert.encoder.layer.1", "bert.encoder.layer.2")
    fast, args, kwargs = bert(zoo, Router(at="bert.encoder.layer.0", unit="linear"), exits=names, head="mlp")
    with torch.no_grad():
        fast.route_units.unit.score.weight.normal_()
    cumulative = fast.observe(*args, **kwargs).confidences[0].sort().values
    fast.set_thresholds([float(cumulative[3] + cumulative[2]) / 2, CLOSED])  # half of the rows go to the first exit
    rows = {name: [] for name in ("exit_0", "exit_1")}
    for segment in (step.segment for plan in [fast.engine.chosen.plan((0,), False)] for step in plan):
        assert (segment.head is not None) == (segment.exit == 0)
    for name in rows:
        fast.branch(name).head.register_forward_hook(lambda m, i, o, name=name: rows[name].append(len(o)))
    result = fast.run(*args, **kwargs)
    assert rows == {"exit_0": [3], "exit_1": []}
    assert sorted(result.route.tolist()) == [0, 0, 0, 2, 2, 2]
    fast.executor = "reference"
    fast.run(*args, **kwargs)
    assert rows == {"exit_0": [3, 6], "exit_1": [6]}, "the reference computes every head"


def test_a_branch_computes_its_own_rows_and_a_closed_one_nothing(zoo):
    fast, args, kwargs = bert(zoo, Router(at="bert.encoder.layer.0", to={"light": 0.3}, unit="linear"))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fast.route_units.unit.score.weight.normal_()
    assert fast.routes[0].left_out == ("bert.encoder.layer.2", "bert.encoder.layer.3")
    weights = fast.observe(*args, **kwargs).trace.route_weights
    lead = (weights[:, 0] - weights[:, 1]).sort().values
    between = float(lead[3] + lead[2]) / 2
    fast.set_route_margins({"light": max(between, 0.0), "full": max(-between, 0.0)})
    seen = watch(lambda: fast(*args, **kwargs))
    assert sorted(shape[0] for shape in gelu_of(seen)) == [3, 3, 3, 3, 6]  # the first block; of the light way one; three
    cost = fast.run(*args, **kwargs).cost
    assert float(cost.min()) < 0.6 < 1.0 < float(cost.max()) < 1.1
    fast.set_route_margins({"light": 0.0, "full": CLOSED})
    seen = watch(lambda: fast(*args, **kwargs))
    assert [shape[0] for shape in gelu_of(seen)] == [6, 6]
    assert seen.ops["index_select"] == seen.ops["index_copy_"] == 0
    fast.set_route_margins(CLOSED)
    closed = watch(lambda: fast(*args, **kwargs)).ops["addmm"]
    assert closed == watch(lambda: fast.full(*args, **kwargs)).ops["addmm"], "with one route open the router does not run"


def test_whole_models_beside_the_model():
    """A router at the input sends rows to another model altogether."""
    entry = ZOO["hf_resnet"]
    args, kwargs = entry.inputs(6, seed=3)
    made = entry.model()
    classes = made.config.num_labels

    class Small(nn.Sequential):
        pass

    small = Small(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, classes))
    router = Router(at="input", to={"small": small}, over=("input", "output"), unit="linear")
    fast = eecompile(made, Branchy(router=router), example_inputs=args, example_kwargs=kwargs)
    fast.set_route_margins({"small": 0.0, "full": CLOSED})
    with torch.no_grad():
        got = fast.prediction_of(fast(*args, **kwargs))
        want = small(kwargs["pixel_values"] if kwargs else args[0])
    close(got, want)
    assert {id(p) for p in small.parameters()}.isdisjoint(id(p) for p in fast.parameters()), "it is copied"


def test_streams_and_budgets_of_rows_that_are_sent(zoo):
    """Stopped before their exit, rows have what the exit that they just passed says; its head runs for them then."""
    names = ("bert.encoder.layer.1", "bert.encoder.layer.2")
    fast, args, kwargs = bert(zoo, Router(at="bert.encoder.layer.0", unit="linear"), exits=names)
    with torch.no_grad():
        fast.route_units.unit.score.weight.normal_(std=0.3)
    cumulative = fast.observe(*args, **kwargs).confidences[0].sort().values
    fast.set_thresholds([float(cumulative[3] + cumulative[2]) / 2, CLOSED])
    outcomes = {}
    for name in ("compact", "reference"):
        fast.executor = name
        with torch.no_grad():
            streamed = list(fast.stream(*args, **kwargs))
            outcomes[name] = [*streamed, fast.run(*args, **kwargs, budget=float(fast.costs([True, False])[0]) + 1e-4)]
    for a, b in zip(outcomes["compact"], outcomes["reference"], strict=True):
        close(fast.prediction_of(a.output), fast.prediction_of(b.output))
        assert torch.equal(a.exit_index, b.exit_index)
        assert torch.equal(a.final, b.final)
    assert outcomes["compact"][-1].stopped == "budget"


def test_routes_beside_gates(zoo):
    args, kwargs = ZOO["bert"].inputs(6, seed=3)
    layers = [f"bert.encoder.layer.{i}" for i in range(4)]
    routes = Branchy(router=Router(at=layers[1], to={"light": 0.5}, unit="linear"))
    gates = strategies.SkipNet(gates=layers[:2], unit="linear", open_bias=0.0)
    fast = again(zoo("bert").fast, Both(routes, gates))
    with torch.no_grad():
        fast.route_units.unit.score.weight.normal_()
    found = fast.observe(*args, **kwargs)
    fast.set_gate_thresholds([separating(s, random.Random(0)) for s in found.trace.gate_scores.T])
    agree(fast, args, kwargs)


class Both(strategies.Strategy):
    """Routes of one strategy and gates of another, for tests: trained, they would need stages of their own."""

    name = "both"

    def __init__(self, routes: strategies.Strategy, gates: strategies.Strategy) -> None:
        object.__setattr__(self, "parts", (routes, gates))

    def recipe(self) -> strategies.Recipe:
        routes, gates = self.parts  # type: ignore[attr-defined]
        return strategies.Recipe(gates=gates.recipe().gates, routes=routes.recipe().routes)

    @property
    def objective(self) -> dict[str, object]:
        return {"name": "exits"}


def routed_tower(strategy: Branchy) -> tuple[CompiledModule, torch.Tensor]:
    """A tower whose router sends rows both ways."""
    x = rows(32)[0]
    fast = eecompile(tower(4), strategy, example_inputs=(x,))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        fast.route_units.unit.score.weight.normal_(std=3.0)
    return fast, x


def as_elsewhere(fast: CompiledModule, x: torch.Tensor, place: Path) -> None:
    """Every executor and the saved program give one result, in which rows went more than one way."""
    want = run_by("reference", fast, x)
    assert len(want.route.unique()) > 1
    for name in ("compact", "simulate"):
        same_result(run_by(name, fast, x), want)
    fast.save(place)
    same_result(run_by("reference", load(place), x), want)


@pytest.mark.parametrize("exits", [("blocks.0",), ("blocks.0", "blocks.2")])
def test_an_exit_at_the_place_that_the_router_reads(exits, tmp_path):
    fast, x = routed_tower(Branchy(exits=exits, router=Router(at="blocks.0"), max_head_share=9.0))
    as_elsewhere(fast, x, tmp_path / "program")
    fast.fit([(x, rows(32)[1])], epochs=2, trunk=True, progress=False)


@pytest.mark.parametrize("name", ["half", "train", "class", "training"])
@pytest.mark.parametrize("what", [0.5, nn.Identity()], ids=["light", "module"])
def test_a_branch_may_have_a_name_that_modules_or_python_use(name, what, tmp_path):
    over = None if isinstance(what, float) else ("blocks.0", "blocks.1")
    fast, x = routed_tower(Branchy(exits=0, router=Router(at="blocks.0", to={name: what}, over=over, unit="linear")))
    fast.set_route_margins({name: 0.01})
    as_elsewhere(fast, x, tmp_path / "program")
