"""Forwards that switch gradients off for all or a part of themselves: exits inside, and no gradient where there was none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import UnsupportedModelError, load, strategies
from tests.capture.nets import Net, compiled, made, rows


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Inference(Net):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class FrozenBody(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.trunk(x)
        return self.out(x)


class Nested(Net):
    """A region within a region, and one that gives two values."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.blocks[0](x)
            with torch.enable_grad():
                y = self.blocks[1](x) * 2
            x, y = self.blocks[2](x + y), y + 1
        with torch.set_grad_enabled(False):
            x = self.blocks[3](x)
        return self.out(x + y)


KINDS = [Decorated, Inference, FrozenBody, Nested]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_exits_inside(kind: type[Net], grad: bool) -> None:
    model, x = made(kind), rows(12)
    with torch.set_grad_enabled(grad):
        fast = compiled(model, x)
        assert torch.equal(fast(x), model(x))
        if kind is not Inference:  # torch.export does not see inference mode: numbers are right, gradients are there
            assert fast(x).requires_grad == model(x).requires_grad
    confidence = fast.observe(x).confidences[0].sort().values
    fast.set_thresholds([float(confidence[5:7].mean()), 2.0, 2.0])
    with torch.no_grad():
        runs = []
        for executor in ("reference", "compact"):
            fast.executor = executor
            runs.append(fast.run(x))
    assert runs[0].exit_index.bincount(minlength=4).tolist() == [6, 0, 0, 6]
    assert torch.equal(runs[0].exit_index, runs[1].exit_index)
    torch.testing.assert_close(runs[0].output, runs[1].output)


def data() -> list[tuple[Tensor, Tensor]]:
    return [(rows(4), torch.tensor([0, 1, 2, 0]))] * 2


@pytest.mark.parametrize("loaded", [False, True], ids=["compiled", "loaded"])
def test_a_frozen_part_is_not_trained_by_heads_within(loaded: bool, tmp_path: Any) -> None:
    model = made(FrozenBody)
    fast = compiled(model, rows(4), strategy=strategies.Branchy(exits=2))
    if loaded:
        fast.fit(data(), epochs=1, trunk=True)
        fast.save(tmp_path / "saved")
        fast = load(tmp_path / "saved")
    before = {n: p.detach().clone() for n, p in fast.program.source.named_parameters()}
    fast.fit(data(), epochs=1, trunk=True)
    after = dict(fast.program.source.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    assert moved == {"out.weight", "out.bias"}


@pytest.mark.parametrize("kind", [Decorated, Inference])
def test_a_model_without_gradients_is_not_trained(kind: type[Net]) -> None:
    fast = compiled(made(kind), rows(4))
    with pytest.raises(UnsupportedModelError, match="runs without gradients"):
        fast.fit(data(), epochs=1, trunk=True)
    fast.fit(data(), epochs=1, trunk=False)


def test_a_program_of_the_users_own() -> None:
    model, x = made(FrozenBody), rows(4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    fast = compiled(program, x)
    with torch.no_grad():
        assert torch.equal(fast(x[:3]), model(x[:3]))
