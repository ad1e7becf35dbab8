"""A refused model: the error names what in the model is the cause, and its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eecompile import CaptureError, UnsupportedModelError, eecompile, strategies
from eecompile.errors import NoPlaceError
from tests.capture.nets import CLASSES, WIDTH, Net, compiled, made, rows


class Dropout(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x))


class Noise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-3 * torch.randn_like(x))


class Coin(Net):
    """One number for the whole batch: rows do not differ, calls do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.rand(()))


class Shifted(Net):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


class Filled(Net):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] += 1.0
        return super().forward(x)


class Viewed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 4, 4).mul_(2.0).flatten(1))


class Quiet(Net):
    """Random numbers in train mode alone, and an input that is copied before it is written to."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x -= 0.5
        return super().forward(F.dropout(x, training=self.training))


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.ReLU(), nn.Linear(WIDTH, CLASSES)).eval()


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stem(x.view(-1, 1, 4, 4)).mean((2, 3)))


RANDOM = "the same input gives another output at every call"
INPUT = "writes to its own input in place"
NORM = "batch norm takes the statistics of the batch"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: made(Dropout), [RANDOM, "bernoulli_", "F.dropout(x)", "training=self.training"]),
        (lambda: made(Noise), [RANDOM, "randn_like", "test_causes.py"]),
        (lambda: made(Coin), [RANDOM, "aten.rand"]),
        (lambda: made(Shifted), [INPUT, "where:  Shifted, input x", "x.clone()"]),
        (lambda: made(Filled), [INPUT, "input x"]),
        (lambda: made(Viewed), [INPUT, "input x"]),
        (lambda: with_norm(nn.BatchNorm1d(WIDTH, track_running_stats=False)), [NORM, "where:  Sequential, 1"]),
        (lambda: Image().eval(), [NORM, "where:  Image, stem.1"]),
    ],
)
def test_the_cause_is_named(model: Callable[[], nn.Module], said: list[str]):
    with pytest.raises(UnsupportedModelError) as caught:
        compiled(model(), rows(8))
    for part in said:
        assert part in str(caught.value)


def test_random_numbers_in_train_mode_and_writes_to_a_copy_are_taken():
    model, x = made(Quiet), rows(4)
    kept = x.clone()
    with torch.no_grad():
        assert torch.equal(compiled(model, x)(x), model(x))
    assert torch.equal(x, kept)


def scripted(_: nn.Module) -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)))


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, rows(4))


def quantized(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scripted, ["a TorchScript module cannot be captured", "where:  RecursiveScriptModule", "before torch.jit"]),
        (traced, ["a TorchScript module cannot be captured", "where:  TopLevelTracedModule"]),
        (quantized, ["holds quantized modules", "where:  blocks.0.up", "before it was scripted or quantized"]),
    ],
)
def test_scripted_and_quantized_modules_are_named(change, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = change(made(Net))
        with pytest.raises(CaptureError) as caught:
            compiled(model, rows(4))
    for part in said:
        assert part in str(caught.value)
    assert "control flow" not in str(caught.value)


class Mixed(Net):
    """All of it, or only its last layer, under an autocast of its own."""

    whole = True

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.whole else self.trunk(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.out(self.trunk(h) if self.whole else h).float()


@pytest.mark.parametrize("strategy", ["branchy", "skipnet"])
def test_an_autocast_of_its_own_around_the_whole_forward_is_named(strategy):
    with pytest.raises(NoPlaceError, match="under an autocast of its own") as caught:
        eecompile(made(Mixed), strategy, example_inputs=(rows(4),))
    assert "take it out of forward" in str(caught.value)


def test_an_autocast_of_its_own_around_a_part_is_taken():
    model = made(Mixed)
    model.whole = False
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(rows(4),))
    fast.set_thresholds(2.0)
    torch.testing.assert_close(fast(rows(3)), model(rows(3)))
