"""Routers are trained: rows whose difficulty is known go where they should, prices are paid, collapse is reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile import EecompileError, StrategyError, strategies
from eecompile.errors import CalibrationError
from eecompile.strategies import Branchy, Router, strategy
from eecompile.training.decisions import RouteRow
from eecompile.training.objectives import objective
from eecompile.training.objectives.choices import regret, uneven
from tests.calibration.synthetic import calibrated
from tests.gates.adaptive import Loader, Tower, rows, tower
from tests.support import compiled as eecompile
from tests.support import nightly

OVER = ("blocks.0", "blocks.2")


def trained_tower() -> Tower:
    """Right on easy and on hard rows, so that blocks are worth their price on hard ones alone."""
    model = tower()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            for x, y in Loader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Tower:
    made = trained_tower()
    x, y, _ = rows(512, seed=1)
    assert float((made(x).argmax(1) == y).float().mean()) > 0.97
    return made


def compiled(model: Tower, router: Router, **options):
    return eecompile(model, Branchy(router=router, **options), example_inputs=(rows(4)[0],))


def right(fast, x: Tensor, y: Tensor) -> Tensor:
    return (fast.run(x).output.argmax(1) == y).float()


def test_hard_rows_go_to_a_later_exit(model):
    fast = compiled(model, Router(at="input", to="exits", price=0.3), exits=("embed", "blocks.1"), max_head_share=1e9)
    before = [p.clone() for p in model.parameters()]
    report = fast.fit(Loader(), epochs=8, lr=1e-2, progress=False, val_loader=Loader(256, seed=2))
    assert [row.stage for row in report.rows] == ["every exit"] * 4 + ["exits and router"] * 4
    assert report.rows[-1].loss < report.rows[4].loss
    assert report.collapse is None, str(report)
    assert report.rows[-1].routes.share[0] > 0.3
    x, y, hard = rows(512, seed=1)
    result = fast.run(x)
    assert float((result.route[~hard] == 0).float().mean()) > 0.9
    assert float((result.route[hard] == 0).float().mean()) < 0.1
    assert float(right(fast, x, y).mean()) > 0.95
    assert float(result.cost[~hard].mean()) < float(result.cost[hard].mean())
    found = fast.evaluate(Loader(512, seed=1))
    assert [s.name for s in found.routes] == ["exit_0", "exit_1", "model"]
    assert sum(s.share for s in found.routes) == pytest.approx(1)
    assert found.routes[0].accuracy > 0.95
    assert found.to_dict()["routes"][0]["share"] == found.routes[0].share
    assert "Routes" in str(found)
    shown = fast.explain().to_dict()["routes"]
    assert shown["last_evaluated"][0]["name"] == "exit_0"
    assert "of the rows evaluated last" in str(fast)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_calibration_of_exits_that_rows_are_sent_to(model):
    fast = compiled(model, Router(at="input", to="exits", price=0.3), exits=("embed",), max_head_share=1e9)
    fast.fit(Loader(), epochs=6, lr=1e-2, progress=False)
    report = calibrated(fast, Loader(2048, seed=5), max_drop=0.03)
    assert report.qualified, report.guarantee
    assert report.expected_cost < 1
    x, y, _ = rows(512, seed=1)
    assert float(right(fast, x, y).mean()) > 0.94
    assert fast.temperatures.tolist()[0] == 1.0


@pytest.mark.parametrize(
    "estimator",
    ["regret", "straight_through", *(nightly(e) for e in ("gumbel", "soft", "reinforce"))],
)
def test_hard_rows_take_the_models_own_way(model, estimator):
    router = Router(at="input", to={"light": 0.01}, over=("input", "blocks.2"), price=0.3, estimator=estimator, warm_up=0.4)
    fast = compiled(model, router)
    assert fast.routes[0].left_out == ("blocks.0", "blocks.1", "blocks.2")
    report = fast.fit(Loader(), epochs=10, lr=1e-2, progress=False)
    assert [row.stage for row in report.rows] == ["every branch"] * 4 + ["routed"] * 6
    assert report.rows[3].loss < report.rows[0].loss
    x, y, hard = rows(512, seed=1)
    result = fast.run(x)
    p = fast.observe(x).trace.route_weights[:, 0]
    assert float(p[~hard].mean()) > float(p[hard].mean()), str(report)
    if estimator in (
        "regret",
        "straight_through",
        "reinforce",
    ):  # the other two train on decisions that are not those in use
        to_light = [float((result.route[mine] == 0).float().mean()) for mine in (~hard, hard)]
        assert to_light[0] > 0.9 > 0.1 > to_light[1], str(report)
        assert float(right(fast, x, y).mean()) > 0.9, str(report)
    assert {"cost", "share", "accuracy", "decided", "spread"} == set(report.to_dict()["rows"][0]["routes"])


@pytest.mark.nightly
def test_the_price_decides_how_many_rows_take_the_light_way(model):
    costs = []
    for price in (0.0, 3.0):
        fast = compiled(model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2"), price=price))
        fast.fit(Loader(), epochs=6, lr=1e-2, progress=False)
        costs.append(fast.evaluate(Loader(256, seed=1)).mean_cost)
    assert costs[1] < costs[0] - 0.1


def test_collapse_is_told(model):
    fast = compiled(model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2"), price=50.0))
    report = fast.fit(Loader(512), epochs=4, lr=3e-2, progress=False)
    assert report.collapse == "all rows go to light whatever the input is", str(report)
    assert "Warning: the router collapsed: all rows go to light" in str(report)
    assert RouteRow(0.5, [0.5, 0.5], [1.0, None], [0.5, 0.5]).collapse(["a", "b"]) is None
    assert (
        RouteRow(0.5, [0.5, 0.5], [1.0, None], [0.002, 0.5]).collapse(["a", "b"]) == "all rows go to b whatever the input is"
    )
    constant = RouteRow(0.5, [0.5, 0.5], [1.0, None], [0.5, 0.5], [1e-7, 1e-7])
    assert constant.collapse(["a", "b"]) == "every row has the same probabilities (their spread is 1e-07 at most)"
    assert RouteRow(0.5, [0.5, 0.5], [1.0, None], [0.5, 0.5], [0.2, 0.2]).collapse(["a", "b"]) is None


def test_a_router_that_is_a_constant_has_collapsed(model):
    """Its rounding sends half of the rows each way, so the load looks even."""
    fast = compiled(model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2"), warm_up=0.0))
    with torch.no_grad():
        fast.route_units.unit.score.weight.mul_(1e-3)
        fast.route_units.unit.score.bias.zero_()
    report = fast.fit(Loader(64), epochs=1, lr=1e-9, progress=False)
    assert "every row has the same probabilities" in report.collapse


def test_the_regret_is_that_of_ways_run_by_themselves(model):
    fast = compiled(model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2"), price=0.5))
    x, y, _ = rows(16)
    fast.train()
    fast.gate_mode = "every"
    result = fast.run(x)
    found = objective({"name": "regret", "price": 0.5})(result, y)
    spent = []
    for k, costs in enumerate(fast.route_costs().tolist()):
        fast.set_route_margins([0.0 if k == j else 2.0 for j in range(2)])
        out = fast.observe(x).output
        torch.testing.assert_close(result.trace.route_outputs[k], out)
        spent.append(nn.functional.cross_entropy(out, y, reduction="none") + 0.5 * costs)
    light, full = spent
    better = torch.where(light < full, result.trace.route_weights[:, 0], result.trace.route_weights[:, 1])
    torch.testing.assert_close(found, ((light - full).abs() * -better.log()).mean())
    fast.gate_mode = "hard"
    with pytest.raises(EecompileError, match="needs the loss of every branch"):
        objective("regret")(fast.run(x), y)


def test_the_regret_of_a_router_to_exits_reads_the_exits(model):
    fast = compiled(model, Router(at="input", to="exits"), exits=1, max_head_share=1e9)
    x, y, _ = rows(16)
    fast.train()
    result = fast.run(x)
    assert all(a is b for a, b in zip(result.trace.route_outputs, result.outputs, strict=True))
    spent = [nn.functional.cross_entropy(o, y, reduction="none") for o in result.outputs]
    spent = torch.stack(spent, 1) + 0.5 * result.trace.route_costs
    wanted = regret(result.trace.route_weights, spent)
    torch.testing.assert_close(objective({"name": "regret", "price": 0.5})(result, y), wanted)


def test_the_likeliest_route_has_the_least_expected_loss():
    """Of rows that the router cannot distinguish; three routes."""
    losses = torch.tensor([[0.0, 1.0, 0.2], [2.0, 0.1, 1.0], [0.1, 3.0, 0.4], [0.9, 0.0, 0.3]])
    logits = torch.zeros(3, requires_grad=True)
    for _ in range(300):
        p = torch.softmax(logits, 0).expand(4, 3)
        loss = regret(p, losses)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert int(logits.argmax()) == int(losses.mean(0).argmin()) == 2


def test_an_even_load_costs_least():
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert float(uneven(weights, torch.tensor([0, 1]))) == pytest.approx(1.0)
    assert float(uneven(weights, torch.tensor([0, 0]))) == pytest.approx(2 * 0.55)
    assert float(uneven(weights, torch.tensor([0, -1]))) == pytest.approx(2 * 0.9)  # the second row had left before


def test_a_loop_of_ones_own(model):
    fast = compiled(
        model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2"), price=0.5, estimator="straight_through")
    )
    x, y, _ = rows(16)
    fast.train()
    result = fast.run(x)
    assert result.route.shape == (16,)
    assert result.trace.route_weights.shape == (16, 2)
    loss = fast.loss(result, y)
    plain = nn.functional.cross_entropy(result.outputs[-1], y)
    assert float(loss - plain) == pytest.approx(0.5 * float(result.trace.end_cost.mean()), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in fast.route_units.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_margins(model):
    fast = compiled(model, Router(at="input", to={"light": 0.34}, over=("embed", "blocks.2")))
    fast.set_route_margins(0.25)
    assert [r.margin for r in fast.routes] == [0.25, 0.0]
    fast.set_route_margins({"full": 2.0})
    assert [r.is_open for r in fast.routes] == [True, False]
    for wrong in (-1.0, [0.1], {"dark": 0.5}, {"light": 2.0}):
        with pytest.raises(StrategyError):
            fast.set_route_margins(wrong)
    plain = eecompile(model, Branchy(exits=1, max_head_share=1e9), example_inputs=(rows(4)[0],))
    with pytest.raises(StrategyError, match="no router between branches"):
        plain.set_route_margins(0.5)


def test_options_and_mistakes(model):
    given = Branchy(router=Router(at="input", to={"light": 0.34}, over=OVER))
    assert strategy(given.to_dict()) == given
    assert strategy({"name": "branchy", "router": "exits"}).criterion.name == "routed"
    for wrong, says in (
        ({"to": {}}, "one route has nothing to choose"),
        ({"to": {"full": 0.5}}, "a name of its own"),
        ({"to": {"light": 1.5}}, "a share of the blocks"),
        ({"to": "branches"}, "exits or branches"),
        ({"to": "exits", "over": OVER}, "over= is for branches"),
        ({"to": {"light": 0.5}, "over": ("a",)}, "two cuts"),
        ({"price": -1.0}, "price="),
        ({"warm_up": 1.0}, "warm_up="),
        ({"target_cost": 0.0}, "target_cost="),
        ({"estimator": "magic"}, "unknown estimator"),
    ):
        with pytest.raises(StrategyError, match=says):
            Router(**wrong)
    with pytest.raises(StrategyError, match="no such option"):
        Branchy(router={"where": "input"})
    with pytest.raises(StrategyError, match="no criterion decides"):
        Branchy(router="exits", criterion="margin")
    with pytest.raises(StrategyError, match="needs a router"):
        Branchy(criterion="routed")
    with pytest.raises(StrategyError, match="two strategies insert routes"):
        Branchy(router=Router(to={"light": 0.5})) + Branchy(router=Router(to={"light": 0.5}))
    with pytest.raises(StrategyError, match="parts of one model"):
        strategies.Cascade(router="exits", criterion="max_probability").over(2)
    plain = eecompile(model, Branchy(exits=1, max_head_share=1e9), example_inputs=(rows(4)[0],))
    plain.train()
    result = plain.run(rows(4)[0])
    with pytest.raises(EecompileError, match="no router to train"):
        objective("regret")(result, rows(4)[1])


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (Router(at="blocks.9", to={"light": 0.5}), "no place has the name"),
        (Router(at="blocks.1", to={"light": 0.5}, over=OVER), "branches begin before the router"),
        (Router(at="blocks.2", to={"light": 0.5}, over=("blocks.2", "output")), "no light version of a part without blocks"),
        (Router(at="blocks.0", to={"odd": Wrong()}, over=OVER), "gives another value"),
        (Router(at="blocks.0", to={"odd": nn.Linear(3, 3)}, over=OVER), "does not run on the value"),
        (Router(at="blocks.0", to={"light": 0.5}, over=("blocks.2", "blocks.0")), "is computed from it|begin before"),
        (Router(at="blocks.0", to={"light": 0.5}, unit="conv"), "does not fit the value"),
        (Router(at="blocks.0", to={"light": 0.5}, unit="tree"), "unknown router unit"),
        (Router(at="blocks.2", to="exits"), "an exit lies before the router"),
    ],
)
def test_mistakes_are_named(model, router, says):
    with pytest.raises(StrategyError, match=says):
        compiled(model, router, **({"exits": ("blocks.0",), "max_head_share": 1e9} if router.to_exits else {}))


@pytest.mark.nightly
def test_margins_of_branches_keep_the_promise(model):
    """And with exits in the same graph both promises together keep it."""
    router = Router(at="input", to={"light": 0.01}, over=("input", "blocks.2"), price=0.3)
    for options in ({}, {"exits": ("blocks.2",), "max_head_share": 1e9}):
        fast = compiled(model, router, **options)
        fast.fit(Loader(), epochs=6, lr=1e-2, progress=False)
        report = fast.calibrate(Loader(2048, seed=5), max_drop=0.06)
        routes = report.before[0] if fast.exits else report
        assert routes.qualified, routes.guarantee
        assert routes.expected_cost < 1
        assert routes.routes[0].share > 0.2
        assert "all rows on its own way" in routes.guarantee
        assert report.to_dict()["routes"] is not None
        assert "margin" in str(report) and "light" in str(report)
        assert [r.margin for r in routes.routes] == [r.margin for r in fast.routes]
        x, y, _ = rows(2048, seed=1)
        full = float((model(x).argmax(1) == y).float().mean())
        assert full - float(right(fast, x, y).mean()) <= 0.06
    fast.set_route_margins([0.1, 0.0])
    with pytest.raises(CalibrationError, match="too few batches"):
        fast.calibrate(Loader(64, seed=5))
    report = fast.calibrate(Loader(256, seed=5), max_drop=0.01)
    assert not report.before[0].qualified
    assert fast.route_margins.tolist() == [2.0, 0.0]
    with pytest.raises(CalibrationError):
        fast.calibrate([(x[:8], y[:8] + 7)])
    assert fast.route_margins.tolist() == [2.0, 0.0]
    with pytest.raises(EecompileError, match="gates, branches or halting"):
        fast.evaluate(Loader(), curve=True)
