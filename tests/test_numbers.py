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

from eecompile import CompiledModule, EecompileError, advise, criteria, eecompile, strategies
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
    "a switch of a strategy": lambda f: strategies.Branchy(trunk="no"),  # type: ignore[arg-type]
    "a switch of compiling": lambda f: eecompile(f.original, example_inputs=X[:4], measure="no"),  # type: ignore[arg-type]
    "seed of compiling": lambda f: eecompile(f.original, example_inputs=X[:4], seed=2**64),
    "seed of advice": lambda f: advise(f.original, LOADER, seed="a"),  # type: ignore[arg-type]
    "static, no cost": lambda f: f.calibrate(LOADER, static=(nn.Linear(8, 2), "0.4")),
    "static, other inputs": lambda f: f.calibrate(LOADER, static=(nn.Linear(3, 2), 0.4)),
    "threshold of many digits": lambda f: f.set_thresholds(10**5000),
    "budget of many digits": lambda f: f(X, budget=10**5000),
    "target of many digits": lambda f: f.calibrate(LOADER, target=10**5000),
    "label of many digits": lambda f: monitored(f).labels({1: 10**5000}),
    "a plot": lambda f: f.plot([], LOADER),
    "executor": lambda f: setattr(f, "executor", ["compact"]),
    "gate_mode": lambda f: setattr(f, "gate_mode", "sure"),
    "train_trunk": lambda f: setattr(f, "train_trunk", "no"),
    "curve": lambda f: f.evaluate(LOADER, curve="yes"),
    "budgets": lambda f: f.evaluate(LOADER, budgets=0.5),
    "budgets of a curve": lambda f: f.budget_curve(LOADER, budgets=None),
    "boxes": lambda f: f.calibrate(LOADER, budget=0.9, boxes="a"),
    "groups, no column": lambda f: f.calibrate(LOADER, groups=3),
    "groups by name": lambda f: f.evaluate(LOADER, groups={}),
    "path of a state": lambda f: f.monitor(path=3),
    "path of an export": lambda f: f.export(3),
    "no path of an export": lambda f: f.export(None),
    "path of a program": lambda f: f.save(b"x"),
    "path of a report": lambda f: f.report(None, ()),
    "path of an exported program": lambda f: f.verify_export(3, ()),
    "compare, no function": lambda f: f.monitor(compare="a"),
    "compare gives an int": lambda f: f.monitor(shadow=1.0, compare=lambda a, b: 3).run(X[:2]),
    "compare gives text": lambda f: f.monitor(shadow=1.0, compare=lambda a, b: "a").run(X[:2]),
    "compare gives too many": lambda f: f.monitor(shadow=1.0, compare=lambda a, b: torch.ones(9)).run(X[:2]),
    "compare leaves [0, 1]": lambda f: f.monitor(shadow=1.0, compare=lambda a, b: torch.full((2,), 2.0)).run(X[:2]),
    "loader": lambda f: f.monitor(loader=3),
    "ids, a number": lambda f: monitored(f).run(X[:3], ids=3),
    "ids, text": lambda f: monitored(f).run(X[:3], ids="abc"),
    "ids, lists": lambda f: monitored(f).run(X[:3], ids=[[1], [2], [3]]),
    "labels, a list": lambda f: monitored(f).labels([1]),
    "callbacks": lambda f: f.fit(LOADER, callbacks="a"),
    "accelerator": lambda f: f.fit(LOADER, accelerator="a"),
    "checkpoint_dir": lambda f: f.fit(LOADER, checkpoint_dir=3),
}
VERBS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "fit": lambda f, o: f.fit(LOADER, **o),
    "calibrate": lambda f, o: f.calibrate(LOADER, **o),
    "calibrate, budget": lambda f, o: f.calibrate(LOADER, budget=0.9, **o),
    "budget_curve": lambda f, o: f.budget_curve(LOADER, **o),
    "evaluate": lambda f, o: f.evaluate(LOADER, **o),
    "benchmark": lambda f, o: f.benchmark(X, **o),
    "monitor": lambda f, o: f.monitor(**o),
    "verify_export": lambda f, o: f.verify_export("none.pt2", LOADER, **o),
}
SWITCHES = {
    "fit": ("trunk", "two_stage", "train_in_place", "cached", "progress", "resume"),
    "calibrate": ("temperature", "keep_open", "conditional", "control_groups"),
    "benchmark": ("compile_original",),
}
FUNCTIONS = {"fit": ("optimizer", "scheduler", "loss", "metric"), "calibrate": ("metric",), "evaluate": ("metric",)}
OPTIONS = [
    *((verb, "bogus", 1) for verb in VERBS),
    *((verb, name, value) for verb, names in SWITCHES.items() for name in names for value in ("no", 1, [])),
    *((verb, name, 3) for verb, names in FUNCTIONS.items() for name in names),
    *((verb, "seed", seed) for verb in ("fit", "calibrate", "monitor") for seed in ("a", None, 2**64, 10**5000)),
]


@pytest.mark.parametrize("name", CALLS)
def test_it_is_named(fast: CompiledModule, name: str) -> None:
    with pytest.raises(EecompileError) as caught:
        CALLS[name](fast)
    assert "got:" in str(caught.value) or "next:" in str(caught.value)


@pytest.mark.parametrize(("verb", "name", "value"), OPTIONS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_an_option_is_named(fast: CompiledModule, verb: str, name: str, value: Any) -> None:
    with pytest.raises(EecompileError, match=name) as caught:
        VERBS[verb](fast, {name: value})
    assert "got:" in str(caught.value) and "wanted:" in str(caught.value)


def test_rows_are_found_by_names_of_a_tensor(fast: CompiledModule) -> None:
    watch = monitored(fast)
    watch.run(X[:3], ids=torch.tensor([7, 8, 9]))
    assert watch.labels({7: 0, 9: 1, 10: 1}) == 2


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
        (2**63, {"whole": True}, False),
        (10**400, {"above": 0}, False),
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
