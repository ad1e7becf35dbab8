"""Bad input gets a clear error and loses nothing: strategies, places, heads, thresholds, and numbers that are none.

What belongs to capture, saving, training, calibration and the command line is tested there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, EecompileError, MissingDependencyError, StrategyError, strategies
from eecompile.criteria import CRITERIA
from eecompile.errors import CaptureError
from tests.capture.nets import CLASSES, WIDTH, Net, compiled, made, rows
from tests.support import again, both, same_result
from tests.support import compiled as eecompile


@pytest.fixture(scope="module")
def fast() -> CompiledModule:
    return compiled(made(Net), rows(4))


def refused(call: Callable[[], object], *said: str) -> str:
    with pytest.raises(StrategyError) as caught:
        call()
    text = str(caught.value)
    for part in said:
        assert part in text
    return text


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("branchi", ["unknown strategy", "got:    'branchi'", "did you mean branchy", "mebert"]),
        ({"name": "branchy", "exit": 2}, ["strategy 'branchy' has no such option", "got:    exit", "did you mean exits"]),
        (3, ["strategy= takes a name or an instance", "got:    int"]),
        (strategies.Branchy, ["strategy= takes a name or an instance", "got:    type"]),
    ],
)
def test_unknown_strategies(strategy, said):
    refused(lambda: eecompile(made(Net), strategy, example_inputs=(rows(4),)), *said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exits": "block.1"}, ["no cut has this name", "got:    block.1", "did you mean blocks.1"]),
        ({"exits": ["blocks.0", "encoder.*"]}, ["no cut has this name", "got:    encoder.*", "blocks.0, blocks.1"]),
        ({"exits": 0}, ["at least one exit", "wanted: an integer >= 1"]),
        ({"exits": []}, ["exits= is an empty list"]),
        ({"exits": [0.0, 0.5]}, ["fractions of the cost between 0 and 1", "[0.0, 0.5]"]),
        ({"exits": [1, 2]}, ["names or fractions of the cost"]),
        ({"head": "lineal"}, ["unknown head", "did you mean linear"]),
        ({"head": "conv"}, ["does not fit the value at this place", "vector ['batch', 16]", "wanted: map"]),
        ({"head": nn.Linear(WIDTH, 5)}, ["logits of the wrong size", "where:  blocks.0", "got:    [2, 5]", "[2, 3]"]),
        ({"head": nn.Linear(3, CLASSES)}, ["does not run on the value at its place", "mat1 and mat2", "['batch', 16]"]),
        ({"head": lambda site: "head"}, ["a head factory gave no module", "got:    str"]),
        ({"criterion": "entrophy"}, ["unknown criterion", "did you mean entropy"]),
        ({"threshold": -0.1}, ["a threshold is 0 or more", "-0.1"]),
        ({"threshold": [0.5, 0.5, 0.5]}, ["wrong number of thresholds", "got:    3", "2, one for each of blocks."]),
        ({"distillation": 2.0}, ["share of the loss", "got:    2.0"]),
    ],
)
def test_options_that_do_not_fit(fast, options, said):
    refused(lambda: again(fast, strategies.Branchy(**{"exits": 2, **options})), *said)


def test_no_place_says_why_for_each_candidate():
    tight = strategies.Branchy(exits=2, max_head_share=1e-4)
    text = refused(lambda: eecompile(made(Net), tight, example_inputs=(rows(4),)), "no place for an exit", "next:")
    for k in range(3):
        assert f"blocks.{k}: head and decision cost" in text
    assert "leaving here saves 25" in text
    text = refused(
        lambda: eecompile(made(Net), strategies.Branchy(exits="blocks.3"), example_inputs=(rows(4),)),
        "no exit fits where it was asked for",
        "where:  blocks.3",
        "leaving here saves 0.6%",
        "an earlier place",
    )
    assert "blocks.3: head and decision cost" in text


def test_a_model_without_any_place():
    class One(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList()

    refused(lambda: eecompile(made(One), example_inputs=(rows(4),)), "no place for an exit", "a larger model")
    every = strategies.MeBert(head="linear")
    refused(lambda: eecompile(made(One), every, example_inputs=(rows(4),)), "a model without repeated blocks")


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        (-0.1, ["a threshold is a number of 0 or more", "where:  exit_0", "got:    -0.1", "above 1 closes"]),
        (math.nan, ["a threshold is a number of 0 or more", "got:    nan"]),
        ("0.5", ["a threshold is a number of 0 or more", "got:    '0.5'"]),
        (True, ["a threshold is a number of 0 or more"]),
        (None, ["a threshold is a number of 0 or more"]),
        ([0.5], ["wrong number of thresholds", "got:    1", "wanted: 3: exit_0, exit_1, exit_2"]),
        ([0.5] * 4, ["wrong number of thresholds", "got:    4"]),
        (torch.tensor([0.5, -1.0, 0.5]), ["a threshold is a number of 0 or more", "where:  exit_1"]),
        ({"exit_7": 0.5}, ["no exit has this name", "got:    exit_7", "exit_0"]),
        ({"exit_1": -1.0}, ["a threshold is a number of 0 or more", "where:  exit_1"]),
    ],
)
def test_thresholds_that_are_none_change_nothing(fast, thresholds, said):
    fast.set_thresholds([0.1, 0.2, 0.3])
    refused(lambda: fast.set_thresholds(thresholds), *said)
    assert fast.thresholds.tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("thresholds", "kept"),
    [(0, [0, 0, 0]), (1.0, [1, 1, 1]), (math.inf, [math.inf] * 3), ({"exit_1": 2}, [0.5, 2, 0.5])],
)
def test_thresholds_that_are_some(fast, thresholds, kept):
    fast.set_thresholds(0.5)
    fast.set_thresholds(thresholds)
    assert fast.thresholds.tolist() == kept
    fast(rows(3))


@pytest.mark.parametrize("temperatures", [[1.0] * 3, [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, -1.0, 1.0], [math.nan] * 4])
def test_temperatures_are_positive(fast, temperatures):
    count = len(temperatures) == 4
    said = ("a temperature is a number of above 0", "finite") if count else ("wrong number of temperatures", "4: ")
    refused(lambda: fast.set_temperatures(temperatures), *said)
    assert fast.temperatures.tolist() == [1.0] * 4


def test_executors_and_backends_that_are_none(fast):
    for name, value in (("executor", "compct"), ("backend", "indctor")):
        refused(lambda n=name, v=value: setattr(fast, n, v), f"unknown {name}", "did you mean")
    with pytest.raises(MissingDependencyError, match="needs a CUDA device"):
        fast.executor = "device"
    assert (fast.executor, fast.backend) == ("compact", "eager")


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"routed"}))  # which needs a router
@pytest.mark.parametrize("capture", ["export", "blocks"])
def test_numbers_that_are_none_never_leave_early(fast, capture, criterion):
    """At a threshold of 0 every row leaves at the first exit, but for those whose logits are NaN or infinite."""
    strategy = strategies.Branchy(exits=3, criterion=criterion, threshold=0.0)
    if capture == "export":
        one = again(fast, strategy)
    else:
        one = compiled(made(Net), rows(4), strategy=strategy, capture="blocks", closed=False)
    x = rows(5)
    x[1], x[3] = math.nan, math.inf
    compact, reference = both(one, x)
    same_result(compact, reference)
    assert compact.exit_index.tolist() == [0, 3, 0, 3, 0]
    assert compact.confidence[[1, 3]].tolist() == [0.0, 0.0]
    assert bool(compact.confidence.isfinite().all())
    assert bool(compact.output[[0, 2, 4]].isfinite().all())
    seen = one.observe(x)
    assert all(float(c[1]) == float(c[3]) == 0.0 for c in seen.confidences)


def test_an_infinite_logit_of_one_class_is_no_certainty(fast):
    """Masked classes (minus infinity) are fine; plus infinity says nothing about how sure a row is."""

    class Masked(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            masked = torch.tensor([0.0, 0.0, -math.inf]) + h[:, :3]
            return torch.where(h[:, :1] > 1e6, math.inf, masked)

    one = again(fast, strategies.Branchy(exits=2, head=Masked(), threshold=0.0))
    x = rows(4)
    x[2] = 1e12
    compact, reference = both(one, x)
    assert compact.exit_index.tolist() == reference.exit_index.tolist() == [0, 0, 2, 0]


# ------------------------------------------------------------------ arguments of another type

ODD = [None, "text", {"a": 1}, ["a", "b"], math.nan, -1, 1j, object(), int, b"x", torch.zeros(2, 2)]


def remade(**options):
    return eecompile(made(Net), **{"example_inputs": (rows(4),), **options})


MESSAGES = {
    "settings": (lambda f, v: setattr(f, "settings", v), "settings is of another type"),
    "device_options": (lambda f, v: setattr(f, "device_options", v), "device_options is of another type"),
    "branch": (lambda f, v: f.branch(v), "unknown exit"),
    "costs": (lambda f, v: f.costs(v), "open_exits says of every exit"),
    "example_kwargs": (
        lambda f, v: remade(example_kwargs=v),
        "example_kwargs|no such argument",
    ),
    "example_inputs": (lambda f, v: remade(example_inputs=v), "example|too many positional"),
    "batch_axis": (lambda f, v: remade(batch_axis=v), "batch_axis"),
    "prediction": (lambda f, v: remade(prediction=v), "prediction|output"),
    "progress": (lambda f, v: remade(progress=v), "progress= is a function"),
    "original": (lambda f, v: f.benchmark(rows(4), rounds=3, original=v), "original is of another type"),
    "against": (lambda f, v: f.benchmark(rows(4), rounds=3, against=v), "against"),
    "lr": (lambda f, v: f.fit([], lr=v), "lr "),
    "budgets": (lambda f, v: f.budget_curve([], budgets=v), "budgets"),
    "in_place": (lambda f, v: f.own_trunk(v), "in_place= is a switch"),
    "heads": (lambda f, v: f.replace_heads(v), "heads is of another type|unknown exit"),
}
MAY_BE = {"example_kwargs": (None,), "prediction": (None,), "progress": (None, int), "batch_axis": (int,)}
MAY_BE |= {"original": (None,), "against": (None,)}


@pytest.mark.parametrize("name", MESSAGES)
def test_arguments_of_another_type(fast, name):
    call, said = MESSAGES[name]
    for value in ODD:
        if not any(value is v for v in MAY_BE.get(name, ())):
            with pytest.raises(EecompileError, match=said):
                call(fast, value)


def test_functions_that_take_other_arguments(fast):
    loader = [(rows(8), LABELS)]
    calls = {
        "metric": lambda given: fast.evaluate(loader, metric=given),
        "groups": lambda given: fast.evaluate(loader, groups=given),
        "loss": lambda given: fast.fit(loader, loss=given),
        "optimizer": lambda given: fast.fit(loader, optimizer=given),
        "scheduler": lambda given: fast.fit(loader, scheduler=given),
    }
    for name, call in calls.items():
        with pytest.raises(EecompileError, match=f"{name}= takes other arguments"):
            call(lambda one, two, three: one)


def test_values_are_checked_where_there_is_nothing_to_set(fast):
    gated = again(fast, strategies.SkipNet())
    assert not gated.exits
    for value in (None, "0.5", -1, math.nan):
        refused(lambda value=value: gated.set_thresholds(value), "a threshold is a number of 0 or more")
    gated.set_thresholds(0.5)


# ------------------------------------------------------------------ inputs and data


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize("method", ["__call__", "run", "observe", "full", "stream", "device_program"])
def test_inputs_that_are_no_dense_tensors_on_the_device(fast, method):
    x = rows(4)
    given = {
        "nested": torch.nested.nested_tensor(list(x)),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "sparse_coo": x.to_sparse(),
        "mkldnn": x.to_mkldnn(),
        "another device": x.to("meta"),
    }
    for said, value in given.items():
        with pytest.raises(CaptureError, match=said):
            list(getattr(fast, method)(value))


NAN = torch.where(torch.arange(8)[:, None] == 3, math.nan, rows(8))
LABELS = torch.arange(8) % CLASSES


@pytest.mark.parametrize("strategy", [strategies.Branchy(exits=2), strategies.SkipNet()], ids=["branchy", "skipnet"])
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((NAN, LABELS), "NaN|not finite"),
        ((rows(8), torch.full((8,), -100)), "has a label|with a label"),
        ((rows(8)[:0], LABELS[:0]), "batch without rows"),
        ((rows(8), LABELS.float()), "dtype"),
        ((rows(8), LABELS + 1), "out of range"),
        ((rows(8), ["a"] * 8), "class indices"),
        ((rows(8).numpy().astype("float64"), LABELS), "float64"),
    ],
)
def test_data_that_cannot_be_used(fast, strategy, batch, said):
    one, good = again(fast, strategy), [(rows(8), LABELS)] * 8
    calls = [
        lambda: one.fit([batch] * 8, trunk=False, progress=False),
        lambda: one.fit([batch] * 8, trunk=False, cached=False, progress=False),
        lambda: one.evaluate([batch] * 2),
        lambda: one.calibrate([batch] * 2),
        lambda: one.fit(good, trunk=False, val_loader=[batch], progress=False),
        lambda: one.fit(good, trunk=False, cached=False, val_loader=[batch], progress=False),
    ]
    for call in calls:
        with pytest.raises(EecompileError, match=said):
            call()


def test_arrays_of_numpy_are_as_good_as_tensors(fast):
    loader = [(rows(8), LABELS)] * 2
    arrays = [(x.numpy()[::-1], y.numpy()[::-1]) for x, y in loader]
    assert fast.evaluate(arrays).accuracy == fast.evaluate(loader).accuracy
    with pytest.raises(EecompileError, match="val_loader is empty"):
        fast.fit(arrays, val_loader=[], progress=False)


def test_checks_of_no_rows_and_nested_examples_are_refused(fast):
    with pytest.raises(CaptureError, match="0 rows"):
        fast.check_no_sync(rows(4)[:0])
    nested = torch.nested.nested_tensor(list(rows(4)))
    with pytest.raises(CaptureError, match="nested tensor"):
        eecompile(made(Net), example_inputs=(nested,))
    with pytest.raises(EecompileError, match="nested tensor"):
        fast(rows(4), labels=nested)
