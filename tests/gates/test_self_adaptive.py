"""Self-adaptive inference: one policy over halves and blocks, with exits, trained from the last part on."""

from __future__ import annotations

import pytest
import torch

from eecompile import StrategyError
from eecompile.passes.training_decisions import TrainMode
from eecompile.strategies import SelfAdaptive
from tests.gates.adaptive import Loader, rows, tower
from tests.support import CLOSED, nightly, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO


@pytest.fixture(scope="module", params=["vit", "hf_resnet"])
def model(request):
    entry = ZOO[request.param]
    args, kwargs = entry.inputs(4)
    fast = eecompile(
        entry.model(), SelfAdaptive(open_bias=0.0), example_inputs=args, example_kwargs=kwargs, **dict(entry.options)
    )
    return request.param, entry, fast


def scores(fast, args, kwargs):
    fast.set_gate_thresholds(0.0)
    return fast.observe(*args, **kwargs).trace.gate_scores


def test_one_policy_scores_every_part(model):
    name, entry, fast = model
    kinds = {g.kind for g in fast.gates}
    assert kinds == ({"attention", "mlp"} if name == "vit" else {"block"})
    assert len(list(fast.gate_units.children())) == 1
    assert len(fast.exits) == 2
    fast.set_thresholds(CLOSED)
    fast.set_gate_thresholds(1e-9)
    args, kwargs = entry.inputs(3)
    seen = watch(lambda: fast(*args, **kwargs)).ops
    fast.set_gate_thresholds(0.0)
    free = watch(lambda: fast(*args, **kwargs)).ops
    assert seen["sigmoid"] - free["sigmoid"] == 1
    assert (fast.run(*args, **kwargs).steps is None) == (name == "vit")


def test_a_curriculum_frees_the_last_parts_first(model):
    _, entry, fast = model
    args, kwargs = entry.inputs(4)
    fast.set_gate_thresholds(0.5)
    fast.train_mode = TrainMode(gates="sample", kept_open=len(fast.gates) - 2)
    fast.train()
    torch.manual_seed(0)
    drawn = torch.cat([fast.run(*args, **kwargs).gates for _ in range(6)])
    result = fast.run(*args, **kwargs)
    fast.eval()
    fast.train_mode = TrainMode()
    assert bool((drawn[:, :-2] == 1).all())
    assert 0 < float(drawn[:, -2:].mean()) < 1
    assert result.trace.gates_free.tolist() == [[False] * (len(fast.gates) - 2) + [True] * 2] * 4


def test_stages_come_down_to_the_target():
    stages = SelfAdaptive(target_cost=0.4, curriculum=3).stages
    assert [stage.kept_open for stage in stages] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0]
    assert [stage.objective["target"] for stage in stages] == [pytest.approx(0.8), pytest.approx(0.6), pytest.approx(0.4)]
    assert {stage.gate_mode for stage in stages} == {"gumbel"}
    assert [s.objective["name"] for s in SelfAdaptive(estimator="reinforce", curriculum=1).stages] == ["reinforce"]


def test_a_share_of_the_rows_runs_every_part(model):
    _, entry, fast = model
    share = SelfAdaptive(full_share=0.5).stages[-1].full_share
    assert share == 0.5
    args, kwargs = entry.inputs(4)
    fast.set_gate_thresholds(0.5)
    fast.train_mode = TrainMode(gates="sample", full_share=share)
    fast.train()
    torch.manual_seed(0)
    runs = [fast.run(*args, **kwargs) for _ in range(6)]
    fast.eval()
    fast.train_mode = TrainMode()
    drawn = torch.stack([result.gates for result in runs])
    assert bool((drawn[:, :2] == 1).all())
    assert 0 < float(drawn[:, 2:].mean()) < 1
    assert not runs[0].trace.gates_free[:2].any()


@pytest.mark.parametrize("estimator", ["gumbel", nightly("reinforce")])
def test_the_policy_meets_its_target_and_keeps_the_task(estimator):
    x, y, _ = rows(512, seed=1)
    recipe = SelfAdaptive(exits=None, curriculum=2, target_cost=0.6, estimator=estimator)
    fast = eecompile(tower(4), recipe, example_inputs=(x[:4],))
    report = fast.fit(Loader(), epochs=8, lr=1e-2, trunk_lr=1e-2, progress=False)
    assert [row.stage for row in report.rows] == ["the last 1/2 of the parts"] * 4 + ["all parts"] * 4
    result = fast.run(x)
    assert float((result.output.argmax(1) == y).float().mean()) > 0.93
    assert abs(float(result.cost.mean()) - 0.6) < 0.15
    assert fast.train_mode.kept_open == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "score"}, "unknown estimator"),
        ({"curriculum": 0}, "curriculum= is a whole number"),
        ({"min_open": -1}, "min_open= is a whole number"),
        ({"full_share": 1.0}, "full_share= is a share"),
        ({"full_share": "half"}, "full_share= is a share"),
        ({"target_cost": 1.5}, "fraction of the model's cost"),
        ({"gate_threshold": -0.1}, "threshold is 0 or more"),
        ({"exits": 0}, "at least one exit"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(StrategyError, match=says):
        SelfAdaptive(**options)
