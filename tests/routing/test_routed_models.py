"""Routers on real models: compact agrees with the reference row by row, only what a row needs runs, nothing is changed."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from eecompile import load, strategies
from eecompile.artifact.files import MANIFEST
from eecompile.strategies import Branchy, Router
from tests.support import CLOSED, Fingerprint, again, both, close, equal_bits, gelu_of, separating, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO

MODELS = ["bert", "gpt2_lm", "hf_resnet", "nn_encoder_sf"]
KINDS = ["exits", "light", "several", "module"]


class Squash(nn.Module):
    """A branch of the user's that hands on what it is given, a little changed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.scale)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    entry = ZOO[request.param]
    args, kwargs = entry.inputs(4)
    made = entry.model()
    before = Fingerprint.of(made)
    fast = eecompile(made, example_inputs=args, example_kwargs=kwargs, **dict(entry.options))
    return entry, fast, made, before


def strategy(kind: str, base) -> Branchy:
    """A router at the first cut that the model offers; the unit's price does not matter on models this small."""
    names = [c.name for c in base.program.cuts if c.is_block]
    start = names[0]
    if kind == "exits":
        return Branchy(exits=(names[1], names[2]), router=Router(at=start, to="exits", unit="linear"), max_head_share=1e9)
    if kind == "light":
        return Branchy(router=Router(at=start, to={"light": 0.5}, unit="linear"))
    if kind == "several":  # with an exit before the branches
        to = {"light": 0.5, "squash": Squash(), "none": 0.01} if len(names) < 5 else {"light": 0.5, "none": 0.01}
        sent = Router(at=start, to=to, over=(names[1], names[-1]), unit="linear")
        return Branchy(exits=(names[0],), router=sent, max_head_share=1e9)
    return Branchy(router=Router(at=start, to={"squash": Squash()}, over=(start, names[1]), unit="linear"))


def routed(kind: str, base, seed: int = 0):
    """Compiled anew, with a router whose probabilities differ from row to row."""
    fast = again(base, strategy(kind, base))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for p in fast.route_units.unit.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return fast


def settings(fast, args, kwargs, rng):
    """Thresholds and margins in gaps between what the router says of these rows, so that rounding decides nothing."""
    seen = fast.observe(*args, **kwargs)
    fast.set_thresholds([separating(c, rng) if rng.random() < 0.8 else CLOSED for c in seen.confidences[:-1]])
    if len(fast.route_margins):
        w = seen.route_weights
        lead = w[:, :-1].max(1).values - w[:, -1]
        at = 2 * separating((lead + 1) / 2, rng) - 1
        fast.set_route_margins([max(at, 0.0)] * (w.shape[1] - 1) + [max(-at, 0.0)])


@pytest.mark.parametrize("kind", KINDS)
def test_compact_agrees_with_the_reference_row_by_row(model, kind):
    entry, base, _, _ = model
    rng, seen = random.Random(3), set()
    fast = routed(kind, base, seed=len(kind))
    for batch in (1, 2, 5, 9):
        args, kwargs = entry.inputs(batch, seed=2)
        for _ in range(3):
            settings(fast, args, kwargs, rng)
            compact, reference = both(fast, *args, **kwargs)
            assert torch.equal(compact.exit_index, reference.exit_index)
            assert torch.equal(compact.route, reference.route)
            assert compact.route.dtype == torch.int64
            torch.testing.assert_close(compact.cost, reference.cost, atol=1e-6, rtol=0)
            close(compact.output, reference.output)
            with torch.no_grad():
                close(fast(*args, **kwargs), reference.output)
            if kind == "exits":
                assert torch.equal(compact.route, compact.exit_index)
            seen.add(tuple(sorted(set(compact.route.tolist()))))
    assert any(len(routes) > 1 for routes in seen), "no batch was ever split"


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_way_is_the_model(model, kind):
    entry, base, made, before = model
    fast = routed(kind, base)
    args, kwargs = entry.inputs(3, seed=4)
    fast.set_thresholds(CLOSED)
    if len(fast.route_margins):
        fast.set_route_margins(CLOSED)
    with torch.no_grad():
        want = list(fast.source_graph(*fast.program.signature.flatten(args, kwargs)))
        compact, reference = both(fast, *args, **kwargs)
    for r in (compact, reference):
        equal_bits(fast.program.signature.flatten_output(r.output), want)
        assert r.route.tolist() == [len(fast.routes) - 1] * 3
        assert r.cost.tolist() == [1.0] * 3
    fast.train()
    fast.run(*args, **kwargs)
    before.check(made)


