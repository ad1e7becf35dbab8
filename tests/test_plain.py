"""Numbers of NumPy and torch wherever a number goes: the same as Python's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from eecompile import CompiledModule, EecompileError, eecompile, strategies
from eecompile.criteria import Patience
from eecompile.plain import plain
from tests.capture.nets import CLASSES, Net, compiled, made, rows
from tests.support import equal_bits


@pytest.fixture(scope="module")
def fast() -> CompiledModule:
    return compiled(made(Net), rows(4))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor(0.5), 0.5),
        ((np.float32(0.5), "a"), (0.5, "a")),
        ({"a": np.int64(1)}, {"a": 1}),
        ("every-block", "every-block"),
        (None, None),
    ],
)
def test_a_plain_number(value, wanted):
    found = plain(value)
    assert found == wanted
    assert type(found) is type(wanted)


def test_what_holds_no_numbers_stays_the_same_object():
    for value in ([(rows(2), rows(2))], rows(3), object(), {"a": rows(2)}):
        assert plain(value) is value


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda: strategies.Branchy(exits=np.int64(2)), lambda: strategies.Branchy(exits=2)),
        (lambda: strategies.Branchy(exits=np.float64(0.5)), lambda: strategies.Branchy(exits=0.5)),
        (lambda: strategies.Branchy(exits=np.array([0.25, 0.5])), lambda: strategies.Branchy(exits=[0.25, 0.5])),
        (
            lambda: strategies.Branchy(exits=2, threshold=np.array([0.5, 0.75]), distillation=np.float32(0.5)),
            lambda: strategies.Branchy(exits=2, threshold=[0.5, 0.75], distillation=0.5),
        ),
        (lambda: strategies.Branchy(threshold=torch.tensor(0.5)), lambda: strategies.Branchy(threshold=0.5)),
        (lambda: strategies.Act(max_steps=np.int32(3)), lambda: strategies.Act(max_steps=3)),
        (lambda: strategies.SkipNet(min_open=np.int64(1)), lambda: strategies.SkipNet(min_open=1)),
        (lambda: strategies.SkipNet(threshold=np.float32(0.25)), lambda: strategies.SkipNet(threshold=0.25)),
        (
            lambda: strategies.SelfAdaptive(gate_threshold=np.float32(0.25)),
            lambda: strategies.SelfAdaptive(gate_threshold=0.25),
        ),
        (
            lambda: strategies.Router(to={"light": np.float32(0.5)}, warm_up=np.float32(0.25)),
            lambda: strategies.Router(to={"light": 0.5}, warm_up=0.25),
        ),
        (lambda: Patience(exits_in_agreement=np.int64(3)), lambda: Patience(exits_in_agreement=3)),
    ],
)
def test_options(given, wanted):
    assert given() == wanted()
    if isinstance(given(), strategies.Strategy):
        assert json.dumps(given().to_dict()) == json.dumps(wanted().to_dict())


def test_compiling_fitting_and_calibrating():
    x, y = rows(16), torch.arange(16) % CLASSES
    fast = eecompile(
        made(Net),
        strategies.Branchy(exits=np.int64(1)),
        example_inputs=(x,),
        seed=np.int64(3),
        batch_axis=np.int64(0),
        prediction=np.int64(0),
    )
    fast.fit([(x, y)], epochs=np.int64(1), lr=np.float32(1e-3), seed=np.int64(0), progress=False)
    fast.calibrate([(x, y)], max_drop=np.float32(0.5), delta=torch.tensor(0.5), seed=np.int32(0))
    fast.calibrate([(x, y)], budget=np.float32(0.9))
    fast.budget_curve([(x, y)], budgets=np.array([0.5, 1.0]))
    fast.evaluate([(x, y)], curve=np.int64(3))
    with pytest.raises(EecompileError, match="epochs is not a whole number"):
        fast.fit([(x, y)], epochs=np.float32(1.5))


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, np.array])
def test_limits_of_a_call(fast, number):
    fast.set_thresholds(1.0)
    x = rows(3)
    with torch.no_grad():
        equal_bits(fast(x, deadline_ms=number(1e6), budget=number(1.0)), fast(x, deadline_ms=1e6, budget=1.0))
    with pytest.raises(EecompileError, match="budget= is a number"):
        fast(x, budget=number(float("nan")))
    with pytest.raises(EecompileError, match="deadline_ms= is a number"):
        fast(x, deadline_ms=np.array([1.0, 2.0]))
