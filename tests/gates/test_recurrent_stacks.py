"""Stacks of recurrent layers: exits, halting and gates fit between the layers, and work is really saved."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from eecompile import strategies
from eecompile.capture.export import capture_export
from eecompile.passes import Normalize, run_passes
from eecompile.passes.recurrent import OPERATORS
from eecompile.program import Program
from tests.support import (
    CLOSED,
    again,
    both,
    close,
    equal_bits,
    random_thresholds,
    same_result,
    separating,
    spreading_thresholds,
    watch,
)
from tests.support import compiled as eecompile

WIDTH, CLASSES, STEPS = 8, 3, 5
NEVER = 2.0


class Stack(nn.Module):
    """[B, S, 8] to [B, 3] over one recurrent module; `read` says what the classifier gets."""

    def __init__(self, kind: type[nn.RNNBase], read: str, **options: object) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, **{"num_layers": 4, "batch_first": True, **options})  # type: ignore[arg-type]
        self.read = read
        self.out = nn.Linear((self.rnn.proj_size or WIDTH) * (2 if self.rnn.bidirectional else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.rnn.batch_first
        out, states = self.rnn(x if first else x.transpose(0, 1))
        h = states[0] if isinstance(states, tuple) else states
        if self.read == "last":
            return self.out(out[:, -1] if first else out[-1])
        if self.read == "state":
            return self.out(h[-1])
        if self.read == "both directions":
            return self.out(torch.cat((h[-2], h[-1]), 1))
        if self.read == "slice":
            return self.out(h[-2:].transpose(0, 1).flatten(1))
        return self.out(h.view(self.rnn.num_layers, -1, x.shape[0], h.shape[-1])[-1].transpose(0, 1).flatten(1))  # "view"


class Cells(nn.Module):
    """A list of LSTMs, one after the other."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4))
        self.out = nn.Linear(WIDTH, CLASSES)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, (h, _) = layer(x)
            x = x + y if self.residual else y
        return self.out(x.mean(1)) if self.residual else self.out(h[-1])


class Started(nn.Module):
    """A stack that begins with the states of its caller `[L, B, H]` and hands on those that it ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, 3, batch_first=True)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, states = self.rnn(x, (h, c))
        return self.out(y[:, -1]), states


MODELS = {
    "LSTM, its final state, dropout": lambda: Stack(nn.LSTM, "state", dropout=0.3),
    "GRU, both directions, steps first": lambda: Stack(nn.GRU, "slice", bidirectional=True, batch_first=False),
    "RNN, both directions": lambda: Stack(nn.RNN, "view", bidirectional=True, nonlinearity="relu"),
    "a list of LSTMs": Cells,
}


def inputs(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, STEPS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(MODELS))
def stack(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[request.param]().eval()
    with torch.no_grad():
        for p in model.parameters():  # the states of small random layers hardly differ from row to row
            p.mul_(2.5)
    return model, eecompile(model, strategies.Branchy(exits=3), example_inputs=(inputs(4),))


def spread(fast) -> None:
    """Units with weights large enough for rows to differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator))


def rows_through(fast, x: Tensor) -> int:
    """How many rows all recurrent layers took together: an element-wise operator of each step sees them, or the layer."""
    seen = watch(lambda: fast(x))
    layers = [
        s
        for name in ("mkldnn_rnn_layer", "lstm", "gru_cell", "tanh", "tanh_", "relu", "relu_")
        for s in seen.shapes.get(name, [])
    ]
    return sum(s[-2] for s in layers if s and s[-1] <= 4 * WIDTH)


def test_every_layer_is_a_call_and_no_bit_changes(stack):
    model, fast = stack
    fast.set_thresholds(CLOSED)
    x = inputs(6)
    calls = [n for n in fast.graph_module.graph.nodes if n.target in OPERATORS]
    assert len(calls) == 4
    assert all(n.args[8] is True for n in calls), "between layers the batch comes first"
    with torch.no_grad():
        equal_bits(fast(x), model(x))
        for result in both(fast, x):
            equal_bits(result.output, model(x))


