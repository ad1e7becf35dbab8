"""Cascades equal their models run by hand, row by row, and do not do the work that they save."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eecompile import CompiledModule, strategies
from eecompile.capture.export import capture_export
from tests import cascades, zoo_plain
from tests.cascades import BATCHES, Herd
from tests.support import (
    CLOSED,
    again,
    both,
    close,
    equal_bits,
    nightly,
    random_thresholds,
    same_result,
    watch,
)
from tests.support import compiled as eecompile


@dataclass(frozen=True)
class Pack:
    herd: Herd
    fast: CompiledModule


@pytest.fixture(scope="module")
def packs() -> dict[str, Pack]:
    return {"images": Pack(herd := cascades.images(), herd.compiled())}


@pytest.fixture(params=["images", nightly("text")])
def pack(request: pytest.FixtureRequest, packs: dict[str, Pack]) -> Iterator[Pack]:
    if request.param not in packs:
        packs[request.param] = Pack(herd := cascades.reviews(), herd.compiled())
    with torch.no_grad():
        yield packs[request.param]


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def test_a_cascade_is_its_models_run_by_hand(pack):
    """Row by row: the first model whose confidence reaches its threshold answers."""
    assert [b.name for b in pack.fast.program.structure.blocks] == list(pack.herd.models)
    assert [e.cut for e in pack.fast.exits] == list(pack.herd.models)[:-1]
    rng = random.Random(3)
    taken: set[int] = set()
    for batch in BATCHES:
        args, kwargs = pack.herd.inputs(batch, 2)
        given = pack.herd.by_hand(*args, **kwargs)
        pack.fast.set_thresholds(CLOSED)
        for call in (pack.fast, pack.fast.full, pack.fast.original):
            equal_bits(call(*args, **kwargs), given[-1])
        outputs = [logits(o) for o in given]
        seen = pack.fast.observe(*args, **kwargs)
        for mine, want in zip(seen.outputs, outputs, strict=True):
            close(mine, want)
        for _ in range(3):
            thresholds = random_thresholds(seen.confidences[:-1], rng)
            pack.fast.set_thresholds(thresholds)
            compact, reference = both(pack.fast, *args, **kwargs)
            same_result(compact, reference)
            close(logits(pack.fast(*args, **kwargs)), logits(compact.output))
            for row in range(batch):
                sure = [float(c[row]) >= t for c, t in zip(seen.confidences, [*thresholds, 0.0], strict=False)]
                first = sure.index(True) if True in sure else len(outputs) - 1
                assert compact.exit_index[row].item() == first
                close(logits(compact.output)[row], outputs[first][row])
                taken.add(first)
    assert taken == {0, 1, 2}


def test_costs_are_the_flops_that_run(packs):
    pack = packs["images"]
    args, _ = pack.herd.inputs(4, 0)
    spent = []
    for name, model in pack.herd.models.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(cascades.Grey()(*args) if name == "lenet" else args[0])
        spent.append(counter.get_total_flops())
    for closed in ((), (0,), (1,), (0, 1)):
        is_open = [k not in closed for k in range(2)]
        want = [sum(spent[j] for j in range(k + 1) if j == k or is_open[j]) / spent[-1] for k in range(2)]
        want.append(1.0 + sum(s for s, o in zip(spent, is_open, strict=False) if o) / spent[-1])
        torch.testing.assert_close(pack.fast.costs(is_open), torch.tensor(want), atol=2e-4, rtol=0)
    assert pack.fast.program.total_flops == pytest.approx(spent[-1] / 4)


@pytest.mark.parametrize("closed", [(), (0,), (1,), (0, 1)])
def test_a_closed_model_does_not_run(packs, closed):
    """Convolutions are counted (LeNet has 2, the residual net 7, VGG 6), and rectifiers."""
    pack = packs["images"]
    args, _ = pack.herd.inputs(5, 4)
    pack.fast.set_thresholds([CLOSED if k in closed else 1.0 + 1e-9 for k in range(2)])
    pack.fast.set_thresholds([CLOSED if k in closed else 1.0 for k in range(2)])  # open, but no row is that sure
    seen = watch(lambda: pack.fast(*args))
    assert seen.ops["convolution"] == sum(c for k, c in enumerate((2, 7, 6)) if k not in closed)
    # in-place ones, as VGG has, are never dead code to FX
    assert seen.ops["relu"] + seen.ops["relu_"] == sum(c for k, c in enumerate((4, 7, 7)) if k not in closed)


def test_later_models_see_only_the_rows_that_are_left(packs):
    pack = packs["images"]
    args, _ = pack.herd.inputs(9, 5)
    confidence = pack.fast.observe(*args).confidences[0]
    low, high = confidence.sort().values[[3, 4]].tolist()
    pack.fast.set_thresholds([(low + high) / 2, CLOSED])
    seen = watch(lambda: pack.fast(*args))
    assert {shape[0] for shape in seen.shapes["convolution"]} == {9, 4}
    pack.fast.set_thresholds([0.0, 0.0])
    assert watch(lambda: pack.fast(*args)).ops["convolution"] == 2


@pytest.mark.parametrize("dynamic", [None, {}], ids=["any length", "one length"])
def test_a_bag_of_words_is_a_model_like_any_other(dynamic):
    """`nn.EmbeddingBag` writes its batch as a quotient of sizes."""
    words = cascades.seeded(cascades.Words, 1)
    other = cascades.seeded(lambda: nn.Sequential(cascades.Words(width=64), nn.Tanh(), nn.Linear(2, 2)), 2)
    ids = torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(0))
    (leaf,) = capture_export(words, (ids,), {}, dynamic=dynamic).signature.outputs
    assert (leaf.shape, leaf.batch_axis) == (("batch", 2), 0)
    both_ = eecompile([words, other], strategies.Cascade(order="given"), example_inputs=(ids,), dynamic=dynamic)
    with torch.no_grad():
        for batch in (1, 4, 9):
            x = torch.randint(0, 300, (batch, 20), generator=torch.Generator().manual_seed(batch))
            both_.set_thresholds(CLOSED)
            equal_bits(both_(x), other(x))
            both_.set_thresholds(random_thresholds(both_.observe(x).confidences[:-1], random.Random(1), closed=0.0))
            same_result(*both(both_, x))


class Deeper(nn.Module):
    """A stem and some layers, both shared with other models, and a classifier of its own."""

    def __init__(self, stem: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.layers, self.head = stem, nn.ModuleList(layers), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.relu_(layer(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_layers_that_models_share_run_once():
    """Subsets of layers as models: the stem, in-place ReLUs and all, is computed once and handed on."""
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True)
    )
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
    models = [Deeper(stem, layers[:k]).eval() for k in (1, 2, 4)]
    x = torch.randn(6, 3, 12, 12)
    fast = eecompile(models, "cascade", example_inputs=(x,))
    assert fast.program.capture.models == ("deeper_0", "deeper_1", "deeper_2")
    rng = random.Random(0)
    with torch.no_grad():
        for batch in BATCHES:
            y = 3 * torch.randn(batch, 3, 12, 12)
            fast.set_thresholds(CLOSED)
            equal_bits(fast(y), models[-1](y))
            fast.set_thresholds(random_thresholds(fast.observe(y).confidences[:-1], rng))
            same_result(*both(fast, y))
        fast.set_thresholds(1.0)
        assert watch(lambda: fast(y)).ops["convolution"] == 6  # by hand: 3 + 4 + 6
    costs = fast.costs([True, True]).tolist()
    assert costs[-1] == pytest.approx(1.0, abs=1e-3)  # nothing was done in vain but two classifiers
    assert costs[0] < costs[1] < 1.0
    assert fast.costs([False, True]).tolist()[1] == pytest.approx(costs[1], abs=1e-3)


def test_compiled_models_bring_their_exits_along():
    """Heads, thresholds and temperatures stay; what they read is found in the composite's graph."""
    small = cascades.seeded(lambda: zoo_plain.CifarResNet(2, 2), 1)
    large = cascades.seeded(lambda: zoo_plain.CifarResNet(2, 8), 2)
    x = 2 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    branchy = strategies.Branchy(exits=["layer1.1", "layer2.0"], criterion="max_probability")
    first, second = (eecompile(m, branchy, example_inputs=(x,)) for m in (small, large))
    first.set_thresholds([0.2, 0.3])
    first.set_temperatures([1.5, 0.7, 2.0])
    fast = eecompile({"small": first, "large": second}, "cascade", example_inputs=(x,))
    assert [e.cut for e in fast.exits] == ["small.layer1.1", "small.layer2.0", "small", "large.layer1.1", "large.layer2.0"]
    assert fast.thresholds.tolist() == pytest.approx([0.2, 0.3, 0.9, 0.9, 0.9])
    assert fast.temperatures.tolist() == pytest.approx([1.5, 0.7, 2.0, 1.0, 1.0, 1.0])
    rng = random.Random(0)
    with torch.no_grad():
        for batch in (1, 4, 9):
            y = 2 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
            seen = fast.observe(y)
            parts = [first.observe(y), second.observe(y)]
            for mine, own in zip(seen.outputs, [t for p in parts for t in p.outputs], strict=True):
                close(mine, own)
            for mine, own in zip(seen.confidences, [t for p in parts for t in p.confidences], strict=True):
                close(mine, own)
            fast.set_thresholds(CLOSED)
            equal_bits(fast(y), large(y))
            for _ in range(2):
                fast.set_thresholds(random_thresholds(seen.confidences[:-1], rng))
                same_result(*both(fast, y))
        fast.set_thresholds([CLOSED, 1.0, CLOSED, CLOSED, CLOSED])  # the small model runs up to its second exit alone
        assert watch(lambda: fast(y)).ops["convolution"] == 7 + 1 + 13
    heads = {id(p) for p in [*first.heads.parameters(), *second.heads.parameters()]}
    assert {id(p) for p in fast.head_parameters()} == heads  # what fit trains


def test_one_model_is_a_cascade_over_its_layers():
    model = cascades.seeded(lambda: zoo_plain.CifarResNet(2, 4), 5)
    x = 2 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fast = eecompile(model, "cascade", example_inputs=(x,))
    assert len(fast.exits) == 2
    with torch.no_grad():
        fast.set_thresholds(CLOSED)
        equal_bits(fast(x), model(x))
        fast.set_thresholds(random_thresholds(fast.observe(x).confidences[:-1], random.Random(0), closed=0.0))
        same_result(*both(fast, x))
    other = again(fast, strategies.Cascade(exits=("layer1.1", 0.7), head="mlp"))
    assert [e.head_kind for e in other.exits] == ["mlp", "mlp"]


def test_patience_counts_over_models(packs):
    """State crosses from model to model with the rows that carry it."""
    herd = packs["images"].herd
    from dataclasses import replace

    args, _ = herd.inputs(8, 7)
    patient = replace(herd.strategy, criterion="patience")
    fast = eecompile(herd.models, patient, example_inputs=args)
    for thresholds in ([1.0, 1.0], [CLOSED, 1.0], [0.4, 1.0]):
        fast.set_thresholds(thresholds)
        same_result(*both(fast, *args))
