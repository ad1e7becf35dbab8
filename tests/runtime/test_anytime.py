"""Streams and budgets against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile.errors import StrategyError
from tests.support import CLOSED, close, executor, nightly, random_thresholds, same_result, watch

MODELS = ("hf_resnet", "gpt2_lm", nightly("lstm"), nightly("msdnet"))
STAYS = 1.0  # an open exit that no row of an untrained model leaves at


def call(animal, batch=5, seed=2):
    return animal.entry.inputs(batch, seed=seed)


def thresholds_for(animal, args, kwargs, seed, closed=0.25):
    confidences = animal.fast.observe(*args, **kwargs).confidences[:-1]
    return random_thresholds(confidences, random.Random(seed), closed)


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_computes_only_what_is_asked_for(zoo):
    fast = zoo("bert").fast
    args, kwargs = call(zoo("bert"))
    fast.set_thresholds(STAYS)

    def first(count):
        stream = fast.stream(*args, **kwargs)
        for _ in range(count):
            next(stream)
        stream.close()

    products = [watch(lambda n=n: first(n)).ops["addmm"] for n in range(5)]
    assert products[0] == 0, "a stream that is not read computes something"
    steps = [b - a for a, b in zip(products, products[1:], strict=False)]
    assert all(s > 0 for s in steps)
    assert products[-1] == watch(lambda: fast.run(*args, **kwargs)).ops["addmm"]
    assert not fast.engine.chosen._running, "a closed stream is still taken for a running call"


def test_earlier_results_of_a_stream_stay_as_they_were(zoo):
    animal = zoo("hf_resnet")
    args, kwargs = call(animal, 8)
    animal.fast.set_thresholds(thresholds_for(animal, args, kwargs, 1, closed=0.0))
    with torch.no_grad():
        seen = [(r, animal.fast.prediction_of(r.output).clone()) for r in animal.fast.stream(*args, **kwargs)]
    for r, then in seen:
        assert torch.equal(animal.fast.prediction_of(r.output), then)


def test_an_exception_of_the_consumer_ends_the_stream(zoo):
    animal = zoo("bert")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)

    def consume():
        for r in animal.fast.stream(*args, **kwargs):
            raise LookupError(r.stopped)

    with pytest.raises(LookupError):
        consume()
    assert not animal.fast.engine.chosen._running
    with torch.no_grad():
        assert bool(animal.fast.run(*args, **kwargs).final.all())


def test_logits_that_are_no_numbers_never_end_a_row(zoo):
    animal = zoo("lenet")
    fast = animal.fast
    args, kwargs = call(animal)
    fast.set_thresholds(0.0)
    bias = next(p for n, p in fast.branch("exit_0").named_parameters() if n.endswith("bias"))
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.fill_(float("nan"))
            streamed = list(fast.stream(*args, **kwargs))
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert streamed[0].final.tolist() == [False] * 5
    assert streamed[0].confidence.tolist() == [0.0] * 5
    assert streamed[-1].exit_index.tolist() == [1] * 5
    assert not bool(fast.prediction_of(streamed[-1].output).isnan().any())


def test_a_stream_needs_eval_mode(zoo):
    animal = zoo("lenet")
    args, kwargs = call(animal)
    animal.fast.train()
    try:
        with pytest.raises(StrategyError, match="a stream needs eval mode"):
            animal.fast.stream(*args, **kwargs)
        with pytest.raises(StrategyError, match="a deadline or a budget needs eval mode"):
            animal.fast(*args, **kwargs, budget=0.5)
    finally:
        animal.fast.eval()


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("name", MODELS)
def test_no_row_costs_more_than_its_budget(zoo, name):
    animal = zoo(name)
    fast = animal.fast
    args, kwargs = call(animal)
    for seed in range(2):
        fast.set_thresholds(thresholds_for(animal, args, kwargs, seed, closed=0.0))
        costs = fast.costs([True] * len(fast.exits)).tolist()
        for budget in (0.01, *costs[:-1], 0.97, costs[-1]):
            with torch.no_grad():
                with executor(fast, "compact"):
                    got = fast.run(*args, **kwargs, budget=budget)
                    close(fast(*args, **kwargs, budget=budget), got.output)
                with executor(fast, "reference"):
                    want = fast.run(*args, **kwargs, budget=budget)
            same_result(got, want)
            assert (got.late, got.stopped) == (want.late, want.stopped)
            assert torch.equal(got.final, want.final)
            assert got.late == (budget < costs[0] - 1e-6)
            if not got.late:
                assert float(got.cost.max()) <= budget + 1e-6
            assert (got.stopped == "budget") == (not bool(got.final.all()))


def test_a_budget_saves_operators(zoo):
    animal = zoo("bert")
    fast = animal.fast
    args, kwargs = call(animal)
    fast.set_thresholds(STAYS)
    costs = fast.costs([True] * 3).tolist()
    products = [watch(lambda b=b: fast(*args, **kwargs, budget=b)).ops["addmm"] for b in costs]
    assert products == sorted(set(products)), products
    layer = (products[1] - products[0]) / (costs[1] - costs[0])
    assert products[0] < 0.5 * layer  # the first exit is before the middle


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "a budget is a positive fraction"),
        (-0.5, "a budget is a positive fraction"),
        (50, "a budget is a fraction of the full model's cost"),
        (float("nan"), "budget= is a number"),
        ("half", "budget= is a number"),
        (True, "budget= is a number"),
    ],
)
def test_budgets_that_are_none(zoo, budget, message):
    animal = zoo("bert")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)
    with pytest.raises(StrategyError, match=message):
        animal.fast(*args, **kwargs, budget=budget)


def test_closed_exits_cannot_be_stopped_at(zoo):
    animal = zoo("bert")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(CLOSED)
    for limit in ({"budget": 0.5}, {"deadline_ms": 5.0}):
        with pytest.raises(StrategyError, match=r"every exit is closed.*\n.*set_thresholds\(1.0\)"):
            animal.fast(*args, **kwargs, **limit)
    with torch.no_grad():
        results = list(animal.fast.stream(*args, **kwargs))
        assert len(results) == 1
        assert animal.fast.run(*args, **kwargs, budget=1.0).exit_index.tolist() == [3] * 5
    animal.fast.set_thresholds([CLOSED, STAYS, CLOSED])
    with torch.no_grad():
        assert animal.fast.run(*args, **kwargs, budget=0.95).exit_index.tolist() == [1] * 5
