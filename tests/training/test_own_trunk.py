"""Training the trunk changes a copy of the model's weights; what is compared with is the model as it was given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, EecompileError, eecompile, load, strategies
from eecompile.calibration.calibrate import AGAINST
from eecompile.own_trunk import COPIED, IN_PLACE, NOT_SAVED
from tests.kinds import KINDS
from tests.support import Fingerprint, agree, close, equal_bits, nightly

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4
FAST = {"epochs": 2, "lr": 1e-1, "trunk_lr": 1e-1, "progress": False}


class Residual(nn.Module):
    """[B, 8] to [B, 4]; its first and last layers share a weight, and it has a buffer that training moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.fc(self.norm(x))
        return out


STRATEGIES: dict[str, Any] = {
    "exits": lambda: strategies.Branchy(exits=1, trunk=True),
    "exits with the model's own head": lambda: strategies.Branchy(exits=1, head="shared", trunk=True),
    "two stages": lambda: strategies.MeBert(exits=1, head="linear", two_stage=True),
    "halting": lambda: strategies.Act(),
    "gates": lambda: strategies.SkipNet(unit="linear"),
    "adaptive": lambda: strategies.SelfAdaptive(exits=1, head="linear"),
}


@pytest.mark.parametrize("name", [nightly(n) if n in ("adaptive", "two stages") else n for n in STRATEGIES])
def test_the_model_stays_and_is_compared_with(name: str, tmp_path: Any) -> None:
    model = Residual().eval()
    before, want = Fingerprint.of(model), model(X).detach()
    fast = eecompile(model, STRATEGIES[name](), example_inputs=X)
    trunk = [p.detach().clone() for p in fast.trunk_parameters()]
    fast.fit([(X, Y)], **FAST)
    before.check(model)
    assert not all(torch.equal(a, b) for a, b in zip(trunk, fast.trunk_parameters(), strict=True)), "nothing was trained"
    equal_bits(fast.full(X), want)
    assert fast.original is model
    assert COPIED in fast.notes
    copied = fast.running
    assert copied.blocks[2][0].weight is copied.blocks[0][0].weight, "tied weights stay tied"
    agree(fast, (X,), {})
    report = fast.evaluate([(X, Y)])
    assert report.full_accuracy == pytest.approx((want.argmax(1) == Y).double().mean().item())
    twin = copy.deepcopy(fast)
    equal_bits(twin.full(X), want)
    equal_bits(twin(X), fast(X))
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    close(back(X), fast(X))
    assert NOT_SAVED in back.notes
    assert COPIED not in back.notes


@pytest.mark.parametrize("kind", ["cascade", "captured as blocks", "router to branches"])
def test_other_programs(kind: str) -> None:
    program = KINDS[kind].build()
    fast, (args, kwargs) = program.fast, program.kind.call(6, 0)
    want = fast.full(*args, **kwargs)
    fast.fit(program.kind.batches(), trunk=True, **FAST)
    assert program.changes() == []
    equal_bits(fast.full(*args, **kwargs), want)
    agree(fast, args, kwargs)


def test_a_second_fit_goes_on_and_new_weights_of_the_model_do_not_reach_the_trained_ones() -> None:
    model = Residual().eval()
    fast = eecompile(model, strategies.Act(), example_inputs=X)
    fast.fit([(X, Y)], **FAST)
    own, first = list(fast.trunk_parameters()), fast(X)
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    equal_bits(fast(X), first)
    equal_bits(fast.full(X), model(X).detach())
    fast.fit([(X, Y)], **FAST)
    assert all(a is b for a, b in zip(own, fast.trunk_parameters(), strict=True))
    assert not torch.equal(fast(X), first)


def test_calibrate_names_what_it_compares_with() -> None:
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=1, trunk=True), example_inputs=X)
    assert AGAINST not in fast.calibrate([(X, Y)], max_drop=0.5, delta=None).notes
    fast.fit([(X, Y)], **FAST)
    assert AGAINST in fast.calibrate([(X, Y)], max_drop=0.5, delta=None).notes


def test_in_place_says_so() -> None:
    model = Residual().eval()
    fast = eecompile(model, strategies.Branchy(exits=1, trunk=True), example_inputs=X)
    before = model(X).detach()
    fast.fit([(X, Y)], train_in_place=True, **FAST)
    assert not torch.equal(model(X), before)
    assert all(p is q for p, q in zip(model.parameters(), fast.running.parameters(), strict=True))
    fast.set_thresholds(2.0)
    close(fast(X), model.eval()(X).detach())
    assert IN_PLACE in fast.notes
    assert "trained in place" in str(fast)


def test_heads_alone_need_no_copy() -> None:
    model = Residual().eval()
    fast = eecompile(model, strategies.Act(), example_inputs=X)
    fast.fit([(X, Y)], epochs=1, trunk=False, progress=False)
    assert fast.running is model
    assert fast.given is None


def test_a_loop_of_ones_own() -> None:
    model = Residual().eval()
    before = Fingerprint.of(model)
    fast = eecompile(model, strategies.Branchy(exits=1, trunk=True), example_inputs=X)
    fast.own_trunk()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    fast.train()
    fast.loss(fast.run(X), Y).backward()
    optimizer.step()
    fast.eval()
    before.check(model)
    assert not torch.equal(fast.running(X), model(X))


def test_models_that_cannot_be_copied_or_trained_are_left_alone() -> None:
    class Locked(Residual):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle '_thread.lock' object")

    fast = eecompile(Locked().eval(), strategies.Branchy(exits=1), example_inputs=X)
    with pytest.raises(EecompileError, match="train_in_place=True") as caught:
        fast.fit([(X, Y)], trunk=True, progress=False)
    assert "_thread.lock" in str(caught.value)

    class Counting(Residual):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(x) * (1 + self.calls)

    counting = Counting().eval()
    fast = eecompile(counting, strategies.Branchy(exits=1), example_inputs=X)
    with pytest.raises(CaptureError):
        fast.fit([(X, Y)], trunk=True, progress=False)
    assert fast.running is counting
