"""Values of a call that are not tensors: those that equal what was captured are accepted, others refused."""

from __future__ import annotations

import math
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, eecompile, load, strategies
from eecompile.constants import same
from eecompile.errors import ArtifactError
from tests.support import equal_bits


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 3))

    def forward(self, x: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
        return self.layers(x * scale + float(flag))


def test_defaults_may_be_said(tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    model = Scaled().eval()
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_inputs=(x,))
    fast.save(tmp_path / "saved")
    for one in (fast, load(tmp_path / "saved")):
        with torch.no_grad():
            for args, kwargs in (((x, 1.0), {}), ((x,), {"scale": 1.0}), ((x,), {"flag": False, "scale": 1.0})):
                equal_bits(one(*args, **kwargs), model(*args, **kwargs))
        for kwargs in ({"scale": 2.0}, {"flag": True}, {"flag": 0}):
            with pytest.raises(CaptureError, match="other arguments"):
                one(x, **kwargs)


class Kind(Enum):
    ONE = 1
    TWO = 2


Pair = namedtuple("Pair", "a b")
NAN = float("nan")

# Name of an argument of `Options.forward`, values that equal its default, values that do not.
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "pair": ([(1.0, 2.0), (1.0, np.float64(2.0))], [(1.0, 3.0), [1.0, 2.0], (1, 2), (1.0, 2.0, 3.0), None]),
    "size": ([torch.Size([2, 3]), (2, 3)], [torch.Size([3, 2])]),
    "kind": ([Kind.ONE], [Kind.TWO, 1]),
    "level": ([NAN, np.float32(NAN)], [0.0, None]),
    "count": ([3, np.int64(3)], [3.0, True, "3"]),
    "names": ([["a", "b"]], [["b", "a"], ("a", "b"), []]),
    "place": ([torch.device("cpu")], [torch.device("meta")]),
    "dtype": ([torch.float32], [torch.float64]),
    "cut": ([slice(0, 4)], [slice(0, 5)]),
    "table": ([{"a": (1, None)}], [{"a": (1, 2)}, {}, {"b": (1, None)}]),
}


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 3))

    def forward(  # type: ignore[no-untyped-def]
        self, x, pair=(1.0, 2.0), size=torch.Size([2, 3]), kind=Kind.ONE, level=NAN, count=3, names=["a", "b"],  # noqa: B006, B008
        place=torch.device("cpu"), dtype=torch.float32, cut=slice(0, 4), table={"a": (1, None)},  # noqa: B006, B008
    ):  # fmt: skip
        return self.layers(x * pair[0] + count)


@pytest.mark.parametrize("said", [False, True], ids=["left out of the example", "in the example"])
def test_equal_constants_are_equal(said: bool, tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    model = Options().eval()
    example = {"x": x} | ({name: equal[0] for name, (equal, _) in OPTIONS.items()} if said else {})
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_kwargs=example)
    compiled = [fast]
    if not said:  # a device or an enumeration that the example itself gives has no place in a saved program
        fast.save(tmp_path / "saved")
        compiled.append(load(tmp_path / "saved"))
    with torch.no_grad():
        answer = model(x)
        for one in compiled:
            for name, (equal, others) in OPTIONS.items():
                for value in equal:
                    equal_bits(one(x=x, **{name: value}), answer)
                for value in others:
                    with pytest.raises(CaptureError, match=f"differs from the value|other arguments.*\n.*{name}: "):
                        one(x=x, **{name: value})


@dataclass
class Holds:
    tensor: Tensor


def test_what_is_the_same() -> None:
    assert same(Pair(1, [np.zeros(2)]), Pair(1, [np.zeros(2)]))
    assert not same(Pair(1, 2), (1, 2))
    assert not same(np.zeros(2), np.zeros(3))
    assert same({1, 2}, {2, 1})
    assert not same({1}, {True})
    assert not same(Pair(1, 2), namedtuple("Pair", "b a")(2, 1))
    assert not same(defaultdict(int, a=1), defaultdict(list, a=1))
    assert not same(Holds(torch.ones(3)), Holds(torch.ones(3)))  # their `==` has no truth value
    assert same(10**5000, 10**5000) and not same(10**5000, 10**5001)
    anything = object()
    assert same((anything, 1), (anything, 1)) and not same(object(), object())


class Text(str, Enum):
    ONE = "one"


@pytest.mark.parametrize("level", [math.inf, -math.inf, NAN])
def test_infinity_and_nan_are_saved(level: float, tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    model = Options().eval()
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_kwargs={"x": x, "level": level})
    fast.save(tmp_path / "saved")
    equal_bits(load(tmp_path / "saved")(x=x, level=level), model(x))


def test_a_text_that_is_more_than_a_text_is_not_saved(tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    fast = eecompile(
        Options().eval(), strategies.Branchy(exits=1, max_head_share=9.0), example_kwargs={"x": x, "level": Text.ONE}
    )
    with pytest.raises(ArtifactError, match="Text"):
        fast.save(tmp_path / "saved")
