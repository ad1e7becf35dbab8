"""Device programs: sums of strategies, what is kept, the fallback without conditional nodes, and what a capture asks for."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from eecompile import strategies
from eecompile.reasons import Unless
from eecompile.runtime.device import cuda as cuda_module
from eecompile.runtime.device.build import default_buckets
from eecompile.runtime.device.cuda import Capture
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.fallback import Bound
from eecompile.runtime.device.machine import Simulator, allocated, constants
from eecompile.runtime.device.nodes import Call, Copy, Decide, Gather, If, OpenRows, Switch, While
from eecompile.runtime.device.warm import Warm
from tests.compositions import SUMS
from tests.runtime.devices import Late, reference, simulated, spread
from tests.support import again, close, executor, nightly, random_settings, random_thresholds, same_result
from tests.zoo import ZOO


def test_a_router_to_exits_agrees_with_the_reference(bert):
    """A head runs the rows that are sent to it; where all rows leave at an exit, all of them."""
    router = strategies.Router(at="bert.embeddings", to="exits")
    fast = again(bert, strategies.Branchy(exits=3, router=router))
    for batch in (1, 7):
        _, kwargs = ZOO["bert"].inputs(batch, seed=8)
        confidences = fast.observe(**kwargs).confidences[:-1]
        fast.set_thresholds(random_thresholds(confidences, random.Random(batch), closed=0.0))
        same_result(simulated(fast, **kwargs), reference(fast, **kwargs))
    flat = fast.program.signature.flatten((), kwargs)
    runs = fast.engine.executor("simulate")
    heads = [runs.device_program(flat, fast.settings, last)[0].count(OpenRows) for last in (None, 1, 0)]
    assert heads == [1 + 4 + 4, 1, 0]  # in each bucket; an exit that all rows leave at has its head run on all


@pytest.mark.parametrize("buckets", [None, (2, 5, 7), nightly((1, 4)), nightly((3,))])
def test_any_buckets_give_the_same(bert, buckets):
    bert.device_options = Options(buckets=buckets)
    for batch in (1, 2, 7):
        kwargs = spread(bert, batch, seed=batch)
        same_result(simulated(bert, **kwargs), reference(bert, **kwargs))
    bert.device_options = Options()


def test_buckets_by_default():
    assert default_buckets(1) == (1,)
    assert default_buckets(8) == (1, 2, 4, 8)
    assert default_buckets(33) == (1, 2, 4, 8, 16, 32, 33)


def test_a_budget_ends_the_program_early(bert):
    kwargs = spread(bert, 6, seed=2)
    bert.set_thresholds([0.9, 0.9, 0.9])
    with torch.no_grad(), executor(bert, "simulate"):
        got = bert.run(**kwargs, budget=0.6)
    with torch.no_grad(), executor(bert, "reference"):
        want = bert.run(**kwargs, budget=0.6)
    same_result(got, want)
    assert torch.equal(got.final, want.final)
    assert (got.stopped, got.late) == (want.stopped, want.late) == ("budget", False)
    program = bert.engine.executor("simulate").device_program(
        bert.program.signature.flatten((), kwargs), bert.settings, last=0
    )[0]
    assert program.count(Switch) == program.count(If) == 0  # nothing after the first exit is there


def test_a_budget_that_stops_nobody_is_no_reason(bert):
    """Whether anybody was stopped is known on the device: it is asked when the reason is read."""
    kwargs = spread(bert, 4, seed=2)
    bert.set_thresholds([0.0, 0.9, 0.9])
    want, got = (asked(bert, name, kwargs) for name in ("reference", "simulate"))
    assert vars(got.stop)["_reason"] == Unless("budget", got.final)
    assert got.final.all() and want.final.all()
    assert got.stopped is want.stopped is None
    assert replace(got.stop, late=True).reason is None


def asked(fast, name: str, kwargs):
    with torch.no_grad(), executor(fast, name):
        return fast.run(**kwargs, budget=0.6)


REPORTED = ["ann + self_adaptive", "branchy + act", nightly("branchy + skipnet")]


@pytest.mark.parametrize("kind", [*REPORTED, "router"])
def test_a_result_is_told_without_the_host(bert, kind, monkeypatch):
    """Cost, steps and widths of a call come from what is on the device: nothing is read and nothing is sent there."""
    light = strategies.Router(at="bert.embeddings", to={"light": 0.5})
    fast = again(bert, strategies.Branchy(router=light) if kind == "router" else SUMS[kind]())
    args, kwargs = ZOO["bert"].inputs(5, seed=4)
    random_settings(fast, args, kwargs, random.Random(1))
    flat = fast.program.signature.flatten(args, kwargs)

    def forbidden(*args, **kwargs):
        raise AssertionError("this waits for the device")

    with torch.no_grad(), executor(fast, "simulate"):
        outcome = fast._execute(flat, fast.settings, True)
        want = fast.result_of(outcome, fast.settings, flat)
        with monkeypatch.context() as patched:
            for name in ("item", "__bool__", "__float__", "__int__", "__index__"):
                patched.setattr(torch.Tensor, name, forbidden)
            patched.setattr(torch, "tensor", forbidden)
            plain, there = torch.Tensor.tolist, {t.data_ptr() for t in fast.graph_module.buffers()}
            patched.setattr(
                torch.Tensor, "tolist", lambda t: forbidden() if not t.ndim or t.data_ptr() in there else plain(t)
            )
            got = fast.result_of(outcome, fast.settings, flat)
        assert torch.equal(got.cost, want.cost)
        if fast.gates:
            fast.set_gate_thresholds(0.0)
        fast.set_thresholds(2.0)
        fresh = again(bert, strategies.Branchy(router=light) if kind == "router" else SUMS[kind]())
        fresh.load_state_dict(fast.state_dict())
        got, want = (f.result_of(outcome, f.settings, flat).cost for f in (fast, fresh))  # by the settings as they are now
        torch.testing.assert_close(got, want)


def test_thresholds_change_without_another_program(bert):
    kwargs = spread(bert, 5)
    before = bert.device_program(**kwargs)
    bert.set_thresholds([0.9, 0.3, 0.5])
    assert bert.device_program(**kwargs) is before
    same_result(simulated(bert, **kwargs), reference(bert, **kwargs))
    bert.set_thresholds([2.0, 0.3, 0.5])
    assert bert.device_program(**kwargs) is not before  # another set of open exits


def test_a_call_keeps_the_thresholds_that_it_has_begun_with(bert, monkeypatch):
    """Another thread opens an exit and sets the others while a program is looked up."""
    kwargs = spread(bert, 6, seed=3)
    before = [bert.thresholds[0].item(), 2.0, bert.thresholds[2].item()]
    bert.set_thresholds(before)
    want = reference(bert, **kwargs)
    simulate = bert.engine.executor("simulate")
    plain = simulate._program_for

    def meanwhile(*given, **named):
        bert.set_thresholds(0.0)
        return plain(*given, **named)

    monkeypatch.setattr(simulate, "_program_for", meanwhile)
    got = simulated(bert, **kwargs)
    assert torch.equal(got.exit_index, want.exit_index)
    close(got.output, want.output)
    assert simulated(bert, **kwargs).exit_index.tolist() == [0] * 6


def test_programs_are_kept_up_to_a_bound(bert):
    bert.device_options = Options(kept=2)
    bert.set_thresholds(0.5)
    made = [bert.device_program(**ZOO["bert"].inputs(n)[1]) for n in (1, 2, 3)]
    assert bert.device_program(**ZOO["bert"].inputs(3)[1]) is made[2]
    assert bert.device_program(**ZOO["bert"].inputs(1)[1]) is not made[0]  # it went first
    bert.device_options = Options()


def test_one_row_needs_no_lists(bert):
    """Batch 1: IF in IF, and nothing is gathered or copied between stages."""
    bert.set_thresholds(0.5)
    program = bert.device_program(**ZOO["bert"].inputs(1)[1])
    assert program.count(If) == len(bert.exits)
    assert program.count(Switch) == program.count(Gather) == program.count(Copy) == 0
    assert program.count(Decide) == len(bert.exits)
    assert "if control.0" in program.describe()


def test_the_kernel_computes_the_confidence(bert):
    """One launch for a decision; the segment hands over logits."""
    bert.set_thresholds(0.5)
    program = bert.device_program(**ZOO["bert"].inputs(4)[1])
    assert {n.criterion for _, n in program.walk() if isinstance(n, Decide)} == {bert.exits[0].criterion.name}


# ------------------------------------------------------------------------------------------------ without conditional nodes


def bounded(fast, delay: int, *args, **kwargs) -> Bound:
    """A call without conditional nodes, by numbers that come `delay` looks late."""
    flat = fast.program.signature.flatten(args, kwargs)
    simulate = fast.engine.executor("simulate")
    program, calls = simulate.device_program(flat, fast.settings)
    memory = fast.settings.tensors(torch.device("cpu")) | constants(program, "cpu") | allocated(program.buffers, "cpu")
    with torch.no_grad():
        machine = Bound(program, memory, calls, Late(delay))
        machine.run(flat)
    return machine


@pytest.mark.parametrize("delay", [0, 1, 2, 99])
@pytest.mark.parametrize("batch", [1, 7])
def test_old_numbers_give_the_same_output(bert, batch, delay):
    """The number of survivors only falls: with an old one more is computed, and nothing else."""
    kwargs = spread(bert, batch, seed=11)
    want = reference(bert, **kwargs)
    machine = bounded(bert, delay, **kwargs)
    assert torch.equal(machine.values["exit_index"], want.exit_index)
    close(machine.values["output"], bert.prediction_of(want.output))


@pytest.mark.parametrize("delay", [0, 1, nightly(99)])
def test_old_numbers_give_the_same_output_of_regions(bert, delay):
    """Also where a number arrives within a stage."""
    fast = again(bert, SUMS["branchy + skipnet"]())
    args, kwargs = ZOO["bert"].inputs(8, seed=3)
    random_settings(fast, args, kwargs, random.Random(0))
    fast.set_gate_thresholds([float(s.median()) for s in fast.observe(**kwargs).trace.gate_scores.T])
    ranked = fast.observe(**kwargs).confidences[0].sort().values
    fast.set_thresholds([float(ranked[1] + ranked[2]) / 2, 1.0])  # two of eight rows stay
    want = reference(fast, **kwargs)
    machine = bounded(fast, delay, *args, **kwargs)
    assert torch.equal(machine.values["exit_index"], want.exit_index)
    close(machine.values["output"], fast.prediction_of(want.output))


def test_a_warm_up_runs_every_body(bert):
    kwargs = spread(bert, 5)
    simulate = bert.engine.executor("simulate")
    flat = bert.program.signature.flatten((), kwargs)
    program, calls = simulate.device_program(flat, bert.settings)
    ran = []
    counted = [lambda *a, i=i, call=call: (ran.append(i), call(*a))[1] for i, call in enumerate(calls)]
    memory = bert.settings.tensors(torch.device("cpu")) | constants(program, "cpu") | allocated(program.buffers, "cpu")
    with torch.no_grad():
        Warm(program, memory, counted).run(flat)
    assert len(ran) == program.count(Call)


@pytest.mark.parametrize("structure", ["nested", "machine"])
def test_a_capture_sets_every_condition(bert, structure, monkeypatch):
    """The order of launches and nodes, with a graph that writes down what it is asked for."""
    kwargs = spread(bert, 3)
    bert.device_options = Options(structure=structure)
    simulate = bert.engine.executor("simulate")
    flat = bert.program.signature.flatten((), kwargs)
    program, calls = simulate.device_program(flat, bert.settings)
    log: list[tuple[str, int]] = []

    class Graph:
        handles = 0

        def handle(self, default=None):
            self.handles += 1
            return self.handles

        def if_(self, handle, body):
            log.append(("if", handle))
            body()

        def switch(self, handle, bodies):
            log.append(("switch", handle))
            [body() for body in bodies]

        def while_(self, handle, body):
            log.append(("while", handle))
            body()

    def decided(*arguments):
        log.append(("set", arguments[-1]))

    monkeypatch.setattr(cuda_module, "launch_decide", decided)
    monkeypatch.setattr(
        cuda_module, "launch_condition", lambda numbers, element, handle, below=None: log.append(("set", handle))
    )
    memory = bert.settings.tensors(torch.device("cpu")) | constants(program, "cpu") | allocated(program.buffers, "cpu")
    for b in program.buffers:
        memory[b.name].zero_()
    graph = Graph()
    with torch.no_grad():
        Capture(program, memory, calls, graph).run(flat)
    nodes = [h for what, h in log if what in ("if", "switch")]
    assert len(nodes) == program.count(If) + program.count(Switch) == len(set(nodes))
    for kind, handle in log:  # each condition is set before its node, a loop's by its body
        if kind in ("if", "switch"):
            assert log.index(("set", handle)) < log.index((kind, handle))
    assert sum(what == "while" for what, _ in log) == program.count(While)
    bert.device_options = Options()


def test_a_captured_program_reads_thresholds_that_are_set_later(bert, monkeypatch):
    """With a graph that is replayed by the simulator, on the memory that was captured."""
    kwargs = spread(bert, 5)
    simulate = bert.engine.executor("simulate")
    flat = bert.program.signature.flatten((), kwargs)
    program, calls = simulate.device_program(flat, bert.settings)

    class Graph:
        def __init__(self, device):
            self.stream = Mock()

        def __getattr__(self, name):
            return {"if_": lambda handle, body: body(), "switch": lambda handle, bodies: [b() for b in bodies]}[name]

        def handle(self, default=None):
            return 1

        def capture(self):
            return contextlib.nullcontext()

    monkeypatch.setattr(cuda_module, "ConditionalGraph", Graph)
    monkeypatch.setattr(cuda_module, "launch_decide", Mock())
    monkeypatch.setattr(cuda_module, "launch_condition", Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", Mock())
    with torch.no_grad():
        instance = cuda_module.Instance(program, calls, flat, bert.settings.tensors(torch.device("cpu")))
        instance.graph.replay = lambda: Simulator(program, instance.memory, calls).run(instance.inputs)
        for seed in (0, 1):
            spread(bert, 5, seed=seed)
            found = instance.run(flat, bert.settings.tensors(torch.device("cpu")))
            assert torch.equal(found["exit_index"], reference(bert, **kwargs).exit_index)
    spread(bert, 5)
