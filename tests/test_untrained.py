"""A compiled model that is not trained answers like the model, says so, and opens once it is trained or set."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile, load, strategies
from eecompile.errors import UntrainedWarning
from eecompile.strategies import Strategy
from eecompile.untrained import is_untrained
from tests.support import equal_bits

STRATEGIES: dict[str, Strategy] = {
    "exits": strategies.Branchy(exits=2),
    "learned score": strategies.Branchy(exits=2, criterion="learned"),
    "ensemble": strategies.Branchy(exits=2, combine="ensemble"),
    "gates": strategies.SkipNet(),
    "exits and gates": strategies.Branchy(exits=2) + strategies.SkipNet(),
    "halting": strategies.Act(),
    "router to exits": strategies.Branchy(exits=2, router=strategies.Router(to="exits")),
    "router to branches": strategies.Branchy(exits=0, router=strategies.Router(to={"light": 0.5})),
}


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Residual(nn.Module):
    """[B, 8] to [B, classes] through four residual blocks."""

    def __init__(self, classes: int = 4, hidden: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([Block(hidden) for _ in range(4)])
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.fc(x)
        return out


def data(rows: int = 32) -> tuple[Tensor, Tensor]:
    """Features that are not scaled, 0 to 255: untrained heads are sure of them."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, 8), generator=g).float(), torch.randint(0, 4, (rows,), generator=g)


@pytest.mark.parametrize("name", STRATEGIES)
def test_untrained_is_the_model_until_it_is_trained(name: str) -> None:
    x, y = data()
    model = Residual().eval()
    fast = eecompile(model, STRATEGIES[name], example_inputs=x)
    want = model(x)
    for executor in ("compact", "reference"):
        fast.executor = executor
        equal_bits(fast(x), want)
    assert fast.untrained
    text = str(fast)
    assert text.count("not trained yet") >= len(fast.untrained)
    assert fast.explain().to_dict()["untrained"] == list(fast.untrained)
    asked = fast.live.wanted
    fast.fit([(x / 255, y)] * 3, epochs=len(fast.strategy.stages) or 1, progress=False)
    left = set(fast.untrained)
    assert not left, left
    assert fast.settings == asked
    assert fast.live.evaluated == fast.live.wanted
    assert "not trained yet" not in str(fast)


@pytest.mark.parametrize("classes", [1, 4], ids=["regressor", "classifier"])
def test_regressors_and_classifiers_answer_like_the_model(classes: int) -> None:
    x, _ = data()
    model = Residual(classes).eval()
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=x)
    result = fast.run(x)
    equal_bits(result.output, model(x))
    assert result.exit_index.eq(2).all()
    assert not any(e.is_open or e.trained for e in fast.exits)


def test_exits_that_come_trained_are_open() -> None:
    x, _ = data()
    shared = eecompile(Residual().eval(), strategies.Branchy(exits=2, head="shared"), example_inputs=x)
    cascade = eecompile({"a": Residual(hidden=32).eval(), "b": Residual().eval()}, "cascade", example_inputs=x)
    for fast in (shared, cascade):
        assert not fast.untrained
        assert all(e.is_open for e in fast.exits)


def trained_by_hand(fast: CompiledModule, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(fast.head_parameters(), lr=0.1)
    fast.train()
    assert all(e.is_open for e in fast.exits)  # heads learn under the thresholds that they will have
    for _ in range(2):
        optimizer.zero_grad()
        fast.loss(fast.run(x), y).backward()
        optimizer.step()
    fast.eval()


def loaded_weights(fast: CompiledModule, x: Tensor, y: Tensor) -> None:
    fast.train()
    fast.heads.load_state_dict({k: v + 0.01 for k, v in fast.heads.state_dict().items()})
    fast.eval()


@pytest.mark.parametrize("trained", [trained_by_hand, loaded_weights])
def test_a_loop_of_ones_own_counts_as_training(trained: Any) -> None:
    x, y = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2, threshold=0.4), example_inputs=x)
    trained(fast, x / 255, y)
    assert not fast.untrained
    assert [e.threshold for e in fast.exits] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("trained", ["unit", "head"])
