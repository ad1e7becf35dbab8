"""Settings have one truth: what was set, loaded or written decides in every executor; a running call keeps its own."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eecompile import strategies
from eecompile.errors import StrategyError
from eecompile.ir import settings as families
from eecompile.ir.settings import BRANCHES, CLOSED, EXITS, GATES, HALTING, Settings
from eecompile.training.settings import trained_tensors
from tests.support import compiled as eecompile
from tests.support import executor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.end = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x.mean((2, 3)))


X = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def compiled():
    """Exits and gates in one program, each decided by scores that differ from row to row."""
    torch.manual_seed(0)
    fast = eecompile(Net().eval(), strategies.Branchy(exits=2) + strategies.SkipNet(), example_inputs=(X,))
    with torch.no_grad():
        for gate in fast.gates:
            gate.head.score.weight.mul_(50)
    return fast


@pytest.fixture(scope="module")
def made():
    return compiled()


def medians(fast) -> Settings:
    seen = fast.observe(X)
    exits = [float(c.median()) for c in seen.confidences[:-1]]
    return fast.settings.with_values(EXITS, exits).with_values(GATES, [float(s.median()) for s in seen.trace.gate_scores.T])


def agree(fast) -> None:
    results = []
    for name in ("compact", "reference", "simulate"):
        with torch.no_grad(), executor(fast, name):
            results.append(fast.run(X))
    for r in results[1:]:
        assert torch.equal(r.exit_index, results[0].exit_index)
        assert torch.equal(r.gates, results[0].gates)
        torch.testing.assert_close(r.cost, results[0].cost)


def test_what_is_loaded_is_used(made):
    made.settings = medians(made)
    want = made.run(X).exit_index
    assert len(set(want.tolist())) > 1
    other = compiled()
    other.settings = other.settings.neutral()
    other(X)
    for assign in (False, True):
        other.settings = other.settings.neutral()
        other.load_state_dict(made.state_dict(), assign=assign)
        assert other.settings == made.settings
        assert torch.equal(other.run(X).exit_index, want)
        agree(other)


def test_what_is_written_in_place_is_used(made):
    made.settings = made.settings.neutral()
    made(X)
    made.thresholds.fill_(0.0)
    assert made.settings[EXITS] == (0.0, 0.0)
    assert [e.threshold for e in made.exits] == [0.0, 0.0]
    assert made.run(X).exit_index.tolist() == [0] * len(X)
    agree(made)
    made.thresholds[0] = -1.0
    with pytest.raises(StrategyError, match="a threshold is a number of 0 or more"):
        made(X)
    made.set_thresholds(0.5)


def test_a_running_call_keeps_its_settings(made):
    """Another thread changes everything in the middle of a call."""
    made.settings = now = medians(made)
    for name in ("compact", "reference", "simulate"):
        with torch.no_grad(), executor(made, name):
            want = made.run(X)
            hook = made.gates[0].head.register_forward_hook(
                lambda *_: threading.Thread(target=setattr, args=(made, "settings", now.neutral())).run()
            )
            got = made.run(X)
            hook.remove()
            assert made.settings == now.neutral()
            made.settings = now
        assert torch.equal(got.exit_index, want.exit_index)
        assert torch.equal(got.gates, want.gates)
        torch.testing.assert_close(got.cost, want.cost)


def test_calls_see_one_set_while_others_are_set(made):
    """Gates and exits move together: a call that saw half of a change would have another pair."""
    chosen = [medians(made), made.settings.neutral(), medians(made).with_values(GATES, CLOSED)]
    wanted = []
    for s in chosen:
        made.settings = s
        r = made.run(X)
        wanted.append((r.exit_index.tolist(), r.gates.tolist(), r.cost.tolist()))
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            with torch.no_grad():
                r = made.run(X)
            if (r.exit_index.tolist(), r.gates.tolist(), r.cost.tolist()) not in wanted:
                wrong.append(r)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for t in threads:
        t.start()
    rng = random.Random(0)
    for _ in range(300):
        made.settings = rng.choice(chosen)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong


def test_neutral_is_the_model():
    s = Settings().add(families.exits(["a", "b"]), [0.1, 0.2]).add(families.gates(["g"]), [0.5])
    s = s.add(families.halting(0.0), [1.0]).add(families.branches(["light", "full"]), [0, 0])
    n = s.neutral()
    assert (n[EXITS], n[GATES], n[HALTING], n[BRANCHES]) == ((CLOSED, CLOSED), (0.0,), (CLOSED,), (CLOSED, 0.0))
    assert n.open_exits == ()
    assert not n.halts
    assert s.neutral(EXITS)[GATES] == (0.5,)
    assert s.from_dict(s.to_dict()) == s
    assert s.add(families.gates(["g", "h"]), [0.1, 0.25])[GATES] == (0.5, 0.25)


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), torch.tensor(0.5), np.array([0.5, 0.5]), (0.5, 0.5)])
def test_numbers_of_any_library(given):
    s = Settings().add(families.exits(["a", "b"]), [0, 0])
    assert s.with_values(EXITS, given)[EXITS] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        (EXITS, -0.1, "a threshold is a number of 0 or more"),
        (EXITS, float("nan"), "a threshold is a number of 0 or more"),
        (EXITS, True, "a threshold is a number of 0 or more"),
        (EXITS, "high", "a threshold is a number of 0 or more"),
        (EXITS, [0.1], "wrong number of thresholds"),
        (EXITS, {"c": 0.1}, "no exit has this name"),
        (GATES, 0.5, "this program has no such settings"),
        (HALTING, 0.0, "a halting threshold is a number of above 0"),
        (BRANCHES, [2.0, 2.0], "every route is closed"),
        ("temperatures", float("inf"), "a temperature is a number of above 0"),
    ],
)
def test_numbers_that_are_none(family, given, message):
    s = Settings().add(families.exits(["a", "b"]), [0, 0]).add(families.temperatures(["a", "b"]), [1, 1, 1])
    s = s.add(families.halting(0.0), [1.0]).add(families.branches(["light", "full"]), [0, 0])
    with pytest.raises(StrategyError, match=message):
        s.with_values(family, given)


def test_training_restores_no_settings(made):
    """A checkpoint that is resumed must not put old settings back, of whatever family."""
    found = trained_tensors(made, SimpleNamespace(stages=[SimpleNamespace(heads=True, trunk=True)]))
    assert found
    assert not {name.rpartition(".")[2] for name in found} & set(families.BUFFERS)
    assert {name.rpartition(".")[2] for name, _ in made.named_buffers()} & set(families.BUFFERS)
