"""A monitor inside a row server: it sees what was answered, and its own faults end no answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from eecompile.errors import DriftWarning, StrategyError
from eecompile.serving import RowServer
from tests.monitor.test_monitor import fast, made, rows, shifted  # noqa: F401 (fixtures)


def served(fast: Any, watch: Any, x: torch.Tensor, **limits: Any) -> list[int]:  # noqa: F811
    with RowServer(fast, max_batch=16, max_wait_ms=1, monitor=watch) as server:
        futures = [server.submit(row[None], **limits) for row in x]
        return [future.result(60).exit_index for future in futures]


def test_rows_are_watched_once_they_are_answered(fast: Any) -> None:  # noqa: F811
    watch = fast.monitor(max_drop=0.05, shadow=1.0)
    x, _ = rows(96, 5)
    exits = served(fast, watch, x)
    assert watch.state.counts == torch.bincount(torch.tensor(exits), minlength=2).tolist()
    assert watch.state.differ.rows == 96
    alone = fast.monitor(max_drop=0.05, shadow=1.0)
    alone.run(x)
    assert alone.state.differ.mean == pytest.approx(watch.state.differ.mean)
    assert not watch.state.alarms
    served(fast, watch, x, budget=0.01)
    assert watch.state.rows == 96 + sum(k == 0 for k in exits), "rows that a limit has stopped are left out"


def test_drift_is_found_and_a_monitor_that_fails_is_off(fast: Any) -> None:  # noqa: F811
    watch = fast.monitor(max_drop=0.01, shadow=1.0, react="close")
    with pytest.warns(DriftWarning):
        served(fast, watch, shifted(400, 3))
    assert watch.state.alarms

    def broken(early: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("division by zero")

    faulty = fast.monitor(max_drop=0.05, shadow=1.0, compare=broken)
    with pytest.warns(RuntimeWarning, match="the monitor failed and is off: ZeroDivisionError"):
        assert len(served(fast, faulty, rows(40, 7)[0])) == 40
    with pytest.raises(StrategyError, match="watches another module"):
        RowServer(copy.deepcopy(fast), monitor=watch)
