"""What a model's own forward changes on it, tracing and trial runs put back: a model that was only compiled never ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.capture.export import capture_export
from eecompile.capture.untouched import untouched
from tests.capture.nets import Net, compiled, made, rows
from tests.support import Fingerprint


class Restless(Net):
    """Counts its calls, caches, lists, and hooks its first block when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.cache: dict[str, Any] = {"inner": {"seen": []}}
        self.shapes: list[int] = [0]
        self.hooked = False
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["inner"]["seen"].append(self.calls)
        self.cache["last"] = self.calls
        self.shapes.append(self.calls)
        self.late = "set by forward"
        if not self.hooked:
            self.hooked = True
            self.blocks[0].register_forward_hook(lambda module, args, output: output * 1.0)
        return super().forward(x)


@pytest.mark.parametrize("capture", ["export", "blocks"])
def test_compiling_undoes_what_a_plain_call_does(capture: str) -> None:
    model = made(Restless)
    before = Fingerprint.of(model)
    fast = compiled(model, rows(4), capture=capture)
    assert before.changes(model) == []
    assert isinstance(fast, CompiledModule)
    with torch.no_grad():
        want = model(rows(3))
    changed = {c.split(":")[0] for c in before.changes(model)}
    assert {".calls", ".cache", ".shapes", ".hooked", ".late", "blocks.0._forward_hooks"} <= changed
    fast.set_thresholds(2.0)
    with torch.no_grad():
        assert torch.equal(fast(rows(3)), want)


def test_capturing_for_training_does_not_move_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    before = Fingerprint.of(model)
    capture_export(model, (rows(4),), {}, training=True)
    assert before.changes(model) == []


def test_fitting_moves_nothing_but_what_it_trains() -> None:
    model = made(Net)
    before = Fingerprint.of(model)
    fast = compiled(model, rows(4), strategy=strategies.Branchy(exits=2))
    fast.fit([(rows(4), torch.tensor([0, 1, 2, 0]))] * 2, epochs=1)
    assert before.changes(model) == []


def test_values_and_containers_by_identity() -> None:
    model = made(Restless)
    kept, steps = model.cache, model.steps
    before = Fingerprint.of(model)
    with untouched(model):
        model.cache = {"inner": {"seen": []}}  # an equal copy, as torch.export leaves behind
        kept["inner"]["seen"].append(3)
        model.steps.add_(2)
        model.shapes[:] = [7]
        del model.hooked
        model.blocks[0].extra = nn.Linear(1, 1)
    assert model.cache is kept
    assert model.steps is steps
    assert before.changes(model) == []


def test_an_error_inside_is_no_excuse() -> None:
    model = made(Restless)
    before = Fingerprint.of(model)

    def fail() -> None:
        with untouched(model):
            model(rows(2))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert before.changes(model) == []


def test_a_lazy_layer_keeps_what_it_became() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with untouched(model):
        model(rows(2))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.shape == (4, rows(2).shape[1])
