"""Sums of strategies for the tests, and thresholds at random for whatever a program decides by."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from eecompile import CompiledModule, strategies
from eecompile.strategies import Strategy
from tests.support import CLOSED, both, close, random_thresholds, separating

NEVER = 2.0  # a halting threshold that nothing reaches
EXITS = {"exits": 2, "criterion": "max_probability"}
SUMS: dict[str, Callable[[], Strategy]] = {
    "branchy + skipnet": lambda: strategies.Branchy(**EXITS) + strategies.SkipNet(open_bias=0.0),
    "mebert + skipnet on halves": lambda: strategies.MeBert(head="auto") + strategies.SkipNet("halves", open_bias=0.0),
    "anytime + recurrent skipnet": lambda: strategies.Anytime() + strategies.SkipNet(unit="recurrent", open_bias=0.0),
    "ann + skipnet": lambda: strategies.Ann(gradient_equilibrium=True) + strategies.SkipNet(open_bias=0.0),
    "patient branchy + depth_adaptive gates": lambda: (
        strategies.Branchy(exits=2, criterion="patience") + strategies.DepthAdaptive(mode="gates", open_bias=0.0)
    ),
    "anytime ensemble + depth up front": lambda: (
        strategies.Anytime(combine="ensemble") + strategies.DepthAdaptive(targets="cost", open_bias=0.0)
    ),
    "ann + self_adaptive": lambda: strategies.Ann() + strategies.SelfAdaptive(exits=None, open_bias=0.0),
    "branchy + act": lambda: strategies.Branchy(**EXITS) + strategies.Act(halting_bias=0.0),
    "anytime + act": lambda: strategies.Anytime() + strategies.Act(halting_bias=-0.5),
}

SEQUENCES: dict[str, Callable[[], Strategy]] = {  # for models with positions, or one chain of blocks
    "branchy + act per position": lambda: strategies.Branchy(**EXITS) + strategies.Act(per_token=True, halting_bias=0.0),
    "branchy + pondernet": lambda: strategies.Branchy(**EXITS) + strategies.Act(halting="pondernet", halting_bias=0.0),
}


def as_it_was(fast: CompiledModule) -> None:
    """Every exit closed, every gate open, halting closed."""
    fast.set_thresholds(CLOSED)
    if fast.gates:
        fast.set_gate_thresholds(0.0)
    if fast.program.halts:
        fast.set_halting_threshold(NEVER)


def at_random(fast: CompiledModule, args: Any, kwargs: Any, rng: random.Random) -> None:
    """Thresholds in gaps of what these inputs give, so that rounding decides nothing."""
    as_it_was(fast)
    if fast.program.halts:
        fast.set_halting_threshold(rng.choice([1.0, 0.7, 0.4, NEVER]))
    if fast.gates:
        scores = fast.observe(*args, **kwargs).gate_scores
        assert scores is not None
        fast.set_gate_thresholds([rng.choice([0.0, CLOSED, *[separating(s, rng)] * 4]) for s in scores.T])
    if not fast.exits:
        return
    if fast.exits[0].criterion.stateful:
        patience = fast.exits[0].criterion.patience
        fast.set_thresholds([rng.choice([CLOSED, *((k + 0.5) / patience for k in range(patience))]) for _ in fast.exits])
        return
    closed = [rng.random() < 0.3 for _ in fast.exits]
    fast.set_thresholds([CLOSED if c else 1.0 for c in closed])
    confidences = fast.observe(*args, **kwargs).confidences
    assert confidences is not None
    values = random_thresholds(confidences[:-1], rng, closed=0.0)
    fast.set_thresholds([CLOSED if c else v for c, v in zip(closed, values, strict=True)])


def same_in_all(fast: CompiledModule, got: Any, want: Any) -> None:
    """Two results of a call that say the same of everything, up to rounding."""
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.confidence, want.confidence, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.cost, want.cost, atol=1e-6, rtol=0)
    close(got.output, want.output)
    if fast.gates:
        assert torch.equal(got.gates, want.gates)
    if fast.program.halts:
        # [B, 1] where no row reached the end of a chain in which every position halts by itself
        assert torch.equal(got.steps.expand_as(want.steps), want.steps)
        torch.testing.assert_close(got.ponder.expand_as(want.ponder), want.ponder)


def agree(fast: CompiledModule, args: Any, kwargs: Any) -> Any:
    """Compact says what the reference says, of everything; gives the compact result."""
    compact, reference = both(fast, *args, **kwargs)
    same_in_all(fast, compact, reference)
    with torch.no_grad():
        close(fast(*args, **kwargs), reference.output)
    return compact
