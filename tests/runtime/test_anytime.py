"""Streams, deadlines, budgets and interrupts against the reference, with a fake clock, and from many threads."""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from eecompile import eecompile, strategies
from eecompile.errors import StrategyError, UnsupportedModelError
from eecompile.runtime.compact import CompactExecutor
from tests.support import CLOSED, close, executor, random_thresholds, same_result, watch

MODELS = ("bert", "hf_resnet", "vit", "lstm", "msdnet", "gpt2_lm")
STAYS = 1.0  # an open exit that no row of an untrained model leaves at


def call(animal, batch=5, seed=2):
    return animal.entry.inputs(batch, seed=seed)


def thresholds_for(animal, args, kwargs, seed, closed=0.25):
    confidences = animal.fast.observe(*args, **kwargs).confidences[:-1]
    return random_thresholds(confidences, random.Random(seed), closed)


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_is_what_the_reference_says_and_ends_where_run_does(zoo, name):
    animal = zoo(name)
    fast = animal.fast
    args, kwargs = call(animal)
    for seed in range(4):
        fast.set_thresholds(thresholds_for(animal, args, kwargs, seed))
        with torch.no_grad():
            with executor(fast, "compact"):
                streamed = list(fast.stream(*args, **kwargs))
                whole = fast.run(*args, **kwargs)
            with executor(fast, "reference"):
                wanted = list(fast.stream(*args, **kwargs))
        assert len(streamed) == len(wanted)
        for got, want in zip(streamed, wanted, strict=True):
            same_result(got, want)
            assert torch.equal(got.final, want.final)
            assert (got.stopped, got.late) == (want.stopped, want.late) == (None, False)
        same_result(streamed[-1], whole)
        assert bool(streamed[-1].final.all())
        assert not any(bool(r.final.all()) for r in streamed[:-1])
        for earlier, later in zip(streamed, streamed[1:], strict=False):
            kept = earlier.final
            assert bool(later.final[kept].all()), "a row that was final is not any more"
            assert torch.equal(later.exit_index[kept], earlier.exit_index[kept])
            assert bool((later.cost >= earlier.cost).all())


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
    assert products[0] == 0, "a stream that nobody reads computes something"
    steps = [b - a for a, b in zip(products, products[1:], strict=False)]
    assert all(s > 0 for s in steps)
    assert products[-1] == watch(lambda: fast.run(*args, **kwargs)).ops["addmm"]
    assert not fast._chosen._running, "a closed stream is still taken for a running call"


def test_earlier_results_of_a_stream_stay_as_they_were(zoo):
    animal = zoo("hf_resnet")
    args, kwargs = call(animal, 8)
    animal.fast.set_thresholds(thresholds_for(animal, args, kwargs, 1, closed=0.0))
    with torch.no_grad():
        seen = [(r, animal.fast.prediction_of(r.output).clone()) for r in animal.fast.stream(*args, **kwargs)]
    for r, then in seen:
        assert torch.equal(animal.fast.prediction_of(r.output), then)


def test_an_exception_of_the_consumer_ends_the_stream(zoo):
    animal = zoo("vit")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)

    def consume():
        for r in animal.fast.stream(*args, **kwargs):
            raise LookupError(r.stopped)

    with pytest.raises(LookupError):
        consume()
    assert not animal.fast._chosen._running
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
    animal = zoo("vit")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)
    with pytest.raises(StrategyError, match=message):
        animal.fast(*args, **kwargs, budget=budget)


def test_closed_exits_cannot_be_stopped_at(zoo):
    animal = zoo("vit")
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


# ------------------------------------------------------------------------------------------------ deadlines


@contextmanager
def fake_clock(fast, seconds):
    """The compact executor on a clock that moves by `seconds(piece)` with every piece, and at no other time."""
    old = fast.__dict__["_executors"]
    found = CompactExecutor(fast.program)
    now = [0.0]
    found.times.clock = lambda: now[0]
    make = found._step

    def step(segment):
        made = make(segment)

        def timed(*args):
            now[0] += seconds(len(fast.exits) if segment.exit is None else segment.exit, args[0].shape[0])
            return made.call(*args)

        return replace(made, call=timed)

    found._step = step
    fast.__dict__["_executors"] = {("compact", "eager"): found}
    fast.executor = "compact"
    try:
        yield now
    finally:
        fast.__dict__["_executors"] = old
        fast.executor = "auto"


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_deadline_is_kept_by_what_was_measured(zoo, name):
    animal = zoo(name)
    fast = animal.fast
    args, kwargs = call(animal)
    fast.set_thresholds(STAYS)
    with torch.no_grad(), fake_clock(fast, lambda at, rows: 0.010):
        fast.measure_stages(*args, **kwargs, rounds=5)
        for deadline, reached in ((10.5, 0), (19.9, 0), (20.1, 1), (30.1, 2), (39.9, 2), (40.1, 3)):
            r = fast.run(*args, **kwargs, deadline_ms=deadline)
            assert r.exit_index.tolist() == [reached] * 5, deadline
            assert r.stopped == (None if reached == 3 else "deadline")
            assert not r.late
            assert bool(r.final.all()) == (reached == 3)
        want = fast.run(*args, **kwargs, budget=float(fast.costs([True] * 3)[1]))
        same_result(fast.run(*args, **kwargs, deadline_ms=20.1), want)


