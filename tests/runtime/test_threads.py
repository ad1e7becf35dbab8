"""Calls from several threads at once: every executor, while thresholds are set, under deadlines and interrupts."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eecompile import CompiledModule, strategies
from tests.runtime.test_deadlines import Layers
from tests.support import CLOSED, again, executor, nightly
from tests.support import compiled as eecompile

THREADS = 4
PATIENCE = 120  # seconds until a thread counts as hanging


def in_threads(work: Callable[[int], None], also: Callable[[threading.Event], None] | None = None) -> None:
    """`work(seed)` in every thread, `also(done)` in one more; the first error is raised here."""
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(call: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                call()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(lambda s=s: work(s),)) for s in range(THREADS)]
    extra = [] if also is None else [threading.Thread(target=guarded, args=(lambda: also(done),))]
    for t in (*threads, *extra):
        t.start()
    for t in threads:
        t.join(PATIENCE)
    done.set()
    for t in extra:
        t.join(PATIENCE)
    assert not any(t.is_alive() for t in (*threads, *extra)), "a call hangs"
    if errors:
        raise errors[0]


@pytest.fixture(scope="module")
def small() -> tuple[CompiledModule, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Layers().eval()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    strategy = strategies.Branchy(exits="every-block", head="linear", threshold=1.0, criterion="max_probability")
    return eecompile(model, strategy, example_inputs=(x,)), x


@pytest.mark.parametrize("calls", [40, nightly(500)], ids=["160 calls", "2,000 calls"])
def test_calls_under_any_deadline_with_interrupts(small, calls):
    """Runs, streams and interrupts: each gives a whole output, none hangs, nothing is left over."""
    fast, x = small
    fast.set_thresholds(1.0)
    with torch.no_grad():
        wanted = [fast.observe(x).outputs[k] for k in range(len(fast.exits) + 1)]
    counted: list[int] = []
    before = threading.active_count()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(calls):
            kind, deadline = rng.random(), rng.choice([0, 0.01, 0.05, 0.2, 1.0, 50.0])
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
                assert bool(r.final.all()) == (r.stopped is None and at == len(fast.exits))
                torch.testing.assert_close(r.output, wanted[at], atol=1e-6, rtol=1e-5)
            if i % 50 == 0:
                fast.interrupt()
            counted.append(1)

    in_threads(work)
    assert len(counted) == THREADS * calls
    assert not fast.engine.chosen._running
    assert threading.active_count() == before
    gc.collect()
    held = sum(type(o) is Tensor and o.shape == x.shape for o in gc.get_objects())
    in_threads(work)
    gc.collect()
    left = sum(type(o) is Tensor and o.shape == x.shape for o in gc.get_objects())
    assert left <= held, "calls leave tensors behind"


def programs(zoo, name: str) -> CompiledModule:
    """A model of the zoo for an executor: exits, with gates or halting in addition where asked."""
    animal = zoo("bert")
    args, kwargs = animal.entry.inputs(4)
    exits = strategies.Branchy(exits=3, criterion="max_probability")
    kinds = {
        "reference": exits,
        "compact": exits,
        "patience": strategies.Branchy(exits=3, criterion="patience"),
        "ensemble": strategies.Branchy(exits=3, criterion="max_probability", combine="ensemble"),
        "gates": exits + strategies.SkipNet(open_bias=0.0),
        "halting": exits + strategies.Act(halting_bias=0.0),
    }
    if name != "blocks":
        return again(animal.fast, kinds[name])
    return eecompile(animal.model, exits, example_inputs=args, example_kwargs=kwargs, capture="blocks")


@pytest.mark.parametrize("name", ["reference", "compact", "patience", nightly("ensemble"), "gates", "halting", "blocks"])
def test_thresholds_are_set_while_calls_run(zoo, name):
    """A call sees the thresholds of before or of after, never a mixture, and rows of no other call."""
    fast = programs(zoo, name)
    batches = [zoo("bert").entry.inputs(b, seed=b)[1] for b in (1, 3, 5, 8)]
    seen = fast.observe(**batches[-1]).confidences
    middle = [float(c.median()) for c in seen[:-1]]
    if name == "patience":
        middle = [0.6] * 3
    settings = [[CLOSED] * 3, [middle[0], CLOSED, middle[2]], middle, [0.0, 0.0, 0.0]]
    with executor(fast, "reference" if name == "reference" else "auto"):
        wanted = []
        with torch.no_grad():
            for thresholds in settings:
                fast.set_thresholds(thresholds)
                wanted.append([fast.run(**batch) for batch in batches])

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(12):
                k = rng.randrange(len(batches))
                r = fast.run(**batches[k])
                mine = fast.prediction_of(r.output)
                assert any(
                    torch.equal(r.exit_index, w[k].exit_index)
                    and torch.allclose(mine, fast.prediction_of(w[k].output), atol=1e-5)
                    for w in wanted
                ), r.exit_index

        def setting(done: threading.Event) -> None:
            rng = random.Random(9)
            while not done.is_set():
                fast.set_thresholds(rng.choice(settings))
                done.wait(0.0005)

        in_threads(work, setting)
    after = fast.thresholds.tolist()
    assert any(after == pytest.approx(s) for s in settings)


def test_a_running_call_keeps_its_thresholds(small):
    """In one thread: a stream goes on with what it has begun with."""
    fast, x = small
    fast.set_thresholds(1.0)
    stream = fast.stream(x)
    first = next(stream)
    fast.set_thresholds(0.0)
    rest = [first, *stream]
    assert [r.exit_index[0].item() for r in rest] == list(range(len(fast.exits) + 1))
    assert fast.run(x).exit_index.tolist() == [0] * 6
    fast.set_thresholds(1.0)


SETTERS = {
    "gates": lambda fast, high: fast.set_gate_thresholds(0.99 if high else 0.01),
    "halting": lambda fast, high: fast.set_halting_threshold(1.0 if high else 0.4),
    "temperatures": lambda fast, high: fast.set_temperatures([7.0 if high else 1.0] * 4),
}


@pytest.mark.parametrize("executor_name", ["compact", "simulate"])
@pytest.mark.parametrize("name", sorted(SETTERS))
def test_a_running_call_keeps_whatever_is_set(zoo, name, executor_name, monkeypatch):
    """Gates, halting and temperatures too: set between two stages, or once a device program has begun, they are for later
    calls."""
    fast = programs(zoo, "compact" if name == "temperatures" else name)
    call = zoo("bert").entry.inputs(8, seed=3)[1]
    fast.set_thresholds(1.0)
    answers = {}
    with executor(fast, executor_name):
        for high in (True, False):
            SETTERS[name](fast, high)
            answers[high] = fast.run(**call)
        old, new = answers[False], answers[True]
        field = {"gates": "gates", "halting": "steps", "temperatures": "confidence"}[name]
        assert not torch.equal(getattr(old, field), getattr(new, field)), "nothing depends on what is set"
        kept = [id(m) for m in fast.engine.chosen._kept.values()] if executor_name == "simulate" else []
        if executor_name == "compact":
            stream = fast.stream(**call)
            next(stream)
            SETTERS[name](fast, True)
            (*_, got) = stream
        else:
            run = type(fast.engine.chosen).execute

            def late(self, *args, **kwargs):
                SETTERS[name](fast, True)
                return run(self, *args, **kwargs)

            monkeypatch.setattr(type(fast.engine.chosen), "execute", late)
            got = fast.run(**call)
            monkeypatch.undo()
        after = fast.run(**call)
        assert executor_name == "compact" or kept == [id(m) for m in fast.engine.chosen._kept.values()], "built again"
    for result, want in ((got, old), (after, new)):
        torch.testing.assert_close(getattr(result, field), getattr(want, field))
        torch.testing.assert_close(fast.prediction_of(result.output), fast.prediction_of(want.output), atol=1e-6, rtol=1e-5)
