"""Batches: every form that a loader may yield, and those that are refused."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from eecompile.errors import EecompileError
from eecompile.training.batches import batches, length_of, require_repeatable, split

X, Y = torch.randn(6, 3), torch.arange(6)


@pytest.mark.parametrize(
    ("item", "args", "kwargs", "labelled"),
    [
        ((X, Y), 1, [], True),
        ([X, Y], 1, [], True),
        (((X, X), Y), 2, [], True),
        (([X, X], Y), 2, [], True),  # what torch's default collate makes of tuples
        (({"a": X, "b": X}, Y), 0, ["a", "b"], True),
        ({"input_ids": X, "labels": Y}, 0, ["input_ids"], True),
        (UserDict({"input_ids": X, "labels": Y}), 0, ["input_ids"], True),  # transformers' BatchEncoding
        ({"input_ids": X}, 0, ["input_ids"], False),
        (X, 1, [], False),
        ((X, [0, 1]), 1, [], True),
    ],
)
def test_forms(item, args, kwargs, labelled):
    batch = split(item, 4)
    assert (len(batch.args), list(batch.kwargs), batch.labels is not None) == (args, kwargs, labelled)
    assert "batch 4" in batch.where


@pytest.mark.parametrize("item", [(X, X, Y), 3, "text", (X,), None])
def test_refuses_other_forms(item):
    with pytest.raises(EecompileError, match="not a batch") as error:
        split(item, 2)
    assert "batch 2" in str(error.value)
    assert "(inputs, labels)" in str(error.value)


def test_a_triple_is_told_how_to_wrap():
    with pytest.raises(EecompileError, match=r"\(\(a, b\), labels\)"):
        split((X, X, Y), 0)


def test_moves_everything():
    batch = split(({"a": X, "n": 3, "nested": (X, [X])}, {"y": Y}), 0, torch.device("meta"))
    assert batch.kwargs["a"].device.type == "meta"
    assert batch.kwargs["n"] == 3
    assert batch.kwargs["nested"][1][0].device.type == "meta"
    assert batch.labels["y"].device.type == "meta"


def test_a_loader_is_read_again_and_again():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    assert [len(b.args[0]) for b in batches(loader)] == [4, 2]
    assert [b.index for b in batches(loader)] == [0, 1]
    assert length_of(loader) == 2
    require_repeatable(loader, "of a test")


def test_one_shot_iterators_are_refused_for_a_second_pass():
    with pytest.raises(EecompileError, match="read only once, but of a test"):
        require_repeatable((item for item in [(X, Y)]), "of a test")
    assert length_of(item for item in [(X, Y)]) is None


def test_not_iterable():
    with pytest.raises(EecompileError, match="cannot be iterated"):
        list(batches(3))


def test_labels_of_numpy_are_tensors() -> None:
    labels = torch.tensor([1, 0, 2])
    found = split((torch.zeros(3, 2), labels.numpy()), 0).labels
    assert torch.equal(found, labels)
    assert split((torch.zeros(1, 2), ["a"]), 0).labels == ["a"]


ARRAYS = [X.numpy(), X.numpy()[::-1], X.numpy().astype("float64"), np.broadcast_to(X.numpy(), (6, 3))]


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_are_tensors_of_their_dtype(array: np.ndarray) -> None:
    labels = Y.numpy()[::-1]
    for item in ((array, labels), ((array,), labels), ({"x": array}, labels), {"x": array, "labels": labels}):
        batch = split(item, 0)
        (found,) = (*batch.args, *batch.kwargs.values())
        assert found.dtype == torch.as_tensor(array.copy()).dtype
        assert torch.equal(found, torch.as_tensor(array.copy())) and torch.equal(batch.labels, Y.flip(0))
    assert torch.equal(split(array, 0).args[0], torch.as_tensor(array.copy()))


def test_what_is_no_number_stays_as_it_is() -> None:
    words = np.array([["a"]])
    assert split((words, Y), 0).args[0] is words


@pytest.mark.parametrize("item", [(X[:0], Y[:0]), X[:0], ({"x": X[:0]}, Y[:0]), (X.numpy()[:0], Y.numpy()[:0])])
def test_batches_without_rows_are_refused(item) -> None:
    with pytest.raises(EecompileError, match=r"batch without rows[\s\S]*batch 3[\s\S]*\[0, 3\]"):
        split(item, 3)
