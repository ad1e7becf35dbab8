"""Device programs: what the checker finds, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile import MissingDependencyError, StrategyError, strategies
from eecompile.errors import UnsupportedModelError
from eecompile.passes.lower import schedule
from eecompile.runtime.device.build import build
from eecompile.runtime.device.check import lint, source_of, suspicious
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.nodes import Copy, Decide, If, Scatter, While
from eecompile.runtime.device.watched import HostValueError, Watched
from tests.runtime.devices import spread
from tests.support import compiled as eecompile
from tests.support import executor
from tests.zoo import ZOO

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
    assert any("nothing has written" in what for what in lint(replace(program, nodes=without)))
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
    report = bert.check_no_sync(**ZOO["bert"].inputs(4)[1])
    assert report.to_dict()["ok"] is True
    assert "no synchronisation: ok" in str(report)
    assert len(report.programs) == 3  # the example's batch, one row, and that with a deadline
    assert sum("deadline" in line for line in report.programs) == 1


# ------------------------------------------------------------------------------------------------ bad input


def test_what_needs_the_host_between_exits_is_refused(bert):
    kwargs = spread(bert, 2)
    with executor(bert, "simulate"):
        with pytest.raises(StrategyError, match=r"a stream needs the host.*\n.*compact"):
            list(bert.stream(**kwargs))
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