@pytest.mark.parametrize("deadline", [0, 0.0, -3.0, 5])
def test_a_deadline_before_the_first_exit_gives_its_output_and_says_late(zoo, deadline):
    animal = zoo("vit")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)
    with torch.no_grad(), fake_clock(animal.fast, lambda at, rows: 0.010):
        r = animal.fast.run(*args, **kwargs, deadline_ms=deadline)
    assert r.exit_index.tolist() == [0] * 5
    assert r.late
    assert r.stopped == "deadline"


def test_the_first_call_of_all_judges_by_work(zoo):
    """Nothing was measured: the time of the first stage and the FLOPs of the others tell."""
    animal = zoo("bert")
    fast = animal.fast
    args, kwargs = call(animal)
    fast.set_thresholds(STAYS)
    with torch.no_grad():
        with fake_clock(fast, lambda at, rows: 0.010):
            assert fast.run(*args, **kwargs, deadline_ms=15).exit_index.tolist() == [0] * 5
        with fake_clock(fast, lambda at, rows: 0.010):
            assert fast.run(*args, **kwargs, deadline_ms=500).exit_index.tolist() == [3] * 5


def test_fewer_rows_left_may_go_further(zoo):
    animal = zoo("bert")
    fast = animal.fast
    args, kwargs = call(animal, 8)
    confidence = fast.observe(*args, **kwargs).confidences[0]
    middle = confidence.sort().values[1:3].mean()  # two of eight rows stay
    fast.set_thresholds([float(middle), STAYS, STAYS])
    with torch.no_grad(), fake_clock(fast, lambda at, rows: 0.001 * rows):
        for _ in range(5):
            fast.run(*args, **kwargs, deadline_ms=1e6)
        r = fast.run(*args, **kwargs, deadline_ms=8 + 2 + 2 + 0.5)
        assert sorted(r.exit_index.tolist()) == [0] * 6 + [2] * 2
        assert r.final.tolist() == [i == 0 for i in r.exit_index.tolist()]


def test_a_slow_consumer_uses_up_the_deadline(zoo):
    animal = zoo("vit")
    fast = animal.fast
    args, kwargs = call(animal)
    fast.set_thresholds(STAYS)
    with torch.no_grad(), fake_clock(fast, lambda at, rows: 0.010) as now:
        fast.measure_stages(*args, **kwargs, rounds=5)
        assert len(list(fast.stream(*args, **kwargs, deadline_ms=41))) == 4
        seen = []
        for r in fast.stream(*args, **kwargs, deadline_ms=41):
            seen.append(r)
            now[0] += 0.011
        assert len(seen) == 2


def test_limits_that_make_no_sense(zoo):
    animal = zoo("vit")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)
    with pytest.raises(StrategyError, match="deadline_ms= is a number"):
        animal.fast(*args, **kwargs, deadline_ms=float("nan"))
    with executor(animal.fast, "reference"), pytest.raises(StrategyError, match="cannot keep a deadline"):
        animal.fast(*args, **kwargs, deadline_ms=5)
    with executor(animal.fast, "reference"), pytest.raises(StrategyError, match="no stages to measure"):
        animal.fast.measure_stages(*args, **kwargs)
    with torch.no_grad():  # None is no limit
        assert animal.fast.run(*args, **kwargs, deadline_ms=None, budget=None).stopped is None


# ------------------------------------------------------------------------------------------------ interrupts


