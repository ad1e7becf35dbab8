"""Deadlines and interrupts, with a fake clock and with calls that are held where they are."""

from __future__ import annotations

import math
import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from eecompile import strategies
from eecompile.errors import StrategyError, UnsupportedModelError
from eecompile.runtime.compact import CompactExecutor
from tests.support import close, executor, same_result, watch
from tests.support import compiled as eecompile

STAYS = 1.0  # an open exit that no row of an untrained model leaves at


def call(animal, batch=5, seed=2):
    return animal.entry.inputs(batch, seed=seed)


@contextmanager
def fake_clock(fast, seconds):
    """The compact executor on a clock that moves by `seconds(piece)` with every piece, and at no other time."""
    old = fast.engine.executors
    found = CompactExecutor(fast.program)
    now = [0.0]
    found.times.clock = lambda: now[0]
    make = found._steps

    def step(made):
        def timed(*args):
            stop = made.segment.exit
            now[0] += seconds(len(fast.exits) if stop is None else stop, args[0].shape[0])
            return made.call(*args)

        return replace(made, call=timed)

    found._steps = lambda segments: map(step, make(segments))
    fast.engine.executors = {("compact", "eager"): found}
    fast.executor = "compact"
    try:
        yield now
    finally:
        fast.engine.executors = old
        fast.executor = "auto"


@pytest.mark.parametrize("name", ["bert"])
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
        got = fast.run(*args, **kwargs, deadline_ms=20.1)
        assert (got.stopped, want.stopped) == ("deadline", "budget")
        got.stop.reason = "budget"
        same_result(got, want)


@pytest.mark.parametrize("deadline", [0, 0.0, -3.0, 5])
def test_a_deadline_before_the_first_exit_gives_its_output_and_says_late(zoo, deadline):
    animal = zoo("bert")
    args, kwargs = call(animal)
    animal.fast.set_thresholds(STAYS)
    with torch.no_grad(), fake_clock(animal.fast, lambda at, rows: 0.010):
        r = animal.fast.run(*args, **kwargs, deadline_ms=deadline)
    assert r.exit_index.tolist() == [0] * 5
    assert r.late
    assert r.stopped == "deadline"


def test_the_first_call_of_all_judges_by_work(zoo):
    """Nothing was measured: the time of the first stage and the FLOPs of the others decide."""
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
    animal = zoo("bert")
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


@pytest.mark.parametrize("sudden", [False, True], ids=["busy from the start", "suddenly busy"])
def test_few_calls_are_late_on_a_busy_machine(small, sudden):
    """Stage times as next to a process that keeps a core busy: slower, and now and then a time slice is lost."""
    fast, x = small
    rng = random.Random(5)
    busy = [not sudden]

    def seconds(at, rows):
        own = 1e-3 * math.exp(rng.gauss(0, 0.1))
        return own * 1.7 + (4e-3 if rng.random() < 0.05 else 0.0) if busy[0] else own

    late = calls = 0
    reached = set()
    with torch.no_grad(), fake_clock(fast, seconds) as now:
        fast.measure_stages(x, rounds=60)
        busy[0] = True
        for deadline in (8.0, 10.0, 14.0, 20.0):  # the first exit may lose a slice and is still in time
            for _ in range(150):
                began = now[0]
                r = fast.run(x, deadline_ms=deadline)
                over = (now[0] - began) * 1e3 / deadline
                assert r.late == (over > 1)
                late += over > 1.05
                calls += 1
                reached.add(r.exit_index[0].item())
    assert late <= 0.02 * calls, (late, calls)
    assert max(reached) == len(fast.exits), "nothing but caution"


def test_limits_that_make_no_sense(zoo):
    animal = zoo("bert")
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
    make = found._steps

    def step(made):
        def waiting(*args):
            if made.segment.exit == 1:
                reached.set()
                assert go.wait(20)
            return made.call(*args)

        return replace(made, call=waiting)

    found._steps = lambda segments: map(step, make(segments))
    return found, reached, go


def test_an_interrupt_from_another_thread_gives_the_best_so_far(small):
    fast, x = small
    old = fast.engine.executors
    found, reached, go = held(fast)
    fast.engine.executors = {("compact", "eager"): found}
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
        fast.engine.executors = old
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
