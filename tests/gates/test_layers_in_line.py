"""Layers in line without modules that mark blocks: exits, halting and gates fit between them, and work is really saved.

Stacks of recurrent layers in one operator; residual branches added in a loop; an activation after the addition.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import CompiledModule, strategies
from eecompile.capture.export import capture_export
from eecompile.passes import Normalize, run_passes
from eecompile.passes.recurrent import OPERATORS
from eecompile.program import Program
from tests.kinds import spread
from tests.support import CLOSED, again, agree, both, equal_bits, neutral, nightly, separating, spreading_thresholds, watch
from tests.support import compiled as eecompile

WIDTH, CLASSES, STEPS = 8, 3, 5


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
        if self.read == "cells":
            return self.out(states[1][-1])
        if self.read == "slice":
            return self.out(h[-2:].transpose(0, 1).flatten(1))
        return self.out(h.view(self.rnn.num_layers, -1, x.shape[0], h.shape[-1])[-1].transpose(0, 1).flatten(1))  # "view"


class Cells(nn.Module):
    """LSTMs one after the other, or with shortcuts."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4))
        self.out = nn.Linear(WIDTH, CLASSES)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, (h, _) = layer(x)
            x = x + y if self.residual else y
        return self.out(x[:, -1] if self.residual else h[-1])


