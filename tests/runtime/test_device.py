"""Device programs: sums of strategies, the fallback without conditional nodes, what is kept, what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile import MissingDependencyError, StrategyError, eecompile, strategies
from eecompile.errors import UnsupportedModelError
from eecompile.passes.lower import schedule
from eecompile.runtime.device import cuda as cuda_module
from eecompile.runtime.device.build import build, default_buckets
from eecompile.runtime.device.check import lint, source_of, suspicious
from eecompile.runtime.device.cuda import Capture
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.fallback import Bound
from eecompile.runtime.device.machine import allocated, constants
from eecompile.runtime.device.nodes import Call, Copy, Decide, Gather, If, Scatter, Switch, While
from eecompile.runtime.device.warm import Warm
from eecompile.runtime.device.watched import HostValueError, Watched
from tests.compositions import SEQUENCES, SUMS, at_random
from tests.support import again, close, executor, random_thresholds, same_result
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def bert():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6)
    return eecompile(entry.model(), strategies.Branchy(exits=3), example_inputs=args, example_kwargs=kwargs)


def spread(fast, batch: int, seed: int = 0):
    """Inputs, with thresholds at which rows leave everywhere."""
    args, kwargs = ZOO["bert"].inputs(batch, seed=seed)
    confidences = fast.observe(*args, **kwargs).confidences[:-1]
    fast.set_thresholds(random_thresholds(confidences, random.Random(seed), closed=0.0))
    return kwargs


def reference(fast, **kwargs):
    with torch.no_grad(), executor(fast, "reference"):
        return fast.run(**kwargs)


def simulated(fast, **kwargs):
    with torch.no_grad(), executor(fast, "simulate"):
        return fast.run(**kwargs)


@pytest.mark.parametrize("kind", [*SUMS, *SEQUENCES])
def test_gates_halting_and_exits_agree_with_the_reference(bert, kind):
    """Gated regions become a switch of their own, within the switch of their stage."""
    fast = again(bert, {**SUMS, **SEQUENCES}[kind]())
    rng = random.Random(3)
    for batch, structure in ((1, "nested"), (5, "nested"), (9, "machine")):
        fast.device_options = Options(structure=structure)
        args, kwargs = ZOO["bert"].inputs(batch, seed=6)
        for _ in range(2):
            at_random(fast, args, kwargs, rng)
            got, want = simulated(fast, **kwargs), reference(fast, **kwargs)
            assert torch.equal(got.exit_index, want.exit_index)
            torch.testing.assert_close(got.confidence, want.confidence, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.cost, want.cost, atol=1e-6, rtol=0)
            close(got.output, want.output)
            if fast.gates:
                assert torch.equal(got.gates, want.gates)
            if fast.program.halts:
                assert torch.equal(got.steps.expand_as(want.steps), want.steps)
    assert fast.check_no_sync().ok


@pytest.mark.parametrize("buckets", [None, (1, 4), (3,), (2, 5, 7)])
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
    assert (got.stopped, got.late) == ("budget", want.late)
    program = bert._executor("simulate").device_program(bert.program.signature.flatten((), kwargs), last=0)[0]
    assert program.count(Switch) == program.count(If) == 0  # nothing behind the first exit is there


def test_thresholds_change_without_another_program(bert):
    kwargs = spread(bert, 5)
    before = bert.device_program(**kwargs)
    bert.set_thresholds([0.9, 0.3, 0.5])
    assert bert.device_program(**kwargs) is before
    same_result(simulated(bert, **kwargs), reference(bert, **kwargs))
    bert.set_thresholds([2.0, 0.3, 0.5])
    assert bert.device_program(**kwargs) is not before  # another set of open exits


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


class Late:
    """A mailbox whose letters arrive `delay` looks after they were sent."""

    def __init__(self, delay: int) -> None:
        self.delay, self.sent, self.looks = delay, [], 0

    def post(self, number: Tensor) -> None:
        self.sent.append((self.looks + self.delay, int(number)))

    def newest(self) -> int | None:
        self.looks += 1
        there = [n for at, n in self.sent if at < self.looks]
        return there[-1] if there else None


@pytest.mark.parametrize("delay", [0, 1, 2, 99])
@pytest.mark.parametrize("batch", [1, 7])
def test_old_numbers_give_the_same_output(bert, batch, delay):
    """The number of survivors only falls: with an old one more is computed, and nothing else."""
    kwargs = spread(bert, batch, seed=11)
    want = reference(bert, **kwargs)
    flat = bert.program.signature.flatten((), kwargs)
    simulate = bert._executor("simulate")
    program, calls = simulate.device_program(flat)
    memory = simulate.memory() | constants(program, "cpu") | allocated(program.buffers, "cpu")
    with torch.no_grad():
        machine = Bound(program, memory, calls, Late(delay))
        machine.run(flat)
    assert torch.equal(machine.values["exit_index"], want.exit_index)
    close(machine.values["output"], bert.prediction_of(want.output))


def test_a_warm_up_runs_every_body(bert):
    kwargs = spread(bert, 5)
    simulate = bert._executor("simulate")
    flat = bert.program.signature.flatten((), kwargs)
    program, calls = simulate.device_program(flat)
    ran = []
    counted = [lambda *a, i=i, call=call: (ran.append(i), call(*a))[1] for i, call in enumerate(calls)]
    memory = simulate.memory() | constants(program, "cpu") | allocated(program.buffers, "cpu")
    with torch.no_grad():
        Warm(program, memory, counted).run(flat)
    assert len(ran) == program.count(Call)


@pytest.mark.parametrize("structure", ["nested", "machine"])
def test_a_capture_sets_every_condition(bert, structure, monkeypatch):
    """The order of launches and nodes, with a graph that writes down what it is asked for."""
    kwargs = spread(bert, 3)
    bert.device_options = Options(structure=structure)
    simulate = bert._executor("simulate")
    flat = bert.program.signature.flatten((), kwargs)
    program, calls = simulate.device_program(flat)
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
        log.extend(("set", h) for h in arguments[18:19])

    monkeypatch.setattr(cuda_module, "launch_decide", decided)
    monkeypatch.setattr(
        cuda_module, "launch_condition", lambda numbers, element, handle, below=None: log.append(("set", handle))
    )
    memory = simulate.memory() | constants(program, "cpu") | allocated(program.buffers, "cpu")
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


# ------------------------------------------------------------------------------------------------ the checker


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.nonzero(x.sum(1) > 0)
        return x[kept[:, 0]].sum() + x


def test_operators_that_wait_are_named():
    module = fx.symbolic_trace(Counts())
    x = torch.randn(3, 2)
    traced = torch.fx.experimental.proxy_tensor.make_fx(module, tracing_mode="symbolic")(x)
    found = {n.name: reason for n, reason in suspicious(traced)}
    assert any("nonzero" in reason for reason in found.values())
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(HostValueError, match="needs a value on the host"):
            Watched(traced).run(fake)


def test_random_numbers_and_masks_are_named():
    def f(x: Tensor) -> Tensor:
        y = torch.rand_like(x) + x
        return y[y > 0].sum() + torch.index_put(x, [x > 0], torch.zeros(()))

    with torch._subclasses.fake_tensor.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()):
        graph = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        traced = graph(torch.randn(4))
    reasons = [reason for _, reason in suspicious(traced)]
    assert sum("random" in r for r in reasons) == 1
    assert sum("mask" in r for r in reasons) == 1  # filling by a mask needs no count


def test_lint_finds_what_cuda_would_refuse(bert):
    bert.set_thresholds(0.5)
    program = bert.device_program(**ZOO["bert"].inputs(4)[1])
    assert lint(program) == []
    first = next(i for i, n in enumerate(program.nodes) if isinstance(n, Decide))
    without = (*program.nodes[:first], *program.nodes[first + 1 :])
    assert any("nobody has written" in what for what in lint(replace(program, nodes=without)))
    empty = (*program.nodes, If("control.0", ()))
    assert any("empty body" in what for what in lint(replace(program, nodes=empty)))
    unknown = (*program.nodes, Copy("nothing", "output"))
    assert any("not known" in what for what in lint(replace(program, nodes=unknown)))
    stuck = (*program.nodes, While("exit_index", 3, (Scatter((), (), (), "survivors.0", "control.0"),)))
    assert any("never changes" in what for what in lint(replace(program, nodes=stuck)))
    assert any("no buffer output" in w for w in lint(replace(program, buffers=program.buffers[1:])))


def test_a_problem_says_where_in_the_models_code(bert):
    sources = [source_of(n) for n in bert.source_graph.graph.nodes if n.op == "call_function"]
    assert sum('modeling_bert.py", line' in s for s in sources) > 10


def test_the_report_is_data_and_text(bert):
    report = bert.check_no_sync()
    assert report.to_dict()["ok"] is True
    assert "no synchronisation: ok" in str(report)
    assert len(report.programs) == 2  # the example's batch, and one row


# ------------------------------------------------------------------------------------------------ bad input


def test_what_needs_the_host_between_exits_is_refused(bert):
    kwargs = spread(bert, 2)
    with executor(bert, "simulate"):
        with pytest.raises(StrategyError, match="a deadline needs the host"):
            bert.run(**kwargs, deadline_ms=5.0)
        with pytest.raises(StrategyError, match="a stream needs the host"):
            list(bert.stream(**kwargs))
        with pytest.raises(StrategyError, match="measurement"):
            bert.measure_stages(**kwargs)
        assert bert.interrupt() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"buckets": (4, 2)}, "ascending"),
        ({"buckets": ()}, "ascending"),
        ({"buckets": (0, 2)}, "ascending"),
        ({"structure": "flat"}, "unknown structure"),
        ({"kept": 0}, "at least one"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(StrategyError, match=said):
        Options(**options)


def test_no_device_here_is_an_error_with_a_way_out(bert):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MissingDependencyError, match="simulate"):
        bert.executor = "device"
    assert bert.executor == "compact"


def test_blocks_have_no_device_program():
    entry = ZOO["bert"]
    _, kwargs = entry.inputs(4)
    fast = eecompile(entry.model(), strategies.Branchy(exits=1), example_kwargs=kwargs, capture="blocks")
    with pytest.raises(UnsupportedModelError, match="whole model as a graph"):
        fast.executor = "simulate"


def test_widths_are_refused_with_the_reason():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(4)
    fast = eecompile(
        entry.model(), strategies.SelfAdaptive(widths=(0.5, 1.0), open_bias=0.0), example_inputs=args, example_kwargs=kwargs
    )
    with torch.no_grad(), executor(fast, "simulate"), pytest.raises(UnsupportedModelError, match="widened"):
        fast.run(**kwargs)


def test_inputs_that_want_gradients_are_refused():
    entry = ZOO["lenet"]
    (x,), _ = entry.inputs(4)
    fast = eecompile(entry.model(), strategies.Branchy(exits=1), example_inputs=(x,))
    with executor(fast, "simulate"), pytest.raises(StrategyError, match="no gradients"):
        fast.run(x.requires_grad_())


def test_a_schedule_can_be_built_for_any_batch(bert):
    lowered = schedule(bert.program, (0, 1, 2), True, ())
    program = build(bert.program, lowered, bert.program.signature.flatten((), ZOO["bert"].inputs(3)[1]))
    assert program.batch == 3
    assert program.bytes > 0
