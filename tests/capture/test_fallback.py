"""Models that cannot be traced: the error names the line and the way round, and the way round works."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, StrategyError, UnsupportedModelError, strategies
from tests.capture.nets import WIDTH, Net, compiled, made, rows
from tests.support import both, equal_bits, same_result, watch
from tests.support import compiled as eecompile


class OnData(Net):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return super().forward(x)


class ThroughNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(2 * x.numpy()))


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :3])


class CentredOnData(OnData):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Odd(OnData):
    """Which blocks run depends on the number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks if x.shape[0] % 4 == 1 else list(self.blocks)[:2]:
            x = block(x)
        return super().forward(x)


class Flat(OnData):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.stem = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (OnData, "in forward: if bool((x > 1e9).any()):"),
        (ThroughNumpy, "in forward: return super().forward(torch.from_numpy(2 * x.numpy()))"),
    ],
)
def test_the_line_is_named_and_the_way_round_offered(kind, line, capfd, recwarn, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(CaptureError) as caught:
        eecompile(made(kind), example_inputs=(rows(4),))
    text = str(caught.value)
    assert f"{kind.__name__} could not be captured as one graph" in text
    assert line in text
    assert "test_fallback.py:" in text
    assert 'capture="blocks"' in text
    assert caught.value.__cause__ is not None, "torch's own error stays with it"
    out, err = capfd.readouterr()
    assert out + err == "", "torch prints the graph so far; nobody asked for it"
    assert not recwarn.list
    assert not [r.name for r in caplog.records]


def test_a_model_that_fails_by_itself_is_told_apart_from_one_that_cannot_be_traced(capfd):
    with pytest.raises(CaptureError) as caught:
        eecompile(made(Broken), example_inputs=(rows(4),))
    text = str(caught.value)
    assert "Broken itself fails on the example" in text
    assert "in forward: return x + self.down(torch.relu(self.up(x)))" in text
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x3 and 16x64)" in text
    assert "x: [4, 16]" in text
    assert "blocks" not in text
    assert capfd.readouterr() == ("", "")


def test_what_the_model_itself_prints_and_logs_comes_through(capfd):
    class Talks(Net):
        def forward(self, x: Tensor) -> Tensor:
            import sys

            print("to standard error", file=sys.stderr)
            return super().forward(x)

    eecompile(made(Talks), example_inputs=(rows(4),))
    assert "to standard error" in capfd.readouterr().err


def test_blocks_compact_and_agree_with_the_reference():
    model = made(OnData)
    fast = compiled(model, rows(4), capture="blocks")
    assert fast.notes == ("captured as 4 blocks, without a trace",)
    x = rows(7, seed=2)
    with torch.no_grad():
        equal_bits(fast(x), model(x))
    confidences = fast.observe(x).confidences
    order = confidences[0].sort().values
    fast.set_thresholds([float((order[2] + order[3]) / 2), 2.0, 2.0])
    compact, reference = both(fast, x)
    same_result(compact, reference)
    assert sorted(compact.exit_index.tolist()) == [0, 0, 0, 0, 3, 3, 3]
    seen = watch(lambda: fast(x))
    rows_of_blocks = [shape[0] for name in ("addmm", "linear") for shape in seen.shapes.get(name, [])]
    assert rows_of_blocks.count(7) <= 4, "the first block and its head take all rows, and the end outside of the blocks"
    assert rows_of_blocks.count(3) == 6, "the three later blocks, two layers each, take the survivors"


def test_when_nobody_is_left_the_forward_is_abandoned():
    fast = compiled(made(OnData), rows(4), capture="blocks")
    whole = watch(lambda: fast(rows(4))).ops
    fast.set_thresholds(0.0)
    short = watch(lambda: fast(rows(4))).ops
    name = "addmm" if whole["addmm"] else "linear"
    assert (whole[name], short[name]) == (9, 3)


def test_the_models_own_error_comes_out_of_the_fallback():
    fast = compiled(made(OnData), rows(4), capture="blocks")
    with pytest.raises(ValueError, match="too large"):
        fast(rows(4) * 1e12)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in fast.original.modules())
    fast(rows(4))


class LayerDrop(Net):
    """A block is left out of every other step of training."""

    calls = 0

    def trunk(self, x: Tensor) -> Tensor:
        self.calls += 1
        for i, block in enumerate(self.blocks):
            x = x if self.training and i == self.calls % 2 else block(x)
        return x


def test_a_block_that_a_training_step_leaves_out_is_named():
    fast = compiled(made(LayerDrop), rows(4), capture="blocks", closed=False)
    with pytest.raises(CaptureError, match="LayerDrop or stochastic depth") as caught:
        fast.fit([(rows(4), torch.arange(4) % 3)], epochs=1, trunk=True, progress=False)
    assert "3 of 4 calls" in str(caught.value)


def test_the_fallback_has_limits_and_says_them(tmp_path):
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        eecompile(made(CentredOnData), example_inputs=(rows(4),), capture="blocks")
    with pytest.raises(CaptureError, match=r"which blocks run depends on the number of rows"):
        eecompile(made(Odd), example_inputs=(rows(4),), capture="blocks")
    with pytest.raises(CaptureError) as caught:
        eecompile(made(Flat), example_inputs=(rows(4),), capture="blocks")
    assert "needs repeated modules" in str(caught.value)
    with pytest.raises(CaptureError) as caught:
        eecompile(made(OnData), example_inputs=(rows(4),), capture="blocks", blocks="block.*")
    assert "did you mean blocks.*" in str(caught.value)
    shared = strategies.Branchy(head="shared")
    with pytest.raises(StrategyError, match="captured as blocks"):
        eecompile(made(OnData), shared, example_inputs=(rows(4),), capture="blocks")
    fast = compiled(made(OnData), rows(4), capture="blocks")
    with pytest.raises(Exception, match="cannot be saved") as saved:
        fast.save(tmp_path / "x")
    assert "runs the Python model itself" in str(saved.value)
    assert not (tmp_path / "x").exists()


class Masked(nn.Module):
    """A block that adds what it is given to its input; a table has no rows."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, extra=None, table=None):
        x = x if extra is None else x + extra
        return x + self.line(x if table is None else x + table)


class SkipsMask(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(4))

    def forward(self, x, mask):
        given = {} if bool((mask == 1).all()) else self.given(mask)
        for block in self.blocks:
            x = block(x, **{"extra": None, "table": None, **given})
        return self.out(x)

    def given(self, mask):
        return {"extra": mask}


class SkipsBoth(SkipsMask):
    def given(self, mask):
        return {"extra": mask, "table": torch.ones(WIDTH)}


class SkipsTable(SkipsMask):
    def given(self, mask):
        return {"table": torch.ones(WIDTH)}


@pytest.mark.parametrize("kind", [SkipsMask, SkipsBoth, SkipsTable])
def test_arguments_that_the_example_did_not_have_are_refused_once_rows_have_left(kind):
    model, x = made(kind), rows(8)
    fast = compiled(model, x, torch.ones(8, 1), capture="blocks")
    mask = torch.tensor([[1.0], [0.0]]).repeat(4, 1)
    with torch.no_grad():
        assert torch.equal(fast(x, mask), model(x, mask))
        confidence = fast.observe(x, mask).confidences[0].sort().values
        fast.set_thresholds(
            [float(confidence[3:5].mean()), *[2.0] * (len(fast.program.exits) - 1)][: len(fast.program.exits)]
        )
        fast.executor = "compact"
        with pytest.raises(CaptureError, match="other arguments than when the model was captured"):
            fast.run(x, mask)
