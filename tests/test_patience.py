"""Patience: streaks over the open exits, counted by hand for every set of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, criteria
from tests.answering import answering
from tests.support import CLOSED, both, same_result

NAN = math.nan


def one_hot(*classes: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), 4).float()


# What each of five exits predicts, a column a row: never the same twice; always the same; late; broken off; NaN between.
PREDICTED = [[0, 1, 2, 3, 1], [1, 1, 0, 3, 1], [2, 1, 0, 0, -1], [3, 1, 0, 3, 1], [0, 1, 0, 3, 1]]


def streaks(open_exits: list[int], patience: int) -> list[int]:
    """The exit that each row leaves at, counted by hand; 5 for the model's own end."""
    left = []
    for row in range(5):
        held, streak, at = -1, 0, 5
        for k in open_exits:
            said = PREDICTED[k][row]
            if said < 0:
                held, streak = -1, 0
                continue
            streak = streak + 1 if said == held else 1
            held = said
            if streak >= patience:
                at = k
                break
        left.append(at)
    return left


def patient(exits_in_agreement: int) -> CompiledModule:
    tables = []
    for predicted in PREDICTED:
        table = one_hot(*(max(p, 0) for p in predicted))
        table[[i for i, p in enumerate(predicted) if p < 0]] = NAN
        tables.append(table)
    return answering(criteria.Patience(exits_in_agreement=exits_in_agreement), *tables)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_with_every_set_of_open_exits(patience: int) -> None:
    """A closed exit neither counts nor breaks a streak, whatever it would have said."""
    fast = patient(patience)
    x = torch.arange(5.0)[:, None]
    for open_exits in itertools.chain.from_iterable(itertools.combinations(range(5), k) for k in range(6)):
        fast.set_thresholds([1.0 if k in open_exits else CLOSED for k in range(5)])
        compact, reference = both(fast, x)
        want = streaks(list(open_exits), patience)
        assert reference.exit_index.tolist() == want, open_exits
        assert compact.exit_index.tolist() == want, open_exits
        same_result(compact, reference)


def test_patience_may_be_asked_for_in_parts() -> None:
    """A threshold of a half is met by half the exits that patience asks for."""
    whole, half = patient(4), patient(2)
    whole.set_thresholds(0.5)
    half.set_thresholds(1.0)
    x = torch.arange(5.0)[:, None]
    assert whole.run(x).exit_index.tolist() == half.run(x).exit_index.tolist() == streaks([0, 1, 2, 3, 4], 2)
    assert set(whole.observe(x).confidences[1].tolist()) == {0.25, 0.5}  # type: ignore[index]


def test_temperature_does_not_move_patience() -> None:
    fast = patient(2)
    x = torch.arange(5.0)[:, None]
    fast.set_thresholds(1.0)
    before = fast.run(x).exit_index
    fast.set_temperatures([0.1, 9.0, 3.0, 0.5, 2.0, 7.0])
    assert torch.equal(fast.run(x).exit_index, before)
