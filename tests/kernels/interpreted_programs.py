"""Whole programs in Triton's interpreter: executors launch the kernels, as they do on CUDA tensors; see `interpreted.py`.

The simulator runs a device program by what a GPU runs it by, `reference` the graph's operators. What they give is compared
with the definitions' answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.kernels import _triton
from eecompile.result import Result
from tests.gates.adaptive import rows, tower
from tests.support import compiled as eecompile
from tests.support import executor, same_result


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):  # numpy's remarks on inf and NaN are not news
        yield


class Tags(nn.Module):
    """A class for each position of [B, S, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


def between(values: Tensor) -> float:
    """A threshold that about half of the values reach, and that none is near: kernels round as they like."""
    ranked = values.flatten().sort().values
    half = len(ranked) // 2
    return float(ranked[half - 1] + ranked[half]) / 2


def exits(model: nn.Module, x: Tensor) -> CompiledModule:
    """Half of the rows leave at the first exit."""
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,))
    fast.set_thresholds([between(fast.observe(x).confidences[0])])
    return fast


def program(kind: str) -> tuple[CompiledModule, Tensor, set[str], set[str]]:
    """A program, its input, and the kernels that the simulator launches, and `reference`."""
    x = rows(5)[0]
    lists = {"decide", "gather", "scatter"}
    if kind == "exits":
        return exits(tower(2), x), x, lists | {"confidence"}, {"confidence"}
    if kind == "positions":
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
        return exits(Tags(), x), x, lists | {"confidence"}, {"confidence"}
    if kind == "gates":
        fast = eecompile(tower(2), strategies.SkipNet(), example_inputs=(x,))
        fast.set_gate_thresholds([between(fast.observe(x).trace.gate_scores)] * len(fast.gates))
        return fast, x, {"confidence", "open_rows", "gather", "scatter"}, {"choose", "confidence"}
    fast = eecompile(tower(3), strategies.Act(), example_inputs=(x,))
    fast.set_halting_threshold(0.5)
    return fast, x, {"confidence", "halt", "open_rows", "gather", "scatter"}, {"choose", "confidence", "halt"}


def ran(fast: CompiledModule, name: str, x: Tensor) -> tuple[Result, set[str]]:
    """What an executor gives, and the kernels that it launched."""
    before = _triton.LAUNCHES.copy()
    with executor(fast, name), torch.no_grad():
        result = fast.run(x)
    return result, set(_triton.LAUNCHES - before)


@pytest.mark.parametrize("kind", ["exits", "positions", "gates", "halting"])
def test_programs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x, simulated, referenced = program(kind)
    for name, kernels in (("simulate", simulated), ("reference", referenced)):
        got, launched = ran(fast, name, x)
        assert launched == kernels
        with monkeypatch.context() as defined:
            defined.setattr(_triton, "INTERPRETED", False)
            want, launched = ran(fast, "reference", x)
            assert not launched
        same_result(got, want)


def test_programs_with_gradients_run_by_the_definitions() -> None:
    fast, x, _, _ = program("halting")
    before = _triton.LAUNCHES.copy()
    fast.executor = "compact"
    fast(x.requires_grad_()).sum().backward()
    assert not _triton.LAUNCHES - before
    assert x.grad is not None
