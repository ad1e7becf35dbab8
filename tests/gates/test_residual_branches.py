"""Residual branches that no module marks, and blocks with an activation after the addition: found, gated, halted."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import eecompile, strategies
from tests.support import CLOSED, again, both, close, equal_bits, same_result, separating, spreading_thresholds, watch

WIDTH, CLASSES = 8, 3
NEVER = 2.0


class Temporal(nn.Module):
    """A temporal convolution network: the additions are made in a loop of the forward. [B, 3, 12] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, WIDTH, 1)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=2**i, dilation=2**i) for i in range(4))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.out(x.mean(2))


class Recurrent(nn.Module):
    """LSTMs beside shortcuts. [B, 3, 12] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, WIDTH)
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x[:, -1])


class Block(nn.Module):
    """The block of a ResNet with the activation that is asked for."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)
        self.conv2, self.bn2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class Activated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, WIDTH, 1)
        self.blocks = nn.Sequential(*(Block(act) for _ in range(4)))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.first(x)).mean(2))


MODELS = {
    "temporal convolutions": (Temporal, "convs.{}"),
    "LSTMs beside shortcuts": (Recurrent, "layers.{}"),
    "a ResNet with SiLU in place": (lambda: Activated(nn.SiLU(inplace=True)), "blocks.{}:branch"),
    "a ResNet with Hardswish": (lambda: Activated(nn.Hardswish()), "blocks.{}:branch"),
    "a ResNet with ReLU6": (lambda: Activated(nn.ReLU6()), "blocks.{}"),
}


def inputs(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(MODELS))
def compiled(request):
    """The model, gates on its branches with scores that differ from row to row, and the names of the branches."""
    make, name = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    gates = strategies.SkipNet(open_bias=0.0, trunk=False, unit="linear")
    fast = eecompile(model, gates, example_inputs=(inputs(4),))
    spread(fast)
    return model, fast, [name.format(i) for i in range(4)]


def spread(fast) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator))


def rows_through(fast, x: Tensor) -> int:
    """How many rows all branches took together."""
    seen = watch(lambda: fast(x)).shapes
    return sum(s[0] if "conv" in name else s[-2] for name in ("convolution", "mkldnn_rnn_layer") for s in seen.get(name, []))


def test_gates_are_on_the_branches_and_skip_them(compiled):
    model, fast, names = compiled
    assert [g.region for g in fast.program.gates] == names
    x, rng = inputs(8), random.Random(1)
    fast.set_gate_thresholds(0.0)
    full, scores = rows_through(fast, x), fast.observe(x).gate_scores
    with torch.no_grad():
        for result in both(fast, x):
            equal_bits(result.output, model(x))
    for _ in range(3):
        fast.set_gate_thresholds([separating(s, rng) for s in scores.T])
        compact, reference = both(fast, x)
        assert torch.equal(compact.gates, reference.gates)
        assert torch.equal(compact.steps, compact.gates.sum(1))
        close(compact.output, reference.output)
        assert bool(compact.gates.all()) or rows_through(fast, x) < full
    fast.set_gate_thresholds(CLOSED)
    assert rows_through(fast, x) <= full - 4 * 8


def test_rows_halt_after_blocks(compiled):
    model, fast, _ = compiled
    halting = again(fast, strategies.Act(halting_bias=-1.5))
    spread(halting)
    x, seen = inputs(8), set()
    halting.set_halting_threshold(NEVER)
    with torch.no_grad():
        equal_bits(halting(x), model(x))
    full = rows_through(halting, x)
    for threshold in (0.9, 0.5, 0.3):
        halting.set_halting_threshold(threshold)
        compact, reference = both(halting, x)
        assert torch.equal(compact.steps, reference.steps)
        close(compact.output, reference.output)
        seen |= set(compact.steps.flatten().tolist())
    assert len(seen) > 1
    assert rows_through(halting, x) < full


def test_rows_leave_after_blocks(compiled):
    _, fast, _ = compiled
    exits = again(fast, strategies.Branchy(exits=2, head="linear"))
    x = inputs(12)
    exits.set_thresholds(CLOSED)
    full = rows_through(exits, x)
    exits.set_thresholds(spreading_thresholds(exits.observe(x).confidences[:-1]))
    compact, reference = both(exits, x)
    same_result(compact, reference)
    assert set(compact.exit_index.tolist()) == {0, 1, 2}
    assert rows_through(exits, x) < full
