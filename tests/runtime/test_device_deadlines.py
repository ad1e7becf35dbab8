"""Deadlines of device programs: on a clock that moves only as set, the simulator stops where the compact executor does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from eecompile import strategies
from eecompile.errors import StrategyError
from eecompile.kernels.clock import END, START
from eecompile.runtime.compact import CompactExecutor
from eecompile.runtime.device import cuda as cuda_module
from eecompile.runtime.device.check import lint
from eecompile.runtime.device.cuda import Instance, StageGraphs
from eecompile.runtime.device.deadline import predictions
from eecompile.runtime.device.executor import Options, SimulateExecutor, stepped
from eecompile.runtime.device.fallback import Bound
from eecompile.runtime.device.machine import Simulator, allocated, constants
from eecompile.runtime.device.nodes import CLOCK, Call, Tick
from eecompile.runtime.outcome import times_of
from tests.compositions import SUMS
from tests.runtime.devices import Late, spread
from tests.support import again, same_result
from tests.zoo import ZOO


class ScriptedSimulator(SimulateExecutor):
    """The clock moves by `seconds(exit)` with each stage."""

    def ready(self, program):
        calls = super().ready(program)
        for stop, bodies in zip(program.stops, program.stages, strict=True):
            first = next(n.module for n in bodies[0] if isinstance(n, Call))
            calls[first] = self.moving(calls[first], stop)
        return calls

    def moving(self, call, stop):
        def timed(*args):
            self.now[0] += self.seconds(stop)
            return call(*args)

        return timed


class ScriptedCompact(CompactExecutor):
    def _steps(self, segments):
        for made in super()._steps(segments):
            yield replace(made, call=self.timed(made))

    def timed(self, made):
        stop = len(self.program.exits) if made.segment.exit is None else made.segment.exit

        def call(*args):
            self.now[0] += self.seconds(stop)
            return made.call(*args)

        return call


@contextlib.contextmanager
def scripted(fast, name, seconds) -> Iterator[None]:
    kept = fast.engine.executors
    found = ScriptedCompact(fast.program) if name == "compact" else ScriptedSimulator(fast.program, fast.device_options)
    found.now, found.seconds = [7.0], seconds
    found.times.clock = lambda: found.now[0]
    fast.engine.executors = {(name, "eager"): found}
    fast.executor = name
    try:
        with torch.no_grad():
            yield
    finally:
        fast.engine.executors = kept
        fast.executor = "auto"


def in_both(fast, deadlines, seconds=lambda stop: 0.010, budgets=(None,), **kwargs):
    """Results of every deadline and budget from the simulator, compared with compact; deadlines in milliseconds."""
    found = {}
    for name in ("compact", "simulate"):
        with scripted(fast, name, seconds):
            fast.measure_stages(**kwargs, rounds=3)
            found[name] = [fast.run(**kwargs, deadline_ms=d, budget=b) for b in budgets for d in deadlines]
    for got, want in zip(found["simulate"], found["compact"], strict=True):
        same_result(got, want)
    return found["simulate"]


@pytest.mark.parametrize(("batch", "structure"), [(1, "nested"), (6, "nested"), (6, "machine")])
def test_the_simulator_stops_where_compact_does(bert, batch, structure):
    bert.device_options = Options(structure=structure)
    kwargs = ZOO["bert"].inputs(batch, seed=4)[1]
    bert.set_thresholds(1.0)  # open, and no row leaves
    results = in_both(bert, (0, 5, 10.5, 19.9, 20.1, 30.1, 39.9, 40.1), **kwargs)
    assert [r.exit_index[0].item() for r in results] == [0, 0, 0, 0, 1, 2, 2, 3]
    assert [r.late for r in results] == [True, True, *[False] * 6]
    assert [r.stopped for r in results] == ["deadline"] * 7 + [None]
    bert.device_options = Options()


def test_rows_that_left_before_are_final(bert):
    """Slower and slower stages, and rows that leave everywhere."""
    kwargs = spread(bert, 8, seed=6)
    budgets = (None, float(bert.costs([True] * 3)[1]))
    results = in_both(bert, (5, 12, 25, 35, 70, 200), lambda stop: 0.010 * (1 + stop), budgets[:1], **kwargs)
    stopped = [r for r in results if r.stopped == "deadline"]
    assert any(0 < int(r.final.sum()) < 8 for r in stopped)
    assert {int(r.exit_index.max()) for r in results} == {0, 1, 2, 3}
    bert.set_thresholds(1.0)
    within = in_both(bert, (15, 1000), budgets=budgets[1:], **kwargs)
    assert [r.stopped for r in within] == ["deadline", "budget"]


@pytest.mark.parametrize(
    "made",
    [
        lambda: strategies.Anytime(exits=3, combine="ensemble", criterion="max_probability"),
        lambda: strategies.Branchy(exits=3, criterion="patience"),
        SUMS["branchy + skipnet"],
        lambda: strategies.Branchy(exits=3, router=strategies.Router(at="bert.embeddings", to="exits")),
        lambda: strategies.Branchy(exits=3, router=strategies.Router(at="bert.embeddings", to={"light": 0.5})),
    ],
    ids=["ensemble", "patience", "gates", "router to exits", "router to branches"],
)
def test_with_other_strategies(bert, made):
    """The best so far is what the program's rule of combining says; gates, states and reports are as compact has them."""
    fast = again(bert, made())
    fast.set_thresholds(1.0)
    results = in_both(fast, (5, 25, 1000), **ZOO["bert"].inputs(5, seed=9)[1])
    assert [r.stopped for r in results[::2]] == ["deadline", None]


