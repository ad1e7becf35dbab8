"""Exits that answer together: which of them do, and models captured as blocks."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile import strategies
from eecompile.kernels.combine import ensemble
from tests.gates.adaptive import rows, tower
from tests.kinds import WHERE
from tests.support import (
    CLOSED,
    GAP,
    again,
    both,
    close,
    random_thresholds,
    same_result,
)
from tests.support import compiled as eecompile
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def combined(zoo):
    kept = {}

    def get(name, combine, criterion="max_probability"):
        key = (name, combine, criterion)
        if key not in kept:
            head = strategies.Branchy(exits=ZOO[name].exits, combine=combine, criterion=criterion)
            kept[key] = again(zoo(name).fast, head)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in kept[key].combination.parameters():
                    p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        return kept[key]

    return get


def test_the_answer_is_that_of_the_open_exits(combined):
    fast = combined("bert", "ensemble")
    args, kwargs = ZOO["bert"].inputs(6, seed=4)
    fast.set_thresholds([1.0, CLOSED, 1.0 + 0 * GAP])
    seen = fast.observe(*args, **kwargs)
    with torch.no_grad():
        r = fast.run(*args, **kwargs, budget=float(fast.costs([True, False, True])[2]))
    assert r.exit_index.tolist() == [2] * 6
    _, state = ensemble(seen.trace.separate[0], None)
    want, _ = ensemble(seen.trace.separate[2], state)
    close(fast.prediction_of(r.output), want)
    assert len(seen.trace.separate) == 4


def test_the_surest_exits_confidence_never_falls(combined):
    fast = combined("hf_resnet", "confident")
    args, kwargs = ZOO["hf_resnet"].inputs(6, seed=1)
    fast.set_thresholds(1.0)
    with torch.no_grad():
        found = torch.stack([r.confidence for r in fast.stream(*args, **kwargs)][:-1])
    assert bool((found[1:] >= found[:-1]).all())


@pytest.mark.parametrize("combine", ["ensemble", "confident", "weighted"])
def test_models_captured_as_blocks(combine):
    x = rows(6)[0]
    strategy = strategies.Branchy(**WHERE, combine=combine, criterion="max_probability", threshold=1.0)
    fast = eecompile(tower(4), strategy, example_inputs=(x,), capture="blocks")
    rng = random.Random(5)
    for _ in range(4):
        fast.set_thresholds(random_thresholds(fast.observe(x).confidences[:-1], rng, closed=0.0))
        same_result(*both(fast, x))
        fast.set_thresholds(1.0)
