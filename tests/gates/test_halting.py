"""Adaptive computation time on real models: compact agrees with the reference, a row that halted computes nothing more."""

from __future__ import annotations

import pytest
import torch

from eecompile import StrategyError, strategies
from eecompile.kernels.halt import halt
from tests.capture.nets import Net
from tests.gates.adaptive import rows, tower
from tests.support import again, close, gelu_of, nightly, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO

NEVER = 2.0


def compiled(zoo, name: str, options: dict[str, object]):
    """Units with weights large enough for rows to differ."""
    fast = again(zoo(name).fast, strategies.Act(halting_bias=-0.5, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator))
    return ZOO[name], fast


def test_the_output_is_the_weighted_mean_of_the_states(zoo):
    """By hand, from the states of the captured blocks and the scores of the units, in float64."""
    entry, fast = compiled(zoo, "bert", {})
    args, kwargs = entry.inputs(3, seed=6)
    chain = fast.program.choices.chains[0]
    graph = fast.graph_module
    wanted = [*chain.ys, *(s.name + "_unit" for s in chain.steps), chain.output]
    values = values_of(graph, fast.program.signature.flatten(args, kwargs), wanted)
    weighted = ledger = None
    for k, y in enumerate(chain.ys):
        score = values[chain.steps[k].name + "_unit"].double()
        weighted, ledger, _ = halt(score, values[y].double(), weighted, ledger, 0.01, k == len(chain.ys) - 1)
    torch.testing.assert_close(values[chain.output].double(), weighted, atol=1e-5, rtol=1e-5)
    assert torch.equal(ledger[:, 1].long(), fast.run(*args, **kwargs).steps)


def values_of(graph, flat, names):
    found = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value
            return value

    with torch.no_grad():
        Keep(graph).run(*flat)
    return found


def test_rows_that_halted_are_not_computed(zoo):
    entry, fast = compiled(zoo, "bert", {})
    args, kwargs = entry.inputs(6, seed=3)
    fast.set_halting_threshold(0.35)
    steps = fast.run(*args, **kwargs).steps
    assert len(set(steps.tolist())) > 1
    rows = [shape[0] for shape in gelu_of(watch(lambda: fast(*args, **kwargs)))]
    assert rows == [n for k in range(4) if (n := int((steps > k).sum()))]


@pytest.mark.parametrize("trunk", [nightly(False), True])
def test_a_price_on_steps_makes_them_fewer(trunk):
    x, y, _ = rows(8, seed=4)
    fast = eecompile(tower(4), strategies.Act(halting_bias=-0.5, ponder_price=1.0), example_inputs=(x,))
    before = float(fast.run(x).trace.ponder.mean())
    loader = [(x, y)] * 20
    fast.fit(loader, epochs=1, trunk=trunk, lr=0.02, progress=False)
    assert float(fast.run(x).trace.ponder.mean()) < before - 0.5


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bert", {"blocks": "layer.9"}, "no block has this name"),
        ("hf_resnet", {"per_token": True}, "does not fit the value"),
        ("hf_resnet", {"halting": "pondernet"}, "belongs to one chain"),
        ("lenet", {}, "no chain of blocks"),
        ("nn_encoder_sf", {}, "no chain of blocks"),
    ],
)
def test_mistakes_are_named(zoo, name, options, says):
    with pytest.raises(StrategyError, match=says):
        compiled(zoo, name, options)


PONDERNET = [
    {"halting": "poder"},
    {"prior": 1.0},
    {"beta": -0.1},
    {"threshold": 0.0},
    {"halting": "pondernet", "per_token": True},
]


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"epsilon": 0.0}, {"ponder_price": -1.0}, *PONDERNET])
def test_options_out_of_range(options):
    with pytest.raises(StrategyError):
        strategies.Act(**options)


def test_thresholds_out_of_range(zoo):
    _, fast = compiled(zoo, "bert", {})
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(StrategyError):
            fast.set_halting_threshold(wrong)


def test_exits_read_the_same_state_in_the_training_capture():
    """Inside a chain what the rows keep, after it the weighted state: in both captures of a model without dropout."""
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(6, 16)
    strategy = strategies.Branchy(exits="every-block", head="linear", max_head_share=9.0) + strategies.Act(halting_bias=-0.5)
    fast = eecompile(model, strategy, example_inputs=(x,))
    (chain,) = fast.program.choices.chains
    read = [e.node for e in fast.program.exits]
    assert read == [*(s.value for s in chain.steps[:-1]), chain.output][: len(read)]
    want = fast.observe(x).outputs
    fast.train()
    got = fast.run(x)
    for a, b in zip(got.outputs, want, strict=True):
        close(a.detach(), b)
    fast.loss(got, torch.arange(6) % 3).backward()
    assert all(p.grad is not None for p in fast.head_parameters())
