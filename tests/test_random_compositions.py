"""Random sums of exits with gates or halting on residual towers: executors agree, and everything closed is the model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from eecompile import CompiledModule, strategies
from eecompile.strategies import Strategy
from tests.gates.adaptive import rows, tower
from tests.support import agree, both, equal_bits, neutral, nightly, random_settings, same_result
from tests.support import compiled as eecompile

BATCHES = (1, 6)


def halting(rng: random.Random, blocks: int) -> Strategy:
    """Over all blocks or some neighbours, or one block again; as a mean of states, or stopping by chance."""
    options: dict[str, Any] = {"halting": rng.choice(["act", "pondernet"]), "halting_bias": rng.uniform(-1.5, 0.5)}
    options["epsilon"] = rng.choice([0.01, 0.1])
    if rng.random() < 0.4:
        options |= {"blocks": f"blocks.{rng.randrange(blocks)}", "max_steps": rng.randint(2, 4)}
    elif rng.random() < 0.5:
        first = rng.randrange(blocks - 1)
        options["blocks"] = [f"blocks.{i}" for i in range(first, rng.randint(first + 2, blocks))]
    return strategies.Act(**options)


def gates(rng: random.Random, blocks: int) -> Strategy:
    bias = rng.uniform(-0.5, 0.5)
    if rng.random() < 0.4:
        mode = rng.choice(["up_front", "halting", "gates"])
        return strategies.DepthAdaptive(mode=mode, targets="cost", min_depth=rng.randint(0, 1), open_bias=bias)
    return strategies.SkipNet(unit=rng.choice(["linear", "recurrent"]), min_open=rng.randint(0, 1), open_bias=bias)


def exits(rng: random.Random, blocks: int) -> Strategy:
    after = sorted(rng.sample(range(blocks - 1), rng.randint(1, blocks - 1)))
    criterion = rng.choice(["max_probability", "entropy", "margin", "patience"])
    combine = "last" if criterion == "patience" else rng.choice(["last", "last", "ensemble"])
    names = [f"blocks.{i}" for i in after]
    return strategies.Branchy(names, head="linear", criterion=criterion, combine=combine, max_head_share=9.0)


def composed(rng: random.Random) -> tuple[CompiledModule, str]:
    blocks = rng.randint(3, 5)
    inner = rng.choice([gates, halting, halting])(rng, blocks)
    strategy = inner
    if rng.random() < 0.75:
        # where a block is repeated, or rows halt in it, no exit lies within: those places are refused by name
        strategy = exits(rng, blocks) + inner if inner.name != "act" or inner.max_steps is None else inner
    x, _, _ = rows(4, seed=1)
    fast = eecompile(tower(blocks, rng.randrange(99)), strategy, example_inputs=(x,))
    generator = torch.Generator().manual_seed(rng.randrange(99))
    with torch.no_grad():  # scores that differ from row to row
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return fast, str(strategy)


@pytest.mark.parametrize("seed", [nightly(0), 1, *(nightly(s) for s in range(2, 8))])
def test_random_compositions_keep_the_invariants(seed):
    rng = random.Random(seed)
    fast, said = composed(rng)
    for batch in BATCHES:
        x, _, _ = rows(batch, seed=seed)
        neutral(fast)
        with torch.no_grad():
            want = fast.source_graph(x)[0]
        for r in both(fast, x):
            equal_bits(r.output, want)
            assert r.exit_index.tolist() == [len(fast.exits)] * batch, said
        for _ in range(2):
            random_settings(fast, (x,), {}, rng)
            compact = agree(fast, (x,), {})
            fast.executor = "simulate"
            same_result(fast.run(x), compact)
            fast.executor = "auto"
            alone = fast.run(x[-1:])
            assert alone.exit_index[0] == compact.exit_index[-1], said
            torch.testing.assert_close(alone.output[0], compact.output[-1], atol=1e-5, rtol=1e-4)