class Layers(nn.Module):
    """Four layers and a classifier."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.end = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


class Budgeted(Layers):
    """With an argument of a name that limits have too."""

    def forward(self, x, budget):
        return super().forward(x * budget)


@pytest.fixture(scope="module")
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Layers().eval()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    strategy = strategies.Branchy(exits="every-block", head="linear", threshold=STAYS, criterion="max_probability")
    return eecompile(model, strategy, example_inputs=(x,)), x


def held(fast):
    """The executor with its second piece waiting: (executor, reached, go on)."""
    found = CompactExecutor(fast.program)
    reached, go = threading.Event(), threading.Event()
    make = found._step

    def step(segment):
        made = make(segment)

        def waiting(*args):
            if segment.exit == 1:
                reached.set()
                assert go.wait(20)
            return made.call(*args)

        return replace(made, call=waiting)

    found._step = step
    return found, reached, go


def test_an_interrupt_from_another_thread_gives_the_best_so_far(small):
    fast, x = small
    old = fast.__dict__["_executors"]
    found, reached, go = held(fast)
    fast.__dict__["_executors"] = {("compact", "eager"): found}
    fast.executor = "compact"
    results = {}
    try:
        assert fast.interrupt() == 0  # nothing runs: nothing happens, now or to the next call
        threads = [
            threading.Thread(target=lambda: results.update(run=fast.run(x))),
            threading.Thread(target=lambda: results.update(plain=fast(x))),
        ]
        for t in threads:
            t.start()
            assert reached.wait(20)
            reached.clear()
        assert fast.interrupt() == 2, "both calls that run now"
        go.set()
        for t in threads:
            t.join(20)
        assert results["run"].exit_index.tolist() == [1] * 6
        assert results["run"].stopped == "interrupt"
        assert not bool(results["run"].final.any())
        with torch.no_grad():
            after = fast.run(x)
            want = fast.run(x, budget=float(fast.costs([True] * len(fast.exits))[1]))
        assert after.stopped is None, "an interrupt reached a call that had not begun"
        close(results["run"].output.detach(), want.output)
        close(results["plain"].detach(), want.output)
    finally:
        fast.__dict__["_executors"] = old
        fast.executor = "auto"


def test_an_interrupt_ends_a_stream(small):
    fast, x = small
    seen = []
    for r in fast.stream(x):
        seen.append(r)
        if len(seen) == 2:
            assert fast.interrupt() == 1
    assert [r.exit_index[0].item() for r in seen] == [0, 1]


def test_a_models_own_argument_stays_its_own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Budgeted().eval()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(6, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    strategy = strategies.Branchy(exits="every-block", head="linear", threshold=STAYS, criterion="max_probability")
    fast = eecompile(model, strategy, example_inputs=(x,), example_kwargs={"budget": scale})
    with torch.no_grad():
        assert torch.equal(fast(x, budget=scale), model(x, budget=scale))
        cost = float(fast.costs([True] * len(fast.exits))[0])
        r = fast.within(budget=cost).run(x, budget=scale)
        assert r.exit_index.tolist() == [0] * 6
        close(fast.within(budget=cost)(x, budget=scale), r.output)
        assert len(list(fast.within(budget=cost).stream(x, budget=scale))) == 1
        assert fast.run(x, budget=scale, deadline_ms=1e5).exit_index.tolist() == [len(fast.exits)] * 6


def test_many_calls_from_four_threads_with_any_deadline(small):
    """2,000 calls, streams and interrupts among them: each gives a whole output, none hangs, nothing is left over."""
    fast, x = small
    with torch.no_grad():
        wanted = [fast.observe(x).outputs[k] for k in range(len(fast.exits) + 1)]
    errors, done = [], []

    def work(seed):
        rng = random.Random(seed)
        try:
            with torch.no_grad():
                for i in range(500):
                    kind = rng.random()
                    deadline = rng.choice([0, 0.01, 0.05, 0.2, 1.0, 50.0])
                    if kind < 0.7:
                        results = [fast.run(x, deadline_ms=deadline)]
                    elif kind < 0.9:
                        results = list(fast.stream(x, deadline_ms=deadline))
                    else:
                        results = [fast.run(x)]
                    assert results
                    for r in results:
                        at = r.exit_index[0].item()
                        assert r.exit_index.tolist() == [at] * 6
                        torch.testing.assert_close(r.output, wanted[at], atol=1e-6, rtol=1e-5)
                    if i % 50 == 0:
                        fast.interrupt()
                    done.append(1)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not errors, errors[0]
    assert len(done) == 2000
    assert not fast._chosen._running


# ------------------------------------------------------------------------------------------------ blocks


def test_models_captured_as_blocks(zoo):
    animal = zoo("bert")
    args, kwargs = call(animal)
    strategy = strategies.Branchy(exits=3, threshold=STAYS)
    fast = eecompile(animal.model, strategy, example_inputs=args, example_kwargs=kwargs, capture="blocks")
    costs = fast.costs([True] * 3).tolist()
    with torch.no_grad():
        for k, cost in enumerate(costs):
            r = fast.run(*args, **kwargs, budget=cost)
            assert r.exit_index.tolist() == [k] * 5
            assert r.stopped == ("budget" if k < 3 else None)
            if k < 3:
                close(fast.prediction_of(r.output), fast.observe(*args, **kwargs).outputs[k])
        r = fast.run(*args, **kwargs, deadline_ms=0)
        assert (r.exit_index.tolist(), r.late, r.stopped) == ([0] * 5, True, "deadline")
        fast.measure_stages(*args, **kwargs, rounds=2)
        assert fast.run(*args, **kwargs, deadline_ms=1e5).exit_index.tolist() == [3] * 5
        with pytest.raises(UnsupportedModelError, match="no stream of a model that was captured as blocks"):
            list(fast.stream(*args, **kwargs))
    fewer = watch(lambda: fast(*args, **kwargs, budget=costs[0])).ops["addmm"]
    assert fewer < 0.6 * watch(lambda: fast(*args, **kwargs)).ops["addmm"]