@pytest.mark.parametrize("kind", ["exits", "several"])
def test_a_saved_program_has_its_router(model, kind, tmp_path):
    entry, base, made, _ = model
    args, kwargs = entry.inputs(5, seed=2)
    options = dict(entry.options)
    fast = eecompile(made, strategy(kind, base), example_inputs=args, example_kwargs=kwargs, **options)
    with torch.no_grad():
        for p in fast.route_units.parameters():
            p.add_(torch.randn_like(p))
    settings(fast, args, kwargs, random.Random(1))
    want = fast.run(*args, **kwargs)
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    got = back.run(*args, **kwargs)
    equal_bits(fast.program.signature.flatten_output(got.output), fast.program.signature.flatten_output(want.output))
    assert torch.equal(got.route, want.route)
    assert torch.equal(got.cost, want.cost)
    assert back.routes == fast.routes
    back.train()  # a router trains after loading too
    back.run(*args, **kwargs).route_weights.square().sum().backward()
    assert all(p.grad is not None for p in back.route_units.unit.parameters())
    branches = sorted(p.name for p in (tmp_path / "program").glob("branch_*"))
    if branches:  # saved again with other weights: the file of before goes, and what a killed save leaves is known as ours
        with torch.no_grad():
            fast.route_units.squash.scale.mul_(2)
        fast.save(tmp_path / "program")
        assert len(set((tmp_path / "program").glob("branch_*"))) == len(branches)
        (tmp_path / "program" / MANIFEST).unlink()
        fast.save(tmp_path / "program")


def bert(router: Router, **options):
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6, seed=3)
    fast = eecompile(entry.model(), Branchy(router=router, **options), example_inputs=args, example_kwargs=kwargs)
    return fast, args, kwargs


def test_only_the_head_of_its_own_exit_runs_for_a_row():
    names = ("bert.encoder.layer.1", "bert.encoder.layer.2")
    fast, args, kwargs = bert(Router(at="bert.encoder.layer.0", unit="linear"), exits=names, head="mlp")
    with torch.no_grad():
        fast.route_units.unit.score.weight.normal_()
    cumulative = fast.observe(*args, **kwargs).confidences[0].sort().values
    fast.set_thresholds([float(cumulative[3] + cumulative[2]) / 2, CLOSED])  # half of the rows go to the first exit
    rows = {name: [] for name in ("exit_0", "exit_1")}
    for segment in (step.segment for plan in [fast._chosen.plan((0,), False)] for step in plan):
        assert (segment.head is not None) == (segment.exit == 0)
    for name in rows:
        fast.branch(name).head.register_forward_hook(lambda m, i, o, name=name: rows[name].append(len(o)))
    result = fast.run(*args, **kwargs)
    assert rows == {"exit_0": [3], "exit_1": []}
    assert sorted(result.route.tolist()) == [0, 0, 0, 2, 2, 2]
    fast.executor = "reference"
    fast.run(*args, **kwargs)
    assert rows == {"exit_0": [3, 6], "exit_1": [6]}, "the reference computes every head"


def test_a_branch_computes_its_own_rows_and_a_closed_one_nothing():
    fast, args, kwargs = bert(Router(at="bert.encoder.layer.0", to={"light": 0.3}, unit="linear"))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fast.route_units.unit.score.weight.normal_()
    assert fast.routes[0].left_out == ("bert.encoder.layer.2", "bert.encoder.layer.3")
    weights = fast.observe(*args, **kwargs).route_weights
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


def test_streams_and_budgets_of_rows_that_are_sent():
    """Stopped before their exit, rows have what the exit that they just passed says; its head runs for them then."""
    names = ("bert.encoder.layer.1", "bert.encoder.layer.2")
    fast, args, kwargs = bert(Router(at="bert.encoder.layer.0", unit="linear"), exits=names)
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


def test_routes_beside_gates():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6, seed=3)
    layers = [f"bert.encoder.layer.{i}" for i in range(4)]
    routes = Branchy(router=Router(at=layers[1], to={"light": 0.5}, unit="linear"))
    gates = strategies.SkipNet(gates=layers[:2], unit="linear", open_bias=0.0)
    sent = strategies.Combined((routes, gates)) if not (routes.stages and gates.stages) else None
    assert sent is None
    fast = eecompile(entry.model(), Both(routes, gates), example_inputs=args, example_kwargs=kwargs)
    with torch.no_grad():
        fast.route_units.unit.score.weight.normal_()
    found = fast.observe(*args, **kwargs)
    fast.set_gate_thresholds([separating(s, random.Random(0)) for s in found.gate_scores.T])
    compact, reference = both(fast, *args, **kwargs)
    assert torch.equal(compact.route, reference.route)
    assert torch.equal(compact.gates, reference.gates)
    torch.testing.assert_close(compact.cost, reference.cost, atol=1e-6, rtol=0)
    close(compact.output, reference.output)


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
