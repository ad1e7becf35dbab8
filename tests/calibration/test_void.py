"""A guarantee names what it was made for, is void after a change, and says so everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from eecompile import load, strategies
from tests.support import compiled as eecompile


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(1200, 8)
    y = model(x).argmax(1)
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_inputs=(x[:4],))
    fast.fit([(x[:400], y[:400])] * 30, lr=1e-2, progress=False)
    rows = [(x[400:], y[400:])]
    report = fast.calibrate(rows, max_drop=0.1)
    assert report.qualified, str(report)
    return fast, rows


def test_it_holds_until_something_changes(made, tmp_path):
    fast, rows = made
    assert fast.guarantee.void(fast) == ""
    assert "With probability at least 95%" in str(fast)
    assert fast.evaluate(rows).guarantee == fast.guarantee.text
    assert fast.explain().to_dict()["guarantee"]["void"] is None
    json.dumps(fast.guarantee.to_dict(), allow_nan=False)
    fast.executor = "reference"  # agrees with the others
    assert fast.guarantee.void(fast) == ""
    fast.executor = "auto"
    fast.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.guarantee == fast.guarantee
    assert again.guarantee.void(again) == ""
    settings = fast.settings
    fast.settings = fast.settings.from_dict(fast.guarantee.safer[0]) if fast.guarantee.safer else settings
    assert fast.guarantee.void(fast) == ""
    fast.settings = settings


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda fast: fast.set_thresholds(0.5), "other settings than were calibrated"),
        (lambda fast: next(fast.head_parameters()).data.view(-1)[0].add_(1.0), None),
        (lambda fast: setattr(fast, "backend", "inductor"), "backend: inductor now, eager then"),
        (lambda fast: torch.nn.init.zeros_(next(fast.head_parameters())), "the weights have changed"),
    ],
)
def test_a_change_makes_it_void_and_that_is_said(made, change, why, tmp_path):
    fast, rows = made
    settings, weights = fast.settings, {k: v.clone() for k, v in fast.state_dict().items()}
    try:
        change(fast)
        if why is None:  # written past autograd's counter: seen after saving, at the latest
            fast.save(tmp_path / "p")
            fast, why = load(tmp_path / "p"), "the weights have changed"
        assert why in fast.guarantee.void(fast)
        assert f"The guarantee is void: {why}" in str(fast)
        assert why in fast.explain().to_dict()["guarantee"]["void"]
        assert "void" in fast.evaluate(rows).guarantee and "void" in str(fast.evaluate(rows))
        if why.startswith("the weights"):
            fast.save(tmp_path / "q")
            again = load(tmp_path / "q")
            assert why in again.guarantee.void(again)
    finally:
        made[0].backend = "eager"
        made[0].load_state_dict(weights)
        made[0].settings = settings
        assert made[0].guarantee.void(made[0]) == ""


def test_without_a_guarantee_nothing_is_said(made):
    fast, rows = made
    guarantee, settings = fast.guarantee, fast.settings
    fast.calibrate(rows, max_drop=0.1, delta=None)
    assert fast.guarantee is None and fast.evaluate(rows).guarantee is None
    assert "guarantee" not in str(fast)
    fast.guarantee, fast.settings = guarantee, settings
