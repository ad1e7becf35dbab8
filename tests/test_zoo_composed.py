"""The invariants of the IR for sums of strategies, widths and routers, over the zoo."""

from __future__ import annotations

import random

import pytest
import torch

from eecompile import CompiledModule, StrategyError, load
from eecompile.runtime.device.executor import Options
from tests.compositions import SEQUENCES, SUMS, composed
from tests.kinds import spread
from tests.support import again, agree, both, equal_bits, neutral, nightly, random_settings, run_by, same_result
from tests.zoo import ZOO

# One operator for all layers, or blocks that change the shape of what they hand on: nothing to skip, nothing to halt.
NO_REGION = {"alexnet", "lenet", "lstm", "lstmcell", "msdnet", "vgg"}
NO_CHAIN = {*NO_REGION, "nn_encoder_sf"}  # halting needs the batch first
FIRST = ("branchy + skipnet", "branchy + act per position")
SLOW = {"resnet110"}  # 54 blocks: hf_resnet is of the same kind
MODELS = sorted(set(ZOO) - SLOW)
NAMES = sorted(SUMS)
LONG = {("hf_resnet", "widths and exits"), ("bert", "router to several branches")}
CASES = [(name, NAMES[i % len(NAMES)]) for i, name in enumerate(MODELS)]  # each sum with models of several kinds
CASES += [
    ("gpt2_lm", "branchy + act per position"),  # with labels for every position
    ("llama", "widths"),  # of gated MLPs
    ("vit", "widths and exits"),
    ("hf_resnet", "widths and exits"),  # of convolutions and their norms
    ("hf_resnet", "router to exits"),
    ("hf_resnet", "router to several branches"),
    ("bert", "router to several branches"),
    ("gpt2_lm", "router to a lighter branch"),
    ("nn_encoder_sf", "router to several branches"),
]


def compiled(zoo, name: str, kind: str) -> CompiledModule:
    """With units whose scores differ from row to row."""
    base = zoo(name).fast
    fast = again(base, composed(kind, base))
    if fast.routes or fast.widths:
        spread(fast)
    return fast


@pytest.mark.parametrize(("name", "kind"), [nightly(*case) if case in LONG else case for case in CASES])
def test_a_sum_keeps_the_invariants(zoo, name, kind):
    entry = ZOO[name]
    missing = NO_CHAIN if "act" in kind.split() else NO_REGION
    if name in missing and kind in SUMS:
        with pytest.raises(StrategyError, match=r"no region for a gate|no chain of blocks"):
            compiled(zoo, name, kind)
        return
    fast = compiled(zoo, name, kind)
    rng, seen = random.Random(CASES.index((name, kind))), set()
    for batch in {1 + CASES.index((name, kind)) % 9, 4}:
        args, kwargs = entry.inputs(batch, seed=3)
        neutral(fast)
        with torch.no_grad():
            want = list(fast.source_graph(*fast.program.signature.flatten(args, kwargs)))
        for r in both(fast, *args, **kwargs):
            equal_bits(fast.program.signature.flatten_output(r.output), want)
            assert r.exit_index.tolist() == [len(fast.exits)] * batch
        for _ in range(1 if kind in SUMS else 4):
            random_settings(fast, args, kwargs, rng)
            r = agree(fast, args, kwargs)
            seen |= set((r.route if r.route is not None else r.exit_index).tolist())
            if r.widths is not None:
                seen |= set(r.widths.flatten().tolist())
    assert kind in SUMS or len(seen) > 1, "no row ever went another way"


@pytest.mark.parametrize("kind", [k if k in FIRST else nightly(k) for k in (*NAMES, *SEQUENCES)])
def test_every_batch_and_every_end(zoo, kind):
    """On one model all batches, until every exit has been taken and gates or steps have split a batch; simulated too."""
    entry = ZOO["bert"]
    fast = compiled(zoo, "bert", kind)
    rng = random.Random(1)
    taken: set[int] = set()
    split: set[float] = set()
    for batch in range(1, 10):
        args, kwargs = entry.inputs(batch, seed=5)
        random_settings(fast, args, kwargs, rng)
        r = agree(fast, args, kwargs)
        if batch in (5, 9):
            fast.device_options = Options(structure="machine" if batch == 9 else "nested")
            same_result(*(run_by(name, fast, *args, **kwargs) for name in ("simulate", "reference")))
        taken |= set(r.exit_index.tolist())
        split |= (
            {s / 4 for s in r.steps.flatten().tolist()}
            if fast.program.choices.chains
            else set(r.gates.float().mean(0).tolist())
        )
    assert fast.check_no_sync(*entry.inputs(3)[0], **entry.inputs(3)[1]).ok
    assert len(taken) > 1
    assert any(0 < share < 1 for share in split)


@pytest.mark.parametrize("kind", [nightly("branchy + skipnet"), "ann + self_adaptive", nightly("branchy + act")])
def test_saved_and_loaded(zoo, kind, tmp_path):
    entry = ZOO["hf_resnet"]
    fast = compiled(zoo, "hf_resnet", kind)
    args, kwargs = entry.inputs(5, seed=6)
    random_settings(fast, args, kwargs, random.Random(2))
    fast.origin.exported = zoo("hf_resnet").fast.origin.exported  # what `again` leaves out
    fast.save(tmp_path / "program")
    same = load(tmp_path / "program")
    assert same.strategy == fast.strategy
    want, got = run_by("compact", fast, *args, **kwargs), run_by("compact", same, *args, **kwargs)
    equal_bits(got.output, want.output)
    same_result(got, want)