class Started(nn.Module):
    """A stack that begins with the states of its caller `[L, B, H]` and hands on those that it ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, 3, batch_first=True)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, states = self.rnn(x, (h, c))
        return self.out(y[:, -1]), states


class Temporal(nn.Module):
    """A temporal convolution network: the additions are made in a loop of the forward. [B, 5, 8] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(STEPS, STEPS, 3, padding=2**i, dilation=2**i) for i in range(4))
        self.out = nn.Linear(STEPS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.out(x.mean(2))


class Block(nn.Module):
    """The block of a ResNet with the activation that is asked for."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(STEPS, STEPS, 3, padding=1), nn.BatchNorm1d(STEPS)
        self.conv2, self.bn2 = nn.Conv1d(STEPS, STEPS, 3, padding=1), nn.BatchNorm1d(STEPS)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class Activated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(act) for _ in range(4)))
        self.out = nn.Linear(STEPS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x).mean(2))


RECURRENT = {
    "LSTM, its final state, dropout": lambda: Stack(nn.LSTM, "state", dropout=0.3),
    "GRU, both directions, steps first": lambda: Stack(nn.GRU, "slice", bidirectional=True, batch_first=False),
    "RNN, both directions": lambda: Stack(nn.RNN, "view", bidirectional=True, nonlinearity="relu"),
    "a list of LSTMs": Cells,
}
RESIDUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and the names of their regions
    "LSTMs with shortcuts": (lambda: Cells(residual=True), "layers.{}"),
    "temporal convolutions": (Temporal, "convs.{}"),
    "a ResNet with SiLU in place": (lambda: Activated(nn.SiLU(inplace=True)), "blocks.{}:branch"),
    "a ResNet with Hardswish": (lambda: Activated(nn.Hardswish()), "blocks.{}:branch"),
    "a ResNet with ReLU6": (lambda: Activated(nn.ReLU6()), "blocks.{}"),
}


def inputs(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, STEPS, WIDTH, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layers:
    name: str
    model: nn.Module
    fast: CompiledModule


OFTEN = ("LSTM, its final state, dropout", "GRU, both directions, steps first", "a ResNet with SiLU in place")
NAMES = [n if n in OFTEN else nightly(n) for n in (*RECURRENT, *RESIDUAL)]


@pytest.fixture(scope="module", params=NAMES)
def layers(request) -> Layers:
    name = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (RECURRENT[name]() if name in RECURRENT else RESIDUAL[name][0]()).eval()
    with torch.no_grad():
        for p in model.parameters() if name in RECURRENT else ():
            p.mul_(2.5)  # the states of small random layers hardly differ from row to row
    return Layers(name, model, eecompile(model, strategies.Branchy(exits=3, head="linear"), example_inputs=(inputs(4),)))


def rows_through(fast: CompiledModule, x: Tensor) -> int:
    """How many rows all layers took together: an operator of each step sees them, or the layer."""
    seen = watch(lambda: fast(x)).shapes
    steps = ("mkldnn_rnn_layer", "lstm", "gru_cell", "tanh", "tanh_", "relu", "relu_")
    recurrent = sum(s[-2] for name in steps for s in seen.get(name, []) if len(s) > 1 and s[-1] <= 4 * WIDTH)
    return recurrent + sum(s[0] for s in seen.get("convolution", []))


def full_rows(layers: Layers, fast: CompiledModule, x: Tensor) -> int:
    """The same for the whole model, whose numbers the neutral settings give."""
    neutral(fast)
    with torch.no_grad():
        for result in both(fast, x):
            equal_bits(result.output, layers.model(x))
    found = rows_through(fast, x)
    assert found > 0
    return found


def test_rows_leave_between_layers(layers):
    fast, x = layers.fast, inputs(12)
    if layers.name in RECURRENT:
        assert [e.cut.rsplit(".", 1)[1] for e in fast.exits] == ["0", "1", "2"]
        calls = [n for n in fast.graph_module.graph.nodes if n.target in OPERATORS]
        assert len(calls) == 4, "every layer is a call"
        assert all(n.args[8] is True for n in calls), "between layers the batch comes first"
    full = full_rows(layers, fast, x)
    fast.set_thresholds(spreading_thresholds(fast.observe(x).confidences[:-1]))
    assert set(agree(fast, (x,), {}).exit_index.tolist()) == {0, 1, 2, 3}
    assert rows_through(fast, x) < full


def test_rows_halt_between_layers(layers):
    fast, x = again(layers.fast, strategies.Act(halting_bias=-1.5)), inputs(8)
    spread(fast)
    full, seen = full_rows(layers, fast, x), set()
    for threshold in (0.9, 0.5, 0.3):
        fast.set_halting_threshold(threshold)
        seen |= set(agree(fast, (x,), {}).steps.flatten().tolist())
    assert len(seen) > 1, "every row took the same number of steps"
    assert rows_through(fast, x) < full


def test_rows_skip_layers(layers):
    fast, x = again(layers.fast, strategies.SkipNet(open_bias=0.0, trunk=False, unit="linear")), inputs(8)
    spread(fast)
    if layers.name in RESIDUAL:
        assert [g.region for g in fast.program.choices.gates] == [RESIDUAL[layers.name][1].format(i) for i in range(4)]
    full, rng = full_rows(layers, fast, x), random.Random(1)
    scores = fast.observe(x).trace.gate_scores
    for _ in range(3):
        fast.set_gate_thresholds([separating(s, rng) for s in scores.T])
        result = agree(fast, (x,), {})
        assert bool(result.gates.all()) or rows_through(fast, x) < full
    fast.set_gate_thresholds(CLOSED)
    assert rows_through(fast, x) < full


def normalized(model: nn.Module, training: bool = False) -> Program:
    captured = capture_export(model, (inputs(4),), {}, training=training)
    return run_passes(Program(captured.graph_module, captured.graph_module, captured.signature), [Normalize()])


@pytest.mark.parametrize("kind", [nn.LSTM, nightly(nn.GRU)])
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
    neutral(fast)
    with torch.no_grad():
        equal_bits(fast(x, h, c), model(x, h, c))
    fast.set_thresholds(spreading_thresholds(fast.observe(x, h, c).confidences[:-1]))
    compact = agree(fast, (x, h, c), {})
    assert set(compact.exit_index.tolist()) == {0, 1, 2}
    early = compact.exit_index < 2
    assert bool(compact.output[1][0][:, early].isnan().all()), "the states of the last layer are not known"
    assert not bool(compact.output[1][0][:, ~early].isnan().any())


def test_one_layer_is_left_as_it_is():
    model = Stack(nn.GRU, "last", num_layers=1)
    assert normalized(model).history["normalize"].summary == "1 dead nodes"  # the final state, which nothing reads


@pytest.mark.parametrize("kind", [nn.LSTM, nightly(nn.GRU)])
def test_a_layer_whose_own_state_is_read_always_runs(kind):
    """What a skipped layer would have had as its cell state cannot be known; a GRU has none."""
    model = Stack(kind, "cells" if kind is nn.LSTM else "state").eval()
    fast = eecompile(model, strategies.SkipNet(unit="linear"), example_inputs=(inputs(4),))
    assert [g.region for g in fast.gates] == [f"rnn.{k}" for k in range(1, 3 if kind is nn.LSTM else 4)]
    rng = random.Random(0)
    x = inputs(9)
    scores = fast.observe(x).trace.gate_scores
    fast.set_gate_thresholds([separating(s, rng) for s in scores.T])
    result = agree(fast, (x,), {})
    assert len(set(result.gates.sum(1).tolist())) > 1
    fast.set_gate_thresholds(0.0)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)