def test_a_program_is_timed_before_its_first_deadline(bert):
    """That takes time of the first call; another batch is another program."""
    bert.set_thresholds(1.0)
    with scripted(bert, "simulate", lambda stop: 0.010):
        for batch in (2, 5):
            kwargs = ZOO["bert"].inputs(batch)[1]
            assert bert.run(**kwargs, deadline_ms=35).late
            assert bert.run(**kwargs, deadline_ms=35).exit_index.tolist() == [2] * batch
        rows = {(row["from"], row["to"], row["rows"]) for row in bert.stage_times.to_dict()}
        assert {(-1, 0, 5), (0, 1, 1), (1, 2, 4), (2, 3, 5)} <= rows  # every stage in every bucket
        assert bert(**kwargs, deadline_ms=35) is not None
        with pytest.raises(StrategyError, match="a stream needs the host"):
            next(bert.stream(**kwargs, deadline_ms=35))


def test_the_machines_clock_by_default(bert):
    bert.set_thresholds(1.0)
    kwargs = ZOO["bert"].inputs(3)[1]
    bert.executor = "simulate"
    with torch.no_grad():
        first, last = (bert.run(**kwargs, deadline_ms=d) for d in (0, 1e6))
    bert.executor = "auto"
    assert (first.exit_index.tolist(), first.stopped, first.late) == ([0] * 3, "deadline", True)
    assert (last.exit_index.tolist(), last.stopped, last.late) == ([3] * 3, None, False)


# ------------------------------------------------------------------------------------------------ other ways to run it


def made_for(fast, seconds=0.010, **kwargs):
    """A scripted simulator, its timed program with a deadline, and what the program needs."""
    executor = ScriptedSimulator(fast.program)
    executor.now, executor.seconds = [0.0], lambda stop: seconds
    executor.times.clock = lambda: executor.now[0]
    flat = fast.program.signature.flatten((), kwargs)
    for _ in range(3):
        executor.measure(flat, fast.settings)
    program, calls = executor._program_for(executor._now(fast.settings), flat, None, True)
    memory = fast.settings.tensors(torch.device("cpu")) | constants(program, "cpu") | allocated(program.buffers, "cpu")
    return executor, program, calls, memory, flat


