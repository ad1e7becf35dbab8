"""Advice: where exits pay and where they cannot, a budget that is kept, and a model that stays as it was."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import EecompileError, advise, eecompile
from eecompile.advice import rivals
from eecompile.advice.measure import _doubts
from eecompile.advice.probe import _constant, _front, _point
from eecompile.advice.report import Advice, Option, decide
from eecompile.advice.sample import Clock, sample
from eecompile.calibration.evidence import Evidence
from eecompile.ir.settings import EXITS
from eecompile.measuring import Rounds


class Deep(nn.Module):
    """Blocks that are worth nothing, after one that says it all for most rows: [B, 8] to [B, 2]."""

    def __init__(self, width: int = 8, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.blocks(x))
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32 * width), nn.Linear(32 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Scrambled(nn.Module):
    """What tells the classes apart is a product that only the last layer takes: no earlier linear head can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0 * self.blocks(x)
        s = 20 * h[:, 0] * h[:, 1] * h[:, 2]
        return torch.stack([-s, s], 1)


@pytest.fixture(scope="module")
def easy() -> tuple[nn.Module, list[Any]]:
    """Two classes that the first block separates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Deep(64).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.down.weight.mul_(0.01)  # type: ignore[union-attr, operator]
        x = torch.randn(1024, 64)
        y = model(x).argmax(1)
    return model, list(zip(x.split(128), y.split(128), strict=True))


@pytest.fixture(scope="module")
def advice(easy: tuple[nn.Module, list[Any]]) -> Advice:
    model, loader = easy
    before = copy.deepcopy(model.state_dict())
    model.train()
    seeded = torch.get_rng_state()
    found = advise(model, loader, minutes=1, only=["branchy", "int8"])
    assert torch.equal(torch.get_rng_state(), seeded)
    assert model.training and all(m.training for m in model.modules()), "modes are as they were"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    return found


def test_where_exits_save_that_is_projected_and_measured(advice: Advice) -> None:
    mine = [o for o in advice.options if o.kind == "strategy"]
    assert [(o.name, o.max_drop) for o in mine] == [("branchy", 0.01), ("branchy", 0.02)]
    for o in mine:
        assert o.low <= o.cost <= o.high < 0.9
        assert o.drop <= (o.max_drop or 0) + 1e-9
        assert o.exits and o.time is not None and o.time > 0
    assert mine[0].cost >= mine[1].cost
    assert advice.accuracy == 1.0
    assert advice.rows == (768, 256) and advice.batch == 128
    assert {o.name for o in advice.options if o.kind == "rival"} | set(advice.skipped) >= {"int8"}
    assert "skipnet" in " ".join(advice.skipped)


def test_the_projection_is_what_fit_and_calibrate_give(easy: tuple[nn.Module, list[Any]], advice: Advice) -> None:
    model, loader = easy
    fast = eecompile(model, "branchy", example_inputs=loader[0][:1])
    fast.fit([*loader[:4], *loader[6:]], trunk=False, progress=False)
    report = fast.calibrate(loader[4:6], max_drop=0.02, delta=None)
    projected = next(o for o in advice.options if o.kind == "strategy" and o.max_drop == 0.02)
    assert projected.cost == pytest.approx(report.expected_cost, rel=0.15)


def test_the_report_says_the_same_in_every_form(advice: Advice) -> None:
    data = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert data["pays"] == advice.pays
    assert len(data["options"]) == len(advice.options)
    text = " ".join(str(advice).split())
    assert "Early exit" in text and "branchy" in text and "int8" in text
    assert all(" ".join(reason.split()) in text for reason in advice.why)


def test_where_no_head_can_know_nothing_is_advised() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Scrambled().eval()
        x = torch.randn(768, 16)
        y = model(x).argmax(1)
    found = advise(model, list(zip(x.split(64), y.split(64), strict=True)), minutes=1, only=["branchy"])
    assert not found.pays and found.strategy is None
    assert found.commands == [] and found.python == []
    assert "hardly a row may exit early" in " ".join(found.why)
    assert "does not pay" in str(found)


def test_a_smaller_model_begins_a_cascade_and_is_compared_with(easy: tuple[nn.Module, list[Any]]) -> None:
    model, loader = easy
    small = nn.Sequential(nn.Linear(64, 2), nn.BatchNorm1d(2, affine=False))
    with torch.no_grad():
        small[0].weight.copy_(model.out.weight)  # type: ignore[union-attr, operator]
        small[0].bias.copy_(model.out.bias)  # type: ignore[union-attr, operator]
    found = advise(model, loader, minutes=1, static=small, only=["cascade"])
    assert small.training
    assert torch.equal(small[1].running_mean, torch.zeros(2)), "it is run in eval mode, and its statistics stay"  # type: ignore[arg-type]
    (rival,) = (o for o in found.options if o.kind == "rival")
    assert rival.name == rivals.STATIC and rival.cost < 0.1 and 0 < rival.drop < 0.3
    assert [o.name for o in found.options if o.kind == "strategy"] == ["cascade", "cascade"]
    if found.strategy is not None:
        assert "SMALL MODEL" in found.commands[0] and len(found.commands) == 2


def test_keyword_arguments(easy: tuple[nn.Module, list[Any]]) -> None:
    model, loader = easy
    found = advise(model, [({"x": x}, y) for x, y in loader], minutes=0.01, only=["branchy", "anytime"])
    assert found.by_name
    assert found.skipped["anytime"] == "no time is left", "the budget is for the first alone"


def test_what_is_cut_short_is_said_and_answered(easy: tuple[nn.Module, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "until", lambda clock, share: 1e-9)
    found = advise(*easy, minutes=0.05, only=["branchy", "int8", "ONNX Runtime"])
    (said,) = (n for n in found.notes if n.startswith("Cut short for branchy"))
    assert "time ran out before the heads of" in said and "thresholds at 1%" in said and "more minutes" in said
    for o in found.options:
        assert o.time is not None and 0 < o.cost <= 1.5 and o.drop <= (o.max_drop or 1.0) + 1e-9
    assert found.skipped[rivals.ONNX] == "it cannot be stopped, and less than 10 s are left"


def test_a_budget_is_shared_among_steps() -> None:
    clock = Clock(100.0)
    clock._start -= 30
    assert clock.until(0.55) == pytest.approx(25, abs=1)
    assert clock.until(0.3) == pytest.approx(10, abs=1), "a step that begins late has some time all the same"


def option(name: str, kind: str, cost: float, drop: float, time: float, most: float | None = 0.01, **more: Any) -> Option:
    exits = more.get("exits", ("exit_0",))
    return Option(name, kind, most, cost, cost - 0.02, cost + 0.02, drop, time, more.get("spread", 0.01), exits)


@pytest.mark.parametrize(
    ("options", "strategy", "said"),
    [
        ([option("a", "strategy", 0.5, 0.01, 0.6)], "a", ["50.0%", "0.60x"]),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("b", "strategy", 0.6, 0.01, 0.5)], "b", ["60.0%"]),
        ([option("a", "strategy", 0.5, 0.01, 0.98)], None, ["no time"]),
        ([option("a", "strategy", 0.5, 0.01, 0.9, spread=0.1)], None, ["no time"]),
        ([option("a", "strategy", 1.0, 0.0, 1.0, exits=())], None, ["hardly a row"]),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("one", "constant", 0.4, 0.01, 0.5)], None, ["one", "as well"]),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("one", "constant", 0.4, 0.03, 0.5)], "a", []),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("one", "constant", 0.7, 0.0, 0.8)], "a", []),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("int8", "rival", 1.0, 0.0, 0.4, None)], "a", ["int8 alone"]),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option("int8", "rival", 1.0, 0.2, 0.4, None)], "a", []),
        ([option("a", "strategy", 0.5, 0.01, 0.6), option(rivals.STATIC, "rival", 0.3, 0.0, 0.4, None)], None, []),
    ],
)
def test_what_is_decided(options: list[Option], strategy: str | None, said: list[str]) -> None:
    best, most, why = decide(options, (0.01,))
    assert (best.name if best else None) == strategy
    assert most == 0.01
    assert all(part in " ".join(why) for part in said)


@pytest.mark.parametrize(("others", "said"), [([0.0, 0.02, 0.9], False), ([0.5, 0.6, None], True), ([None], False)])
def test_times_of_a_busy_machine_are_doubted(others: list[float | None], said: bool) -> None:
    assert bool(_doubts(Rounds({}, others))) == said


def test_points_against_the_definition() -> None:
    """Cheapest within the drop over all thresholds on a grid, and an interval that holds the mean over draws."""
    g = torch.Generator().manual_seed(0)
    n = 400
    sure = torch.rand(n, 2, generator=g)
    wrong = (torch.rand(n, 2, generator=g) > 0.6 + 0.4 * sure).double()
    loss = torch.cat([wrong, torch.zeros(n, 1, dtype=torch.float64)], 1)
    drops = Evidence(sure, loss, lambda _: torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))

    class Kept:
        def with_values(self, name: str, values: list[float]) -> Any:
            assert name == EXITS
            return tuple(values)

    def point(vectors: list[Tensor], most: float) -> Any:
        return _point(drops, Kept(), ["a", "b"], vectors, most, 0)  # type: ignore[arg-type]

    grid = [torch.tensor([a, b]) for a in [*torch.linspace(0, 1, 41), 2.0] for b in [*torch.linspace(0, 1, 41), 2.0]]
    for most in (0.01, 0.05):
        found = point(_front(drops, most), most)
        assert found.cost <= point(grid, most).cost + 1e-9
        assert found.drop <= most + 1e-9
        assert found.low <= found.cost <= found.high
        assert drops.measure(torch.tensor(found.settings))[1] == pytest.approx(found.cost)
    alone = point(_constant(drops), 0.01)
    assert (alone.cost, alone.drop, alone.exits) == (1.0, 0.0, ())


def test_a_sample_fits_the_budget() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return x

    def endless() -> Any:
        while True:
            yield torch.randn(64, 2), torch.zeros(64, dtype=torch.int64)

    class Endless:
        def __iter__(self) -> Any:
            return endless()

    taken, less = (sample(Slow(), Endless(), Clock(1.0), probes) for probes in (2, 4))
    assert 1 <= len(taken.val) < len(taken.fit) and len(taken.fit) + len(taken.val) <= 15
    assert len(less.fit) < len(taken.fit)
    assert taken.rows == (64 * len(taken.fit), 64 * len(taken.val))


def test_a_row_with_many_labels_counts_for_as_many() -> None:
    batch = torch.randn(32, 2), torch.zeros(32, 64, dtype=torch.int64)
    assert sum(sample(nn.Identity(), [batch] * 20, Clock(60), 1).rows) == 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"minutes": 0}, "minutes is out of range"),
        ({"minutes": float("nan")}, "minutes is not a number"),
        ({"minutes": True}, "minutes is not a number"),
        ({"only": "branchy"}, "list of names"),
        ({"only": ["branchi"]}, "did you mean branchy"),
        ({"only": ["int8"]}, "no strategy was asked for"),
        ({"only": ["cascade"]}, "smaller model"),
        ({"static": "small"}, "static="),
        ({"static": nn.Linear(3, 2)}, "does not run on the inputs of the loader"),
        ({"loader": []}, "is empty"),
        ({"loader": [(torch.randn(64, 64), None)] * 4}, "needs labels"),
        ({"loader": [torch.randn(64, 64)] * 4}, "needs labels"),
        ({"loader": [(torch.randn(640, 64), torch.zeros(640, dtype=torch.int64))]}, "too few rows"),
        ({"loader": [(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))] * 4}, "too few rows"),
        ({"loader": [(torch.randn(64, 64), torch.full((64,), 7))] * 4, "only": ["branchy"]}, "label"),
        ({"model": "model"}, "takes a module"),
    ],
)
def test_bad_input(easy: tuple[nn.Module, list[Any]], arguments: dict[str, Any], said: str) -> None:
    given = {"model": easy[0], "loader": easy[1], "minutes": 0.5} | arguments
    with pytest.raises(EecompileError, match=said):
        advise(given.pop("model"), given.pop("loader"), **given)


def test_a_compiled_model_is_refused(easy: tuple[nn.Module, list[Any]]) -> None:
    fast = eecompile(easy[0], "branchy", example_inputs=easy[1][0][:1])
    with pytest.raises(EecompileError, match="compiled already"):
        advise(fast, easy[1])


def test_what_does_not_work_here_is_skipped_with_the_reason(
    easy: tuple[nn.Module, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loader = easy
    fast = eecompile(model, "branchy", example_inputs=loader[0][:1])
    taken = sample(model, loader, Clock(60), 1)
    monkeypatch.setattr(rivals.shutil, "which", lambda _: None)
    monkeypatch.setattr(rivals, "opened", lambda _: 1 / 0)
    skipped: dict[str, str] = {}
    with rivals.rivals(model, fast, taken.val, rivals.AGAINST, Clock(600), skipped.__setitem__) as found:
        assert [r.name for r in found] == [rivals.INT8]
        assert abs(found[0].drop) < 0.05
        assert fast.thresholds.tolist() == eecompile(model, "branchy", example_inputs=loader[0][:1]).thresholds.tolist()
    assert skipped[rivals.COMPILE] == "no C++ compiler is installed"
    assert "ZeroDivisionError" in skipped[rivals.ONNX] or "not installed" in skipped[rivals.ONNX]