def test_rows_leave_between_layers(stack):
    _, fast = stack
    assert [e.cut.rsplit(".", 1)[1] for e in fast.exits] == ["0", "1", "2"]
    x, rng = inputs(12), random.Random(0)
    full = rows_through(fast_closed(fast), x)
    assert full > 0
    left = set()
    for _ in range(4):
        fast.set_thresholds(random_thresholds(fast.observe(x).confidences[:-1], rng, closed=0.1))
        compact, reference = both(fast, x)
        same_result(compact, reference)
        left |= set(compact.exit_index.tolist())
        if compact.cost.mean() < 0.9:
            assert rows_through(fast, x) < full
    assert len(left) > 2, left


def fast_closed(fast):
    fast.set_thresholds(CLOSED)
    return fast


def test_rows_halt_between_layers(stack):
    model, fast = stack
    halting = again(fast, strategies.Act(halting_bias=-1.5))
    spread(halting)
    x = inputs(8)
    halting.set_halting_threshold(NEVER)
    with torch.no_grad():
        equal_bits(halting(x), model(x))
    full, seen = rows_through(halting, x), set()
    for threshold in (0.9, 0.5, 0.3):
        halting.set_halting_threshold(threshold)
        compact, reference = both(halting, x)
        assert torch.equal(compact.steps, reference.steps)
        close(compact.output, reference.output)
        assert torch.equal(compact.cost, reference.cost)
        seen |= set(compact.steps.flatten().tolist())
    assert len(seen) > 1, "every row took the same number of steps"
    assert rows_through(halting, x) < full


def test_rows_skip_layers(stack):
    model, fast = stack
    gated = again(fast, strategies.SkipNet(open_bias=0.0, trunk=False))
    spread(gated)
    x, rng = inputs(8), random.Random(1)
    gated.set_gate_thresholds(0.0)
    with torch.no_grad():
        equal_bits(gated(x), model(x))
    full, scores = rows_through(gated, x), gated.observe(x).gate_scores
    for _ in range(3):
        gated.set_gate_thresholds([separating(s, rng) for s in scores.T])
        compact, reference = both(gated, x)
        assert torch.equal(compact.gates, reference.gates)
        close(compact.output, reference.output)
        if not bool(compact.gates.all()):
            assert rows_through(gated, x) < full
    gated.set_gate_thresholds(CLOSED)
    assert rows_through(gated, x) < full


def normalized(model: nn.Module, training: bool = False) -> Program:
    captured = capture_export(model, (inputs(4),), {}, training=training)
    return run_passes(Program(captured.graph_module, captured.graph_module, captured.signature), [Normalize()])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_draws_what_the_model_draws(kind):
    model = Stack(kind, "both directions", dropout=0.5, bidirectional=True)
    graph, results = normalized(model, training=True).graph_module, []
    for call in (model.train(), lambda x: graph(x)[0]):
        torch.manual_seed(0)
        results.append(call(inputs(6)))
    equal_bits(results[1], results[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_and_states_that_are_read_all_together():
    model = Stack(nn.LSTM, "view", proj_size=6).eval()
    with torch.no_grad():
        equal_bits(normalized(model).graph_module(inputs(6))[0], model(inputs(6)))


def test_states_of_the_caller_go_to_their_layers():
    model = Started()
    generator = torch.Generator().manual_seed(2)
    x, h, c = inputs(6), *torch.randn(2, 3, 6, WIDTH, generator=generator)
    given = {"x": 0, "h": 1, "c": 1}
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=(x, h, c), batch_axis=given, prediction=0)
    fast.set_thresholds(CLOSED)
    with torch.no_grad():
        equal_bits(fast(x, h, c), model(x, h, c))
    fast.set_thresholds(spreading_thresholds(fast.observe(x, h, c).confidences[:-1]))
    compact, reference = both(fast, x, h, c)
    same_result(compact, reference)
    assert set(compact.exit_index.tolist()) == {0, 1, 2}
    early = compact.exit_index < 2
    assert bool(compact.output[1][0][:, early].isnan().all()), "the states of the last layer are not known"
    assert not bool(compact.output[1][0][:, ~early].isnan().any())


def test_one_layer_is_left_as_it_is():
    model = Stack(nn.GRU, "last", num_layers=1)
    assert normalized(model).history["normalize"].summary == "1 dead nodes"  # the final state, which nobody reads
