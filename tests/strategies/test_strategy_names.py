"""Names and places that users give to strategies."""

from __future__ import annotations

from enum import Enum

import pytest
import torch
from torch import nn

from eecompile import StrategyError, eecompile, strategies


class Named(str, Enum):
    BRANCHY = "branchy"


def test_a_name_may_be_a_member_of_an_enumeration() -> None:
    assert strategies.strategy(Named.BRANCHY) == strategies.Branchy()


def test_exits_are_needed_where_nothing_else_is_inserted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(StrategyError, match="at least one exit"):
        eecompile(model, strategies.Branchy(exits=None), example_inputs=(torch.randn(4, 8),))  # type: ignore[arg-type]
