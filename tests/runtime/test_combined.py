"""Exits that answer together: every executor agrees, whatever is open; saved, streamed and stopped like any others."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile import load, strategies
from eecompile.kernels.combine import ensemble
from tests.support import (
    CLOSED,
    GAP,
    again,
    both,
    close,
    equal_bits,
    executor,
    patience_thresholds,
    random_thresholds,
    same_result,
)
from tests.support import compiled as eecompile
from tests.zoo import ZOO

MODELS = ("bert", "resnet110", "gpt2_lm")
CASES = [
    (model, combine, criterion)
    for model in MODELS
    for combine in ("ensemble", "confident", "weighted")
    for criterion in ("max_probability", "patience", "learned")
    if not (combine != "ensemble" and criterion == "patience" and model != "bert")
]


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


@pytest.mark.parametrize(("name", "combine", "criterion"), CASES)
def test_compact_agrees_with_the_reference(combined, name, combine, criterion):
    fast = combined(name, combine, criterion)
    args, kwargs = ZOO[name].inputs(6, seed=4)
    rng = random.Random(3)
    left = set()
    for _ in range(6):
        if criterion == "patience":
            fast.set_thresholds(patience_thresholds(3, 2, rng))
        else:  # which exits are open moves the confidences: thresholds for those that are
            closed = [rng.random() < 0.3 for _ in range(3)]
            fast.set_thresholds([CLOSED if c else 0.0 for c in closed])
            found = fast.observe(*args, **kwargs).confidences[:-1]
            values = random_thresholds(found, rng, closed=0.0)
            fast.set_thresholds([CLOSED if c else v for c, v in zip(closed, values, strict=True)])
        compact, reference = both(fast, *args, **kwargs)
        same_result(compact, reference)
        left |= set(compact.exit_index.tolist())
        with torch.no_grad():
            streamed = list(fast.stream(*args, **kwargs))
            with executor(fast, "reference"):
                wanted = list(fast.stream(*args, **kwargs))
        assert len(streamed) == len(wanted)
        for got, want in zip(streamed, wanted, strict=True):
            same_result(got, want)
    assert len(left) > 1


def test_the_answer_is_that_of_the_open_exits(combined):
    fast = combined("bert", "ensemble")
    args, kwargs = ZOO["bert"].inputs(6, seed=4)
    fast.set_thresholds([1.0, CLOSED, 1.0 + 0 * GAP])
    seen = fast.observe(*args, **kwargs)
    with torch.no_grad():
        r = fast.run(*args, **kwargs, budget=float(fast.costs([True, False, True])[2]))
    assert r.exit_index.tolist() == [2] * 6
    _, state = ensemble(seen.separate[0], None)
    want, _ = ensemble(seen.separate[2], state)
    close(fast.prediction_of(r.output), want)
    assert len(seen.separate) == 4


def test_the_models_own_end_answers_for_itself(combined, zoo):
    for combine in ("ensemble", "confident", "weighted"):
        fast = combined("vit", combine)
        args, kwargs = ZOO["vit"].inputs(5, seed=1)
        with torch.no_grad():
            want = zoo("vit").model(*args, **kwargs)
            for thresholds in (CLOSED, 1.0):
                fast.set_thresholds(thresholds)
                r = fast.run(*args, **kwargs)
                assert r.exit_index.tolist() == [3] * 5
                equal_bits(r.output, want)


def test_the_surest_exits_confidence_never_falls(combined):
    fast = combined("resnet110", "confident")
    args, kwargs = ZOO["resnet110"].inputs(6, seed=1)
    fast.set_thresholds(1.0)
    with torch.no_grad():
        found = torch.stack([r.confidence for r in fast.stream(*args, **kwargs)][:-1])
    assert bool((found[1:] >= found[:-1]).all())


@pytest.mark.parametrize("combine", ["ensemble", "confident", "weighted"])
def test_saved_and_loaded(combined, zoo, combine, tmp_path):
    fast = combined("vit", combine)
    args, kwargs = ZOO["vit"].inputs(5, seed=1)
    fast.set_thresholds([0.3, 0.6, 0.5])
    fast.artifact["eval"] = zoo("vit").fast.artifact["eval"]  # what `again` leaves out
    fast.save(tmp_path / "program")
    same = load(tmp_path / "program")
    assert same.strategy == fast.strategy
    with torch.no_grad():
        for a, b in zip(same.stream(*args, **kwargs), fast.stream(*args, **kwargs), strict=True):
            same_result(a, b)


@pytest.mark.parametrize("combine", ["ensemble", "confident", "weighted"])
def test_models_captured_as_blocks(zoo, combine):
    animal = zoo("bert")
    args, kwargs = animal.entry.inputs(6, seed=4)
    strategy = strategies.Branchy(exits=3, combine=combine, criterion="max_probability", threshold=1.0)
    fast = eecompile(animal.model, strategy, example_inputs=args, example_kwargs=kwargs, capture="blocks")
    rng = random.Random(5)
    for _ in range(4):
        found = fast.observe(*args, **kwargs).confidences[:-1]
        fast.set_thresholds(random_thresholds(found, rng, closed=0.0))
        compact, reference = both(fast, *args, **kwargs)
        same_result(compact, reference)
        fast.set_thresholds(1.0)
