"""The invariants of the IR over 37 unmodified models."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile.result import Result
from eecompile.runtime.device.executor import Options
from tests.support import (
    CLOSED,
    Fingerprint,
    both,
    close,
    equal_bits,
    executor,
    random_thresholds,
    same_result,
    shares_parameters,
    spreading_thresholds,
)
from tests.zoo import ZOO

MODELS = sorted(ZOO)
# A third of the batches for each model, all of 1 to 9 over the zoo; 1 is in every third.
BATCHES = [(1, 4, 7), (1, 2, 5, 8), (1, 3, 6, 9)]


def batches(name: str) -> tuple[int, ...]:
    return BATCHES[MODELS.index(name) % 3]


@pytest.mark.parametrize("name", MODELS)
def test_compiling_leaves_the_model_as_it_was(zoo, name):
    animal = zoo(name)
    assert animal.changes == []
    before, after = animal.random_state
    assert torch.equal(before, after), "compiling moved the global random generator"
    shares_parameters(animal.fast, animal.model)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found(zoo, name):
    blocks = zoo(name).fast.program.structure.blocks
    assert len(blocks) == ZOO[name].blocks, [b.name for b in blocks]


@pytest.mark.parametrize("name", MODELS)
def test_closed_exits_give_the_models_own_numbers(zoo, name):
    animal = zoo(name)
    fast = animal.fast
    fast.set_thresholds(CLOSED)
    for batch in batches(name):
        args, kwargs = animal.entry.inputs(batch, seed=1)
        with torch.no_grad():
            want = animal.model(*args, **kwargs)
            compact, reference = both(fast, *args, **kwargs)
            graph = fast.source_graph(*fast.program.signature.flatten(args, kwargs))
        for r in (compact, reference):
            assert fast.program.signature.flatten_output(r.output)
            equal_bits(fast.program.signature.flatten_output(r.output), list(graph))
            if animal.entry.exact:
                equal_bits(r.output, want)
            else:
                close(r.output, want, 1e-6)
            assert r.exit_index.tolist() == [len(fast.exits)] * batch
            assert r.cost.tolist() == [1.0] * batch
        same_result(compact, reference)


@pytest.mark.parametrize("name", MODELS)
def test_compact_agrees_with_the_reference(zoo, name):
    animal = zoo(name)
    fast = animal.fast
    before = Fingerprint.of(animal.model)
    rng = random.Random(MODELS.index(name))
    for batch in batches(name):
        args, kwargs = animal.entry.inputs(batch, seed=2)
        confidences = fast.observe(*args, **kwargs).confidences[:-1]
        drawn = [random_thresholds(confidences, rng) for _ in range(3)]
        spread = spreading_thresholds(confidences) if batch == max(batches(name)) else None
        for thresholds in [*drawn, spread] if spread else drawn:
            fast.set_thresholds(thresholds)
            compact, reference = both(fast, *args, **kwargs)
            same_result(compact, reference)
            with torch.no_grad():
                equal_bits(fast(*args, **kwargs), compact.output)  # the same call without confidences
            check_costs(compact, len(fast.exits))
    assert set(compact.exit_index.tolist()) == set(range(len(fast.exits) + 1))
    assert before.changes(animal.model) == []


def check_costs(result: Result, exits: int) -> None:
    """A later exit never costs less, and confidences are in [0, 1]."""
    by_exit = sorted(zip(result.exit_index.tolist(), result.cost.tolist(), strict=True))
    assert all(a[1] <= b[1] for a, b in zip(by_exit, by_exit[1:], strict=False))
    assert all(0 <= e <= exits for e, _ in by_exit)
    assert bool(((result.confidence >= 0) & (result.confidence <= 1)).all())


@pytest.mark.parametrize("name", MODELS)
def test_a_row_gets_the_same_alone_as_in_its_batch(zoo, name):
    """Compaction is only right where this holds, so capture refuses models where it does not."""
    animal = zoo(name)
    fast = animal.fast
    args, kwargs = animal.entry.inputs(4, seed=3)
    confidences = fast.observe(*args, **kwargs).confidences[:-1]
    fast.set_thresholds(random_thresholds(confidences, random.Random(7), closed=0.0))
    whole = fast.run(*args, **kwargs)
    one_args = tuple(t[2:3] for t in args)
    one_kwargs = {k: v[2:3] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    alone = fast.run(*one_args, **one_kwargs)
    assert alone.exit_index.item() == whole.exit_index[2].item()
    close(fast.prediction_of(alone.output), fast.prediction_of(whole.output)[2:3])


@pytest.mark.parametrize("name", MODELS)
def test_the_device_program_agrees_with_the_reference(zoo, name):
    """Simulated: bucket by bucket, with rows that only fill up. And nothing in it needs the host."""
    fast = zoo(name).fast
    rng = random.Random(MODELS.index(name))
    sizes = (1, 2 + MODELS.index(name) % 14)
    for batch in sizes:
        args, kwargs = zoo(name).entry.inputs(batch, seed=4)
        confidences = fast.observe(*args, **kwargs).confidences[:-1]
        for structure in ("nested", "machine") if batch == sizes[1] else ("nested",):
            fast.set_thresholds(random_thresholds(confidences, rng, closed=0.1))
            fast.device_options = Options(structure=structure)
            with torch.no_grad(), executor(fast, "reference"):
                want = fast.run(*args, **kwargs)
            with torch.no_grad(), executor(fast, "simulate"):
                same_result(fast.run(*args, **kwargs), want)
    args, kwargs = zoo(name).entry.inputs(3)  # few rows have few buckets: each of them is gone through
    report = fast.check_no_sync(*args, **kwargs)
    assert report.ok, str(report)
    assert report.bodies > len(fast.exits)