@pytest.mark.parametrize("delay", [0, 2])
def test_without_conditional_nodes_the_host_tells_the_time(bert, delay):
    kwargs = spread(bert, 7, seed=11)
    executor, program, calls, memory, flat = made_for(bert, **kwargs)
    want = executor.run(flat, bert.settings, True, _until(executor, 0.025))
    with torch.no_grad():
        machine = Bound(program, memory, calls, Late(delay), executor.times.clock)
        found = stepped(machine, flat, executor.times, executor.now[0] + 0.025)
    assert want.stopped == "deadline"
    assert torch.equal(found["exit_index"].clamp(max=1), want.exit_index)  # stopped after the second exit
    torch.testing.assert_close(found["output"], want.leaves[0], atol=1e-5, rtol=1e-5)


def _until(executor, seconds):
    from eecompile.runtime.limits import Allowance

    return Allowance(deadline=executor.now[0] + seconds)


def test_a_captured_program_takes_any_deadline(bert, monkeypatch):
    """With a graph that is replayed by the simulator on the memory that was captured."""
    bert.set_thresholds(1.0)
    kwargs = ZOO["bert"].inputs(5)[1]
    executor, program, calls, _, flat = made_for(bert, **kwargs)
    graph, decided, ticked = Mock(), Mock(), Mock()
    graph.if_ = lambda handle, body: body()
    graph.switch = lambda handle, bodies: [body() for body in bodies]
    graph.capture, graph.handle = contextlib.nullcontext, lambda default=None: 0
    monkeypatch.setattr(cuda_module, "ConditionalGraph", lambda device: graph)
    monkeypatch.setattr(cuda_module, "launch_decide", decided)
    monkeypatch.setattr(cuda_module, "launch_tick", ticked)
    monkeypatch.setattr(cuda_module, "launch_condition", Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", Mock())
    with torch.no_grad():
        instance = Instance(program, calls, flat, bert.settings.tensors(torch.device("cpu")))
        calls_of = [tuple(a for a in call.args if not isinstance(a, torch.Tensor)) for call in decided.call_args_list]
        third = len(calls_of) // 3  # two warm-ups and a capture
        assert calls_of[:third] == calls_of[third : 2 * third] == calls_of[2 * third :]  # no kernel that was not loaded
        assert {call[-2:] for call in calls_of} == {
            ("device", 0),
            ("device", None),
        }  # an IF's condition set, or not
        assert [call.args[1:] for call in ticked.call_args_list] == [(START, "device"), (END, "device")] * 3
        graph.replay = lambda: Simulator(program, instance.memory, calls, executor.times.clock).run(instance.inputs)
        for seconds, stop in ((0.021, 1), (0.001, 0), (1.0, -1), (0.031, 2)):
            instance.set_deadline(executor.now[0] + seconds, executor.times)
            assert instance.run(flat, bert.settings.tensors(torch.device("cpu")))[CLOCK][2] == stop


def test_stages_are_captured_once_and_timed_by_events(bert, monkeypatch):
    bert.set_thresholds(1.0)
    _, program, calls, memory, flat = made_for(bert, **ZOO["bert"].inputs(5)[1])
    graphs, event = [], Mock(elapsed_time=lambda end: 4.0)  # milliseconds

    def graph(device):
        graphs.append(Mock(capture=contextlib.nullcontext, handle=lambda default=None: 0))
        return graphs[-1]

    monkeypatch.setattr(cuda_module, "ConditionalGraph", graph)
    for name in ("launch_decide", "launch_tick", "launch_condition"):
        monkeypatch.setattr(cuda_module, name, Mock())
    monkeypatch.setattr(torch.cuda, "synchronize", Mock())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    times = times_of(bert.program)
    runs = StageGraphs(program, memory, calls)
    with torch.no_grad():
        for _ in range(3):
            runs.measure(flat, times)
    assert len(graphs) == 1 + 3 * 4  # three stages in buckets 1, 2, 4, 5
    assert all(g.replay.call_count == 4 for g in graphs)
    assert (predictions(program, times) == 4_000_000).all()


def test_the_checker_knows_the_clock(bert):
    bert.set_thresholds(0.5)
    _, program, _, _, _ = made_for(bert, **ZOO["bert"].inputs(2)[1])
    assert lint(program) == []
    assert any("clock, which is not known" in what for what in lint(replace(program, deadline=False)))
    assert program.describe().count("tick -> clock, ") == program.count(Tick) == 2
    assert "all_rows, clock, predicted -> " in program.describe()