def test_a_routed_exit_needs_both_its_head_and_the_router(trained: str) -> None:
    x, _ = data()
    fast = eecompile(Residual().eval(), STRATEGIES["router to exits"], example_inputs=x)
    fast.train()
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if f".{trained}." in name:
                parameter.add_(0.1)
    fast.eval()
    assert fast.untrained == ("exit_0", "exit_1")
    assert not any(e.is_open for e in fast.exits)


def test_train_mode_without_training_opens_nothing() -> None:
    x, y = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2) + strategies.SkipNet(), example_inputs=x)
    fast.train()
    assert fast.observe(x).exit_index.eq(2).all()  # in eval mode for the while
    assert all(e.is_open for e in fast.exits)
    fast.eval()
    assert not any(e.is_open for e in fast.exits)
    assert [g.threshold for g in fast.gates] == [0.0] * len(fast.gates)
    with pytest.raises(Exception, match="labels"):
        fast.fit([(x, y + 100)], epochs=1, progress=False)
    assert not any(e.is_open for e in fast.exits)


def test_thresholds_warn_once_and_stay() -> None:
    x, y = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=3), example_inputs=x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fast.set_thresholds(2.0)  # closes: nothing to say
        assert not seen
        fast.set_thresholds({"exit_1": 0.3})
        fast.set_thresholds(0.5)
    assert [w.category for w in seen] == [UntrainedWarning]
    assert "exit_1: not trained yet" in str(seen[0].message)
    fast.fit([(x / 255, y)], epochs=1, progress=False)
    assert [e.threshold for e in fast.exits] == [0.5] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.set_thresholds(0.6)


def test_a_threshold_that_was_set_before_training_is_kept_and_others_open() -> None:
    x, y = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2, threshold=0.7), example_inputs=x)
    fast.set_thresholds({"exit_0": 2.0})
    fast.fit([(x / 255, y)], epochs=1, progress=False)
    assert [e.threshold for e in fast.exits] == pytest.approx([2.0, 0.7])


def test_calibration_settles_and_measuring_does_not() -> None:
    x, y = data(64)
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2), example_inputs=x)
    fast.evaluate([(x, y)])
    assert not any(e.is_open for e in fast.exits)
    with pytest.raises(Exception, match="labels"):
        fast.calibrate([(x, y + 100)])
    assert list(fast.live.wanted["exits"]) == pytest.approx([0.9, 0.9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fast.calibrate([(x, y)], max_drop=0.5)
    chosen = [e.threshold for e in fast.exits]
    assert list(fast.live.wanted["exits"]) == chosen, report
    fast.fit([(x / 255, y)], epochs=1, progress=False)
    assert [e.threshold for e in fast.exits] == chosen


def test_saved_and_loaded(tmp_path: Path) -> None:
    x, y = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2, threshold=0.4) + strategies.SkipNet(), example_inputs=x)
    fast.save(tmp_path / "new")
    again = load(tmp_path / "new")
    assert again.untrained == fast.untrained
    equal_bits(again(x), fast(x))
    again.fit([(x / 255, y)] * 2, epochs=4, progress=False)
    assert not again.untrained
    assert [e.threshold for e in again.exits] == pytest.approx([0.4, 0.4])
    again.save(tmp_path / "trained")
    assert not load(tmp_path / "trained").untrained


def test_a_cascade_of_untrained_compiled_models_waits_for_their_exits() -> None:
    x, y = data()
    member = eecompile(Residual(hidden=32).eval(), strategies.Branchy(exits=1), example_inputs=x)
    fast = eecompile({"small": member, "big": Residual().eval()}, strategies.Cascade(criterion="entropy"), example_inputs=x)
    assert len(fast.untrained) == 1
    (own,) = (e for e in fast.exits if e.name in fast.untrained)
    assert not own.is_open
    fast.fit([(x / 255, y)], epochs=1, progress=False)
    assert all(e.is_open for e in fast.exits)


def test_a_copy_and_a_move_are_no_training() -> None:
    x, _ = data()
    fast = eecompile(Residual().eval(), strategies.Branchy(exits=2), example_inputs=x)
    fast.to("cpu")
    assert len(fast.untrained) == 2
    assert is_untrained(copy.deepcopy(fast.exits[0].head))
