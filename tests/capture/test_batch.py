"""The batch axis: free from one row on, the same symbol everywhere, and rows that mind their own business."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn

from eecompile import CaptureError, UnsupportedModelError
from eecompile.capture import check
from eecompile.capture import export as front_end
from tests.capture.nets import WIDTH, Net, compiled, made, rows
from tests.support import close, equal_bits
from tests.support import compiled as eecompile


class BranchOnOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] > 1 else 2 * x)


class BranchOnThree(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            x = 2 * x
        return super().forward(x)


class EachRow(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(EachRow, self).forward(row[None]) for row in x])


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Ranked(Net):
    """Rows influence one another through integers only."""

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.arange(10.0 * WIDTH).view(10, WIDTH).cos()
        return super().forward(table[ids] + ids.max())


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


class SequenceFirst(Net):
    """[S, B, 16] -> [B, 3]."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x.mean(0) + shift)


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.rnn(x)[0][:, -1])


class Squeezed(Net):
    """Views and squeezes between the blocks, as old vision models have them after a pooling layer."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).view(x.shape[0], -1, 4).view(-1, WIDTH, 1).squeeze(-1)
        return self.out(x)


class SqueezedWhole(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1).squeeze()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_rows(count):
    model = made(Net)
    fast = compiled(model, rows(4))
    x = rows(count, seed=2)
    with torch.no_grad():
        equal_bits(fast(x), model(x))


def test_a_branch_on_one_row_that_changes_the_answer_is_refused():
    with pytest.raises(UnsupportedModelError) as caught:
        eecompile(made(BranchOnOne), example_inputs=(rows(4),))
    text = str(caught.value)
    assert "something else for a batch of one row" in text
    assert "BranchOnOne, output output" in text
    assert "batches of 2 and 4" in text
    assert "x.shape[0] > 1" in text


def test_a_squeeze_that_drops_the_batch_of_one_row_is_refused_with_its_name():
    with pytest.raises(UnsupportedModelError, match=r"batch of one row(.|\n)*squeeze\(\)"):
        eecompile(made(SqueezedWhole), example_inputs=(rows(4),))


def test_what_torch_burns_in_for_one_row_is_found_by_numbers():
    """Without the guard torch exports the branch for several rows and says nothing; the check must see it."""
    model = made(BranchOnOne)
    call = front_end.flatten_call(model, (rows(4),), {})
    adapter = front_end.FlatAdapter(model, call)
    exported = front_end._export(adapter, [rows(5)], call, (0,), {}, False)
    x = rows(1)
    with torch.no_grad():
        burned = exported.module()(x)
        assert check.difference(burned, model(x)) > 0.1, "torch guards it by now: the setting is not needed any more"
    captured = front_end.from_exported(exported, call, (0,), {}, 4, False)
    problems = check.compare(lambda *t: [exported.module()(*t)], [x], [model(x)], "batch 1")
    assert captured.signature.inputs[0].shape == ("batch", WIDTH)
    assert len(problems) == 1
    assert problems[0].startswith("batch 1: differs")


def test_the_branch_becomes_a_guard_where_torch_can_check_it():
    model = made(BranchOnOne)
    call = front_end.flatten_call(model, (rows(4),), {})
    exported = front_end._export(front_end.FlatAdapter(model, call), [rows(5)], call, (0,), {}, True)
    with pytest.raises((RuntimeError, AssertionError)):
        exported.module()(rows(1))
    assert fx_config.backed_size_oblivious is False, "the setting stays with the export"


def test_an_lstm_is_captured_with_a_free_batch():
    model = made(Recurrent)
    fast = compiled(model, rows(4, 5, WIDTH))
    for count in (1, 2, 5):
        x = rows(count, 5, WIDTH, seed=3)
        with torch.no_grad():
            close(fast(x), model(x), 1e-6)


def test_a_branch_on_three_rows_admits_every_other_number():
    model = made(BranchOnThree)
    fast = compiled(model, rows(4))
    assert fast.notes[-1] == "only where batch != 3"
    with torch.no_grad():
        equal_bits(fast(rows(5)), model(rows(5)))
    with pytest.raises(CaptureError) as caught:
        fast(rows(3))
    text = str(caught.value)
    assert "another branch" in text
    assert "test_batch.py" in text
    assert "if x.shape[0] == 3:" in text
    assert "batch != 3, where batch is x.shape[0]" in text
    assert "got:    batch 3 (x: [3, 16])" in text


def test_a_loop_over_rows_says_that_the_batch_is_fixed_by_it():
    with pytest.raises(CaptureError) as caught:
        eecompile(made(EachRow), example_inputs=(rows(4),))
    text = str(caught.value)
    assert "admits one number of rows only" in text
    assert "a batch of exactly 5" in text
    assert "loop over the rows" in text


def test_one_row_is_no_example():
    with pytest.raises(CaptureError) as caught:
        eecompile(made(Net), example_inputs=(rows(1),))
    text = str(caught.value)
    assert "a batch of 1" in text
    assert "x: [1, 16]" in text
    assert "at least 2 different rows" in text


@pytest.mark.parametrize("example", [rows(4), torch.ones(4, WIDTH), torch.zeros(2, WIDTH)], ids=["rows", "ones", "zeros"])
def test_rows_that_influence_one_another_are_refused_whatever_the_example(example):
    with pytest.raises(UnsupportedModelError) as caught:
        eecompile(made(Centred), example_inputs=(example,))
    text = str(caught.value)
    assert "samples influence one another" in text
    assert "Centred, output output" in text
    assert "mean over the batch axis" in text


def test_rows_that_cannot_be_told_apart_are_said_to_be_unchecked():
    with pytest.raises(UnsupportedModelError, match="influence"):
        eecompile(made(Ranked), example_inputs=(torch.tensor([1, 2, 3]),))
    fast = compiled(made(Ranked), torch.tensor([2, 2, 2]))
    assert any("not checked: whether samples influence one another" in n for n in fast.notes)
    assert "not checked" in str(fast)


def test_batch_norm_of_a_model_in_train_mode_does_not_count_and_the_mode_stays():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), Net()).train()
    before = model[1].running_mean.clone()
    fast = compiled(model, rows(4))
    assert model.training
    assert model[1].training
    assert torch.equal(model[1].running_mean, before)
    x = rows(3, seed=2)
    with torch.no_grad():
        equal_bits(fast(x), model.eval()(x))


def test_two_inputs_share_one_batch():
    fast = compiled(made(Scaled), rows(4), rows(4, 1))
    assert [leaf.shape for leaf in fast.program.signature.inputs] == [("batch", 1), ("batch", WIDTH)]
    with pytest.raises(CaptureError) as caught:
        fast(rows(4), rows(2, 1))
    text = str(caught.value)
    assert "does not fit the captured graph" in text
    assert "where:  x" in text
    assert "batch 2, as in the inputs before it" in text


def test_an_input_of_one_row_is_broadcast_and_has_no_batch():
    model = made(Scaled)
    fast = compiled(model, rows(4), rows(1, 1))
    assert fast.program.signature.inputs[0].batch_axis is None
    with torch.no_grad():
        equal_bits(fast(rows(7), rows(1, 1)), model(rows(7), rows(1, 1)))


def test_inputs_of_other_sizes_are_asked_about():
    with pytest.raises(CaptureError) as caught:
        eecompile(made(Scaled), example_inputs=(rows(4), rows(3, 1)))
    text = str(caught.value)
    assert "the inputs disagree about the batch size" in text
    assert "scale: [3, 1], x: [4, 16]" in text
    assert "batch_axis=" in text


def test_a_batch_on_another_axis():
    model = made(SequenceFirst)
    axes = {"x": 1, "shift": 0}
    fast = compiled(model, rows(5, 4, WIDTH), rows(4), batch_axis=axes)
    assert [leaf.batch_axis for leaf in fast.program.signature.inputs] == [0, 1]
    for count in (1, 6):
        x, shift = rows(5, count, WIDTH, seed=4), rows(count, seed=5)
        with torch.no_grad():
            equal_bits(fast(x, shift), model(x, shift))
            fast.set_thresholds(0.0)
            assert fast.run(x, shift).exit_index.tolist() == [0] * count
            fast.set_thresholds(2.0)


def test_a_batch_axis_for_an_unknown_input_lists_the_inputs():
    with pytest.raises(CaptureError) as caught:
        eecompile(made(SequenceFirst), example_inputs=(rows(5, 4, WIDTH), rows(4)), batch_axis={"y": 1})
    assert "wanted: shift, x" in str(caught.value)


def test_a_single_survivor_of_a_model_that_squeezes():
    model = made(Squeezed)
    fast = compiled(model, rows(4), closed=False)
    x = rows(5, seed=6)
    first = fast.observe(x).confidences[0].sort().values
    fast.set_thresholds([float((first[0] + first[1]) / 2)] + [2.0] * (len(fast.exits) - 1))
    result = fast.run(x)
    assert sorted(result.exit_index.tolist()) == [0, 0, 0, 0, len(fast.exits)]
    last = result.exit_index.argmax()
    with torch.no_grad():
        close(result.output[last], model(x)[last])
