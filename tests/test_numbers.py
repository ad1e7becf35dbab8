"""What public arguments say of things that are no numbers, or no numbers that fit: an error of this package, by name."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from eecompile import CompiledModule, EecompileError, criteria, eecompile, strategies
from eecompile.plain import check_number
from eecompile.serving import RowServer

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
LOADER = [(X, Y)]


@pytest.fixture(scope="module")
def fast() -> CompiledModule:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())]
    found = eecompile(nn.Sequential(*layers, nn.Linear(8, 2)).eval(), strategies.Branchy(exits=2), example_inputs=X[:4])
    found.fit(LOADER, epochs=1, progress=False)
    found.calibrate(LOADER, max_drop=0.4, delta=0.4)
    return found


def monitored(fast: CompiledModule) -> Any:
    return fast.monitor(shadow=1.0)


CALLS: dict[str, Callable[[Any], Any]] = {
    "max_drop": lambda f: f.calibrate(LOADER, max_drop="0.1"),
    "max_drop, a bool": lambda f: f.calibrate(LOADER, max_drop=True),
    "delta": lambda f: f.calibrate(LOADER, delta="0.1"),
    "seed": lambda f: f.calibrate(LOADER, seed=0.5),
    "budget": lambda f: f.calibrate(LOADER, budget="0.5"),
    "lr": lambda f: f.fit(LOADER, lr="0.1"),
    "weight_decay": lambda f: f.fit(LOADER, weight_decay="0"),
    "epochs": lambda f: f.fit(LOADER, epochs=1.5),
    "groups, a number": lambda f: f.evaluate(LOADER, groups=lambda x, y: 3),
    "groups of calibrate": lambda f: f.calibrate(LOADER, groups=lambda x, y: "a"),
    "rounds": lambda f: f.benchmark(X, rounds="9"),
    "rounds of stages": lambda f: f.measure_stages(X, rounds=2.5),
    "no rows to time": lambda f: f.benchmark(X[:0]),
    "alpha": lambda f: f.monitor(alpha="0.05"),
    "differ": lambda f: monitored(f).take([0], differ=[None]),
    "differ, NaN": lambda f: monitored(f).take([0], differ=[math.nan]),
    "exit_index": lambda f: monitored(f).take(["a"]),
    "exit_index, a half": lambda f: monitored(f).take([0.5]),
    "confidence": lambda f: monitored(f).take([0], confidence=["a"]),
    "confidence, another number": lambda f: monitored(f).take([0, 1], confidence=[0.5]),
    "too few ids": lambda f: monitored(f).run(X[:3], ids=[1]),
    "too many ids": lambda f: monitored(f).run(X[:3], ids=[1, 2, 3, 4]),
    "labels": lambda f: monitored(f).labels({1: "a"}),
    "labels, a half": lambda f: monitored(f).labels({1: 0.5}),
    "labels, two": lambda f: monitored(f).labels({1: [0, 1]}),
    "a pickled monitor": lambda f: pickle.dumps(monitored(f)),
    "a copied monitor": lambda f: copy.deepcopy(monitored(f)),
    "a server of a plain model": lambda f: RowServer(f.original),
    "max_batch": lambda f: RowServer(f, max_batch="4"),  # type: ignore[arg-type]
    "max_batch, a half": lambda f: RowServer(f, max_batch=2.5),  # type: ignore[arg-type]
    "max_wait_ms": lambda f: RowServer(f, max_wait_ms="2"),  # type: ignore[arg-type]
    "reduce": lambda f: criteria.Patience(1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_named(fast: CompiledModule, name: str) -> None:
    with pytest.raises(EecompileError) as caught:
        CALLS[name](fast)
    assert "got:" in str(caught.value) or "next:" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (1, {"least": 1, "whole": True}, True),
        (0, {"least": 1, "whole": True}, False),
        (1.0, {"whole": True}, False),
        (True, {}, False),
        ("1", {}, False),
        (None, {}, False),
        (math.nan, {}, False),
        (math.inf, {"above": 0}, False),
        (0.0, {"above": 0}, False),
        (1.0, {"above": 0, "most": 1}, True),
        (1.0, {"above": 0, "below": 1}, False),
    ],
)
def test_a_number_and_its_bounds(value: Any, bounds: dict[str, Any], fits: bool) -> None:
    if fits:
        check_number("x", value, **bounds)
    else:
        with pytest.raises(EecompileError, match=r"^x is "):
            check_number("x", value, **bounds)


def test_one_graph_of_a_compiled_module_is_refused_with_the_reason(fast: CompiledModule) -> None:
    with pytest.raises(Exception, match="leave out fullgraph=True"):
        torch.compile(fast, fullgraph=True, backend="eager")(X[:4])
