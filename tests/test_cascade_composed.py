"""Cascades whose models have gates, halting and exits of their own: brought along compiled, or asked for by a sum."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from eecompile import StrategyError, strategies
from tests import cascades, zoo_plain
from tests.support import CLOSED, agree, both, close, equal_bits, neutral, nightly, random_settings, shares_parameters, watch
from tests.support import compiled as eecompile


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv(x))


PLAIN = {"criterion": "max_probability"}


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(10 * seed + batch))


def small() -> nn.Module:
    return cascades.seeded(lambda: zoo_plain.CifarResNet(2, 2), 1)


def large() -> nn.Module:
    return cascades.seeded(lambda: zoo_plain.CifarResNet(2, 8), 2)


KINDS = {
    "gates": lambda: strategies.SkipNet(open_bias=0.0),
    "recurrent gates": lambda: strategies.SkipNet(unit="recurrent", open_bias=0.0),
    "policy and exits": lambda: strategies.SelfAdaptive(exits=1, parts="every-block", open_bias=0.0, **PLAIN),
    "depth up front": lambda: strategies.DepthAdaptive(targets="cost", open_bias=0.0),
    "halting": lambda: strategies.Act(halting_bias=0.0),
    "halting and exits": lambda: strategies.Branchy(exits=1, **PLAIN) + strategies.Act(halting_bias=0.0),
    "exits": lambda: strategies.Branchy(exits=1, **PLAIN),
}
PAIRS = [
    nightly(("recurrent gates", "recurrent gates")),
    nightly(("gates", "halting")),
    ("exits", "policy and exits"),
    nightly(("gates", "gates")),
    nightly(("policy and exits", "depth up front")),
    nightly(("halting", "halting and exits")),
]


@pytest.mark.parametrize("pair", PAIRS, ids=" then ".join)
def test_compiled_models_bring_gates_and_halting_along(pair):
    models = {"small": small(), "large": large()}
    x = images(6)
    members = {
        n: eecompile(m, KINDS[kind](), example_inputs=(x,)) for (n, m), kind in zip(models.items(), pair, strict=True)
    }
    for k, member in enumerate(members.values()):
        if member.gates:
            member.set_gate_thresholds([0.4 + 0.02 * i + 0.01 * k for i in range(len(member.gates))])
    fast = eecompile(members, strategies.Cascade(order="given"), example_inputs=(x,))
    assert len(fast.gates) == sum(len(m.gates) for m in members.values())
    assert len(fast.program.choices.chains) == sum(len(m.program.choices.chains) for m in members.values())
    assert fast.gate_thresholds.tolist() == [t for m in members.values() for t in m.gate_thresholds.tolist()]
    shares_parameters(fast, nn.ModuleDict(models))
    brought = {id(p) for m in members.values() for p in m.head_parameters()}
    assert {id(p) for p in fast.head_parameters()} == brought
    rng = random.Random(4)
    with torch.no_grad():
        y = images(7, 1)
        fast.set_thresholds(CLOSED)
        for m in members.values():
            if m.exits:
                m.set_thresholds(CLOSED)
        seen = fast.observe(y)
        # every model says in the cascade what it says alone, with its gates and halting
        for at, member in ((len(members["small"].exits), members["small"]), (-1, members["large"])):
            close(seen.outputs[at], member.prediction_of(member(y)))
        for batch in (1, 4, 9):
            y = images(batch, 2)
            neutral(fast)
            for r in both(fast, y):
                equal_bits(r.output, models["large"](y))
            random_settings(fast, (y,), {}, rng)
            agree(fast, (y,), {})


@pytest.mark.parametrize(
    ("added", "exits"),
    [
        nightly(strategies.Anytime(), 2, id="anytime"),
        nightly(strategies.SkipNet(open_bias=0.0), 1, id="skipnet"),
        pytest.param(strategies.Branchy(exits=1) + strategies.SkipNet(open_bias=0.0), 3, id="branchy+skipnet"),
        nightly(strategies.Branchy(exits=1) + strategies.Act(halting_bias=0.0), 3, id="branchy+act"),
    ],
)
def test_a_sum_with_a_cascade_goes_into_its_models(added, exits):
    models = {"small": small(), "large": large()}
    x = images(6)
    fast = eecompile(models, strategies.Cascade() + added, example_inputs=(x,))
    assert len(fast.exits) >= exits
    assert "small" in [e.cut for e in fast.exits]
    inner = [e.cut for e in fast.exits if "." in e.cut]
    assert len(inner) == len(fast.exits) - 1
    rng = random.Random(4)
    for batch in (1, 4, 9):
        y = images(batch, 3)
        neutral(fast)
        with torch.no_grad():
            equal_bits(fast(y), models["large"](y))
        random_settings(fast, (y,), {}, rng)
        agree(fast, (y,), {})
    before = [p.clone() for m in models.values() for p in m.parameters()]
    with torch.no_grad():
        rows = [(x, models["large"](x).argmax(1)) for x in images(32, 5).split(8)]
    heads = [p.clone() for p in fast.head_parameters()]
    fast.fit(rows, epochs=3, trunk=False, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(heads, fast.head_parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in models.values() for p in m.parameters()), strict=True))
    fast.fit(rows, epochs=1, trunk=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in models.values() for p in m.parameters()), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, fast.origin.captured.parameters(), strict=True))
    fast.calibrate(rows, max_drop=0.5, delta=None)
    agree(fast, (images(5, 6),), {})


@pytest.mark.nightly
def test_a_text_cascade_with_heads_inside():
    """Masks go to the heads and gates of the models that have one; a bag of words has no place inside and stays as it is."""
    herd = cascades.reviews()
    args, kwargs = herd.inputs(6, 0)
    inner = strategies.Branchy(exits=1) + strategies.SkipNet("halves", open_bias=0.0)
    fast = eecompile(herd.models, herd.strategy + inner, example_inputs=args, example_kwargs=kwargs)
    assert {e.criterion.name for e in fast.exits} == {"margin"}  # of the cascade: the other has its default
    assert [e.cut.split(".")[0] for e in fast.exits] == ["words", "small", "small", "large"]
    assert any(n.startswith("words: no ") for n in fast.notes)
    rng = random.Random(4)
    for batch in (1, 5, 8):
        _, kwargs = herd.inputs(batch, 1)
        neutral(fast)
        with torch.no_grad():
            equal_bits(fast(**kwargs), herd.by_hand(**kwargs)[-1])
        random_settings(fast, (), kwargs, rng)
        agree(fast, (), kwargs)


def test_a_prepared_model_has_heads_inside():
    herd = cascades.images()
    args, _ = herd.inputs(6, 0)
    fast = eecompile(herd.models, herd.strategy + strategies.Branchy(exits=1), example_inputs=args)
    assert [e.cut.split(".")[0] for e in fast.exits] == ["lenet", "lenet", "resnet", "resnet", "vgg"]
    neutral(fast)
    with torch.no_grad():
        equal_bits(fast(*args), herd.by_hand(*args)[-1])
    random_settings(fast, args, {}, random.Random(1))
    agree(fast, args, {})


def test_a_gated_model_that_is_not_sure_leaves_its_blocks_out():
    models = {"small": small(), "large": cascades.seeded(lambda: zoo_plain.CifarResNet(1, 8), 2)}
    x = images(4)
    fast = eecompile(models, strategies.Cascade() + strategies.SkipNet(), example_inputs=(x,))
    neutral(fast)
    whole = watch(lambda: fast(x)).ops["convolution"]
    fast.set_gate_thresholds(CLOSED)
    gated = sum(g.region.startswith("large") for g in fast.gates)
    assert gated
    assert watch(lambda: fast(x)).ops["convolution"] == whole - 2 * gated


def test_what_cannot_be_brought_along():
    x = images(6)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    layers = [cascades.seeded(lambda: Residual(8), k) for k in range(4)]
    shallow, deep = (
        nn.Sequential(stem, *layers[:k], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)) for k in (2, 4)
    )
    gated = eecompile(shallow.eval(), strategies.SkipNet(), example_inputs=(x,), blocks=None)
    with pytest.raises(StrategyError, match="shared by two models") as caught:
        eecompile({"shallow": gated, "deep": deep.eval()}, "cascade", example_inputs=(x,))
    assert "shallow and " in str(caught.value)
    over_depth = eecompile(small(), strategies.Act(), example_inputs=(x,))
    again = eecompile(large(), strategies.Act("layer1.1", max_steps=2), example_inputs=(x,))
    with pytest.raises(StrategyError, match="halt in different ways") as caught:
        eecompile({"small": over_depth, "large": again}, strategies.Cascade(order="given"), example_inputs=(x,))
    assert "small: over depth, 1 and large: repeats a block, 1" in str(caught.value)
